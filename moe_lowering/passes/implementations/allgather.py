"""AllGather: every rank gets every token, computes its own experts, and the partial results are reduced.

One rank:  init_routing_v2 > MLP > token_unpermute.
EP group:  all_gather(x, ids, weights) > init_routing_v2 (own experts only) > MLP > undefined rows to zero >
           token_unpermute > reduce_scatter.

Why it is equivalent. init_routing_v2 sorts (expert, source token) stably, which is the generic row order because the
gathered tokens are in rank order. A slot whose expert lives elsewhere has row index -1; it must contribute nothing. The
seed takes abs(-1), which reads an undefined row, and 0 * NaN is NaN. Here -1 becomes the last row: whenever such a slot
exists there are fewer valid rows than ``ep * T * min(k, E_local)``, plus one when k > E_local, so the last row of the
slice taken below is undefined, and undefined rows are selected to zero first.
Fewer rows than slots, and several slots on one row, are within what the kernel does (moe_token_unpermute.h gathers row by
row and compares each index with the number of rows); a negative index is not: it would read before the buffer.
Masked and padding tokens get ids past the last expert (E + j, with ``expert_num`` raised by k): they belong to no rank.
Sources: ops_transformer.init_routing; vllm_ascend.token_dispatcher: TokenDispatcherWithAllGather, whose abs(row index)
points at undefined rows; here.test_undefined_rows: none of them is read.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emitting import Emitter, aten
from moe_lowering.passes.implementations.base import Call, Form, Implementation, Replacement, stage_after
from moe_lowering.passes.implementations.mlp import emit_mlp, mlp_calls
from moe_lowering.passes.implementations.quantised_mlp import quantise_tokens
from moe_lowering.passes.implementations.tensor_parallel import Share, first_tokens, gather, share
from moe_lowering.passes.implementations.unpermute import combine_calls, emit_combine

c10d = torch.ops._c10d_functional


@dataclasses.dataclass
class _Tokens:
    """x [T, H], its scale [T] when it is int8, ids [T, k] and weights [T, k] of the tokens that this rank computes on."""

    x: Node
    scale: Node | None
    ids: Node
    weights: Node


def _calls(spec: BlockSpec, deployment: Deployment) -> tuple[Call, ...]:
    quantised = spec.quantised_input or spec.format.int8_rows
    arriving = {"x_dtype": "int8", "scale_dtype": "float32", "scale_dims": 1} if quantised else {"scale_dtype": None}
    return (
        Call("npu_moe_init_routing_v2", {**arriving, "quant_mode": -1, "has_offset": False}),
        *mlp_calls(spec, deployment, spec.quantised_input),
        *combine_calls(spec, deployment),
    )


def _emit(block: Block, emit: Emitter, deployment: Deployment, quantities: dict[str, Any]) -> Replacement:
    spec = block.spec
    # Routing weights are gathered with the tokens, so the dispatch stage stands where they exist.
    start = stage_after(block, block.weights)
    with emit.at(start, block.dispatch):
        tokens, own = _prepare(emit, block, deployment)
        rows, index, counts, row_scale = _route_rows(emit, block, tokens, deployment)
    with emit.at(max(block.mlp, start), block.mlp):
        y_rows = emit_mlp(emit, block, rows, row_scale, counts, deployment)
    with emit.at(block.combine, block.combine):
        if spec.ep_size > 1 or spec.has_mask:
            y_rows, index = _keep_undefined_out(emit, y_rows, index, counts)
        y = emit_combine(emit, y_rows, index, tokens.weights, deployment)
        y = _finalize(emit, block, y, own)
        return Replacement(emit.like(gather(emit, block, y), block.x), counts)


def _prepare(emit: Emitter, block: Block, deployment: Deployment) -> tuple[_Tokens, Any]:
    """The tokens of all ranks, and how many of them are this rank's own."""
    spec, mine = block.spec, Share(emit, block, deployment)
    x, scale = quantise_tokens(emit, block, mine)
    ids, weights = emit.rows(block.ids), emit.rows(block.weights)
    if block.mask is not None:
        ids, weights = _mask(emit, ids, weights, block.mask, spec)
    tokens = _Tokens(x, scale, mine.of(ids), mine.of(weights))
    if spec.ep_size == 1:
        return tokens, None
    own = emit.size(x, 0) if spec.max_tokens else None
    if spec.max_tokens:
        tokens = _pad(emit, tokens, spec)
    gathered = _Tokens(
        _all_gather(emit, tokens.x, spec),
        None if tokens.scale is None else _all_gather(emit, tokens.scale, spec),
        _all_gather(emit, tokens.ids, spec),
        _all_gather(emit, tokens.weights, spec),
    )
    return gathered, own


def _no_expert(emit: Emitter, ids: Node, spec: BlockSpec) -> Node:
    """[k] distinct ids past the last expert."""
    value = ids.meta["val"]
    return emit.call(
        aten.arange.start, spec.experts, spec.experts + spec.top_k, dtype=value.dtype, device=value.device,
        pin_memory=False,
    )  # fmt: skip


