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
Sources: facts/cann_ops.md §2.4, facts/vllm_ascend.md §2.1, facts/npu_free_machine.md (NaN from undefined rows).
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
from moe_lowering.passes.implementations.base import Implementation, Replacement, stage_after
from moe_lowering.passes.implementations.mlp import emit_mlp, mlp_operators

c10d = torch.ops._c10d_functional


@dataclasses.dataclass
class _Tokens:
    """x [T, H], ids [T, k] and weights [T, k] of the tokens that this rank computes on."""

    x: Node
    ids: Node
    weights: Node


def _operators(spec: BlockSpec, soc: str) -> tuple[str, ...]:
    return ("npu_moe_init_routing_v2", *mlp_operators(spec, soc), "npu_moe_token_unpermute")


def _emit(block: Block, emit: Emitter, deployment: Deployment, quantities: dict[str, Any]) -> Replacement:
    spec = block.spec
    # Routing weights are gathered with the tokens, so the dispatch stage stands where they exist.
    start = stage_after(block, block.weights)
    with emit.at(start, block.dispatch):
        tokens = _prepare(emit, block)
        rows, index, counts = _route_rows(emit, block, tokens, deployment)
    with emit.at(max(block.mlp, start), block.mlp):
        y_rows = emit_mlp(emit, block, rows, counts, deployment.soc)
    with emit.at(block.combine, block.combine):
        if spec.ep_size > 1 or spec.has_mask:
            y_rows, index = _keep_undefined_out(emit, y_rows, index, counts)
        y = emit.call(
            torch.ops.npu.npu_moe_token_unpermute.default, y_rows, index, emit.cast(tokens.weights, spec.dtype)
        )
        y = _finalize(emit, block, y)
        return Replacement(emit.like(y, block.x), counts)


def _prepare(emit: Emitter, block: Block) -> _Tokens:
    spec = block.spec
    x, ids, weights = (emit.rows(n) for n in (block.x, block.ids, block.weights))
    if block.mask is not None:
        ids, weights = _mask(emit, ids, weights, block.mask, spec)
    if spec.ep_size == 1:
        return _Tokens(x, ids, weights)
    if spec.max_tokens:
        x, ids, weights = _pad(emit, x, ids, weights, spec)
    return _Tokens(*(_all_gather(emit, n, spec) for n in (x, ids, weights)))


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


def _pad(emit: Emitter, x: Node, ids: Node, weights: Node, spec: BlockSpec) -> tuple[Node, Node, Node]:
    """Tokens of this rank filled up to ``max_tokens``: the number of tokens must be the same on every rank."""
    tokens = x.meta["val"].shape[0]
    missing = spec.max_tokens - tokens if isinstance(tokens, int) else spec.max_tokens
    filler = emit.call(aten.expand.default, _no_expert(emit, ids, spec), [missing, spec.top_k])
    return (
        _fill(emit, x, _zeros(emit, x, missing), spec),
        _fill(emit, ids, filler, spec),
        _fill(emit, weights, _zeros(emit, weights, missing), spec),
    )


def _zeros(emit: Emitter, model: Node, rows: int) -> Node:
    value = model.meta["val"]
    return emit.call(
        aten.full.default, [rows, int(value.shape[1])], 0.0, dtype=value.dtype, device=value.device, pin_memory=False
    )


def _fill(emit: Emitter, node: Node, filler: Node, spec: BlockSpec) -> Node:
    """Where T varies the filler is ``max_tokens`` long, and cut: a filler of symbolic length would add a guard."""
    filled = emit.call(aten.cat.default, [node, filler])
    if isinstance(node.meta["val"].shape[0], int):
        return filled
    return emit.call(aten.slice.Tensor, filled, 0, 0, spec.max_tokens)


def _all_gather(emit: Emitter, node: Node, spec: BlockSpec) -> Node:
    gathered = emit.call(c10d.all_gather_into_tensor.default, node, spec.ep_size, spec.ep_group)
    return emit.call(c10d.wait_tensor.default, gathered)


def _route_rows(emit: Emitter, block: Block, tokens: _Tokens, deployment: Deployment) -> tuple[Node, Node, Node]:
    """(rows by expert, row index of each slot or -1, counts of this rank's experts)."""
    spec = block.spec
    first = deployment.ep_rank * spec.local_experts
    extra = spec.top_k if spec.has_mask or spec.max_tokens else 0
    routed = emit.call(
        torch.ops.npu.npu_moe_init_routing_v2.default, tokens.x, tokens.ids,
        expert_num=spec.experts + extra, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[first, first + spec.local_experts],
    )  # fmt: skip
    rows, index, counts = (emit.item(routed, i) for i in range(3))
    if spec.top_k > spec.local_experts and spec.ep_size > 1:
        # a token has at most E_local slots here: the remaining rows are never filled
        rows = emit.call(aten.slice.Tensor, rows, 0, 0, _most_rows(emit, tokens.x, spec))
    return rows, index, counts


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


def _finalize(emit: Emitter, block: Block, y: Node) -> Node:
    spec = block.spec
    if spec.ep_size == 1:
        return y
    reduced = emit.call(c10d.reduce_scatter_tensor.default, y, "sum", spec.ep_size, spec.ep_group)
    y = emit.call(c10d.wait_tensor.default, reduced)
    return _first_tokens(emit, y, block) if spec.max_tokens else y


def _first_tokens(emit: Emitter, y: Node, block: Block) -> Node:
    """The first T of ``max_tokens`` rows. A slice to a symbolic T would add a guard, or depend on the compile's own T."""
    tokens = emit.size(emit.rows(block.x), 0)
    if isinstance(tokens, int):
        return emit.call(aten.slice.Tensor, y, 0, 0, tokens)
    device = y.meta["val"].device
    first = emit.call(aten.arange.default, tokens, dtype=torch.int32, device=device, pin_memory=False)
    return emit.call(aten.index_select.default, y, 0, first)


ALLGATHER = Implementation("allgather", _operators, _emit)