def _mask(emit: Emitter, ids: Node, weights: Node, mask: Node, spec: BlockSpec) -> tuple[Node, Node]:
    """Masked tokens get no expert, and weight 0: theirs may be NaN, and NaN * 0 is NaN."""
    column = emit.call(aten.reshape.default, mask, [-1, 1])
    value = weights.meta["val"]
    zero = emit.call(aten.full.default, [], 0.0, dtype=value.dtype, device=value.device, pin_memory=False)
    return (
        emit.call(aten.where.self, column, ids, _no_expert(emit, ids, spec)),
        emit.call(aten.where.self, column, weights, zero),
    )


def _pad(emit: Emitter, tokens: _Tokens, spec: BlockSpec) -> _Tokens:
    """Tokens of this rank filled up to its share of ``max_tokens``: their number must be the same on every rank."""
    own, most = tokens.x.meta["val"].shape[0], share(spec.max_tokens, spec)
    missing = most - own if isinstance(own, int) else most
    nowhere = emit.call(aten.expand.default, _no_expert(emit, tokens.ids, spec), [missing, spec.top_k])
    return _Tokens(
        _fill(emit, tokens.x, _zeros(emit, tokens.x, missing), most),
        None if tokens.scale is None else _fill(emit, tokens.scale, _zeros(emit, tokens.scale, missing), most),
        _fill(emit, tokens.ids, nowhere, most),
        _fill(emit, tokens.weights, _zeros(emit, tokens.weights, missing), most),
    )


def _zeros(emit: Emitter, model: Node, rows: int) -> Node:
    value = model.meta["val"]
    return emit.call(
        aten.full.default, [rows, *value.shape[1:]], 0, dtype=value.dtype, device=value.device, pin_memory=False
    )


def _fill(emit: Emitter, node: Node, filler: Node, most: int) -> Node:
    """Where T varies the filler is ``most`` long, and cut: a filler of symbolic length would add a guard."""
    filled = emit.call(aten.cat.default, [node, filler])
    if isinstance(node.meta["val"].shape[0], int):
        return filled
    return emit.call(aten.slice.Tensor, filled, 0, 0, most)


def _all_gather(emit: Emitter, node: Node, spec: BlockSpec) -> Node:
    gathered = emit.call(c10d.all_gather_into_tensor.default, node, spec.ep_size, spec.ep_group)
    return emit.call(c10d.wait_tensor.default, gathered)


def _route_rows(
    emit: Emitter, block: Block, tokens: _Tokens, deployment: Deployment
) -> tuple[Node, Node, Node, Node | None]:
    """(rows by expert, row index of each slot or -1, counts of this rank's experts, scales of int8 rows)."""
    spec = block.spec
    first = deployment.own_rank("ep") * spec.local_experts
    extra = spec.top_k if spec.has_mask or spec.max_tokens else 0
    routed = emit.call(
        torch.ops.npu.npu_moe_init_routing_v2.default, tokens.x, tokens.ids,
        expert_num=spec.experts + extra, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[first, first + spec.local_experts],
        **({} if tokens.scale is None else {"scale": tokens.scale}),
    )  # fmt: skip
    rows, index, counts = (emit.item(routed, i) for i in range(3))
    scale = None if tokens.scale is None else emit.item(routed, 3)
    if spec.top_k > spec.local_experts and spec.ep_size > 1:
        # a token has at most E_local slots here: the remaining rows are never filled
        most = _most_rows(emit, tokens.x, spec)
        rows = emit.call(aten.slice.Tensor, rows, 0, 0, most)
        scale = scale if scale is None else emit.call(aten.slice.Tensor, scale, 0, 0, most)
    return rows, index, counts, scale


def _most_rows(emit: Emitter, x: Node, spec: BlockSpec) -> Any:
    """tokens * E_local + 1: every row that can be filled, and one that cannot."""
    tokens = emit.size(x, 0)
    if isinstance(tokens, int):
        return tokens * spec.local_experts + 1
    return emit.call(operator.add, emit.call(operator.mul, tokens, spec.local_experts), 1)


def _keep_undefined_out(emit: Emitter, rows: Node, index: Node, counts: Node) -> tuple[Node, Node]:
    """Rows past the valid ones to zero, and row index -1 to the last row, which is one of those."""
    device = rows.meta["val"].device
    positions = emit.call(aten.arange.default, emit.size(rows, 0), dtype=torch.int32, device=device, pin_memory=False)
    valid = emit.call(aten.lt.Tensor, positions, emit.call(aten.sum.default, counts))
    zero = emit.call(aten.full.default, [], 0.0, dtype=rows.meta["val"].dtype, device=device, pin_memory=False)
    rows = emit.call(aten.where.self, emit.call(aten.unsqueeze.default, valid, 1), rows, zero)
    last = emit.call(aten.slice.Tensor, positions, 0, -1, 2**63 - 1)
    return rows, emit.call(aten.where.self, emit.call(aten.lt.Scalar, index, 0), last, index)


def _finalize(emit: Emitter, block: Block, y: Node, own: Any) -> Node:
    """This rank's ``own`` tokens, summed over the ranks that computed their experts."""
    spec = block.spec
    if spec.ep_size == 1:
        return y
    reduced = emit.call(c10d.reduce_scatter_tensor.default, y, "sum", spec.ep_size, spec.ep_group)
    y = emit.call(c10d.wait_tensor.default, reduced)
    return first_tokens(emit, y, own) if spec.max_tokens else y


ALLGATHER = Implementation("allgather", lambda deployment: (Form("allgather", _calls, _emit),))
