"""Tokens of all ranks of the EP group on each of them, and this rank's rows among them: AllGather and static AllToAll.

    all_gather(x, ids, weights) > init_routing_v2 (own experts only) > MLP > one undefined row to zero > token_unpermute

With ``Deployment.unpermute_operator`` finalize_routing is in place of the last two (``unpermute``).

The result is [ep * M, H]: for each token of each rank the weighted sum over the experts of this rank, zero where it has
none here. Which ranks' sums are then added, and how, is the implementation's own.

Why it is equivalent. init_routing_v2 sorts (expert, source token) stably, which is the generic row order because the
gathered tokens are in rank order. A slot whose expert lives elsewhere has row index -1; it must contribute nothing. The
seed takes abs(-1), which reads an undefined row, and 0 * NaN is NaN. finalize_routing reads -1 as no row, so that it gets
the index as it is. token_unpermute does not: here -1 becomes the last row, and that row is zero unless it is valid. Only
that row is written: no other index ever names an undefined one. Where the last row is valid all rows are, so that every
slot is local and no index is -1. With k > E_local there is one row more than can be valid (``_row_bound``), so the last
one is zero whatever the counts are.
The row is written in place, in memory that the second matmul of this block has just made and that nothing else reads. GE
graphs are functional, and a row can be changed there only by writing all of them: see ``unpermute``.
Fewer rows than slots, and several slots on one row, are within what the kernel does (moe_token_unpermute.h gathers row by
row and compares each index with the number of rows); a negative index is not: it would read before the buffer.
Masked and padding tokens get ids past the last expert (E + j, with ``expert_num`` raised by k): they belong to no rank. So do
experts that give nothing, whose ids are there already.

Few exchanges. Where ids and weights are not all that travels beside x, or are changed on the way (scales of int8 rows, a
mask, padding), they travel as the columns of one int32 tensor: a collective costs as much as several small kernels. Two
plain tensors do not: putting them together and taking them apart is two kernels for one exchange less.
Sources: ops_transformer.init_routing; vllm_ascend.token_dispatcher: it reads undefined rows, by abs of the row index.
"""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.implementations.base import stage_after
from moe_lowering.passes.implementations.columns import (
    WORD,
    empty_columns,
    ids_of_no_expert,
    pack_columns,
    sent_dtype,
    unpack_columns,
)
from moe_lowering.passes.implementations.matmul_calls import row_scales
from moe_lowering.passes.implementations.mlp import emit_mlp, mlp_calls
from moe_lowering.passes.implementations.quantised_calls import tokens_calls
from moe_lowering.passes.implementations.quantised_mlp import quantise_tokens
from moe_lowering.passes.implementations.tensor_parallel import OwnTokens, tokens_per_rank
from moe_lowering.passes.implementations.unpermute import (
    combine_calls,
    emit_combine,
    takes_no_row,
    unpermute_words,
    weights_dtype,
)
from moe_lowering.passes.operator_calls import OperatorCall, Rules, emit_call, tensor
from moe_lowering.vocabulary import FINALIZE_ROUTING

c10d = torch.ops._c10d_functional


@dataclasses.dataclass(frozen=True)
class GatheredTokens:
    """x [N, H], its scale [N] when it is int8, ids [N, k] and weights [N, k] of the tokens that this rank computes on."""

    x: Node
    scale: Node | None
    ids: Node
    weights: Node


@dataclasses.dataclass(frozen=True)
class Partial:
    """y [ep * M, H], the sums over this rank's experts; its own tokens [M, H]; its experts' counts."""

    y: Node
    own: Node
    counts: Node


ROUTE = "npu_moe_init_routing_v2"


def route_arguments(
    x: Any, ids: Any, scale: Any, experts: int, kept: list[Any], x_smooth: Any = None
) -> dict[str, Any]:
    """``init_routing_v2`` of x [N, H], int8 with ``scale`` [N] or not, by ids [N, k] in 0..experts-1: rows in order of
    expert, and the counts, of the experts from ``kept[0]`` to ``kept[1]`` - 1. With ``x_smooth`` [kept, H] it multiplies rows by
    their expert's line and makes them int8."""
    arguments = {
        "x": x,
        "expert_idx": ids,
        "expert_num": experts,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": kept,
    }
    if x_smooth is not None:
        return {**arguments, "scale": x_smooth, "quant_mode": _DYNAMIC}
    return arguments if scale is None else {**arguments, "scale": scale}


_DYNAMIC = 1  # quant_mode: int8 with a scale for each row


def route_call(spec: BlockSpec, top_k: int, experts: int, kept: list[Any]) -> OperatorCall:
    """The call for rows as they travel."""
    eight_bits = travels_as_int8(spec)
    x = tensor(torch.int8 if eight_bits else spec.dtype, None, spec.hidden)
    scale = row_scales() if eight_bits else None
    # as many lines as the range has experts, which is left open where the range is
    lines = None if kept[0] is None else kept[1] - kept[0]
    smooth = tensor(torch.float32, lines, spec.hidden) if spec.has_x_smooth else None
    return OperatorCall(ROUTE, route_arguments(x, tensor(torch.int32, None, top_k), scale, experts, kept, smooth))


def travels_as_int8(spec: BlockSpec) -> bool:
    """Whether tokens are sent as int8 with a scale each. Smooth scales are an expert's: a token has one result for each."""
    return spec.quantised_input or (spec.format.int8_rows and not spec.has_x_smooth)


def gathered_calls(spec: BlockSpec, deployment: Deployment) -> tuple[OperatorCall | Rules, ...]:
    """The calls that ``emit_partial`` makes for a block."""
    return (
        *tokens_calls(spec),
        # Any range of E_local experts: no rule depends on which ones are this rank's
        route_call(spec, spec.top_k, _ids(spec), [None, None]),
        *mlp_calls(spec, deployment),
        *combine_calls(spec, deployment, lambda tokens: _all_tokens(spec, tokens), _rows_kept(spec)),
    )


def _all_tokens(spec: BlockSpec, tokens: Any) -> Any:
    """The tokens of all ranks that are gathered at T."""
    return spec.ep_size * tokens_per_rank(spec.max_tokens or tokens, spec)


def _rows_kept(spec: BlockSpec) -> Callable[[Any], Any]:
    """The rows at T; None where there is one for each slot, or for each expert and token, which is as many as a token has: but
    with zero experts a token may have more slots than there are experts."""
    if spec.ep_size == 1 or spec.top_k <= spec.experts:
        return lambda tokens: None
    return lambda tokens: _all_tokens(spec, tokens) * spec.local_experts


def gathered_words(spec: BlockSpec, deployment: Deployment) -> dict[str, Any]:
    """What the rules of an implementation that calls ``emit_partial`` read."""
    return {
        "counts_read_before_weights": spec.counts_read_before_weights,
        **unpermute_words(spec, deployment),
    }


def _ids(spec: BlockSpec) -> int:
    """How many ids there are: those of the experts, and past them those of tokens without one and of zero experts."""
    return spec.experts + max(spec.zero_experts, spec.top_k if spec.has_mask or spec.max_tokens else 0)


def gathered_bytes(spec: BlockSpec, deployment: Deployment) -> int:
    """Bytes of one token as it is gathered: x, its scale, ids and weights."""
    scale = torch.float32.itemsize
    row = spec.hidden + scale if travels_as_int8(spec) else spec.hidden * int(spec.dtype.itemsize)
    weight = (sent_dtype if _is_packed(spec) else weights_dtype)(spec, deployment)
    return row + spec.top_k * (WORD.itemsize + weight.itemsize)


def _is_packed(spec: BlockSpec) -> bool:
    """Whether ids, weights and scales travel as columns of one tensor."""
    return travels_as_int8(spec) or spec.has_mask or spec.max_tokens > 0


def emit_partial(block: Block, emit: Emitter, deployment: Deployment) -> Partial:
    """Everything up to the sums of one rank. The dispatch stage stands where the routing weights exist."""
    spec = block.spec
    start = stage_after(block, block.weights)
    with emit.at(start, block.dispatch):
        tokens, own = _gather(emit, block, deployment)
        rows, index, counts, row_scale = _route_rows(emit, block, tokens, deployment)
    with emit.at(max(block.mlp, start), block.mlp):
        y_rows = emit_mlp(emit, block, rows, row_scale, counts, deployment)
    with emit.at(block.combine, block.combine):
        some_absent = spec.ep_size > 1 or spec.has_mask or spec.zero_experts > 0
        if some_absent and not takes_no_row(deployment):
            index = _zero_last_row(emit, y_rows, index, counts, spec)
        y = emit_combine(emit, y_rows, index, tokens.weights, deployment, some_absent)
    return Partial(y, own, counts)


def _gather(emit: Emitter, block: Block, deployment: Deployment) -> tuple[GatheredTokens, Node]:
    """The tokens of all ranks, and this rank's own."""
    spec, own_tokens = block.spec, OwnTokens(emit, block, deployment)
    x, scale = quantise_tokens(emit, block, own_tokens)
    mask = None
    if block.mask is not None:
        flat = own_tokens.of(emit.call(aten.reshape.default, block.mask, [-1]))
        mask = emit.call(aten.unsqueeze.default, flat, 1)
    tokens = GatheredTokens(x, scale, own_tokens.of(emit.rows(block.ids)), own_tokens.of(emit.rows(block.weights)))
    own, dtype = x, weights_dtype(spec, deployment)
    if spec.ep_size == 1:
        return _cast(emit, tokens if mask is None else _mask_tokens(emit, tokens, mask, spec), dtype), own
    if not _is_packed(spec):
        weights = emit.cast(tokens.weights, dtype)  # before they are copied to every rank
        parts = [_all_gather(emit, node, spec) for node in (x, tokens.ids, weights)]
        return GatheredTokens(parts[0], None, *parts[1:]), own
    columns = pack_columns(emit, tokens.ids, tokens.weights, scale, sent_dtype(spec, deployment))
    if mask is not None:
        columns = emit.call(aten.where.self, mask, columns, empty_columns(emit, columns, spec))
    if spec.max_tokens:
        x, columns = (
            _fill(emit, x, _zeros(emit, x), spec),
            _fill(emit, columns, empty_columns(emit, columns, spec), spec),
        )
    everyone = _all_gather(emit, x, spec)
    columns = _all_gather(emit, columns, spec)
    ids, weights, scale = unpack_columns(emit, columns, spec, deployment, scale is not None)
    return GatheredTokens(everyone, scale, ids, weights), own


def _cast(emit: Emitter, tokens: GatheredTokens, dtype: torch.dtype) -> GatheredTokens:
    return dataclasses.replace(tokens, weights=emit.cast(tokens.weights, dtype))


def _mask_tokens(emit: Emitter, tokens: GatheredTokens, mask: Node, spec: BlockSpec) -> GatheredTokens:
    """Masked tokens get no expert, and weight 0: theirs may be NaN, and NaN * 0 is NaN."""
    value = tokens.weights.meta["val"]
    zero = emit.constant(aten.full.default, [], 0.0, dtype=value.dtype, device=value.device, pin_memory=False)
    return dataclasses.replace(
        tokens,
        ids=emit.call(aten.where.self, mask, tokens.ids, ids_of_no_expert(emit, tokens.ids, spec)),
        weights=emit.call(aten.where.self, mask, tokens.weights, zero),
    )


def _zeros(emit: Emitter, model: Node) -> Node:
    """A token of zeros."""
    value = model.meta["val"]
    return emit.constant(
        aten.full.default,
        [int(n) for n in value.shape[1:]],
        0,
        dtype=value.dtype,
        device=value.device,
        pin_memory=False,
    )


def _fill(emit: Emitter, node: Node, token: Node, spec: BlockSpec) -> Node:
    """Tokens of this rank filled up to its share of ``max_tokens``: their number must be the same on every rank.

    Where T varies the filler is that long, and cut: a filler of symbolic length would add a guard.
    """
    own, most = node.meta["val"].shape[0], tokens_per_rank(spec.max_tokens, spec)
    missing = most - own if isinstance(own, int) else most
    if isinstance(own, int) and missing <= 0:
        return node  # more than declared never gets here: the graph refuses to run
    filler = emit.constant(aten.expand.default, token, [missing, *(int(n) for n in token.meta["val"].shape)])
    filled = emit.call(aten.cat.default, [node, filler])
    return filled if isinstance(own, int) else emit.call(aten.slice.Tensor, filled, 0, 0, most)


def _all_gather(emit: Emitter, node: Node, spec: BlockSpec) -> Node:
    whole = emit.in_one_piece(node)
    gathered = emit.call(c10d.all_gather_into_tensor.default, whole, spec.ep_size, spec.ep_group)
    return emit.call(c10d.wait_tensor.default, gathered)


def _route_rows(
    emit: Emitter, block: Block, tokens: GatheredTokens, deployment: Deployment
) -> tuple[Node, Node, Node, Node | None]:
    """(rows by expert, row index of each slot or -1, counts of this rank's experts, scales of int8 rows)."""
    spec = block.spec
    first = deployment.own_rank("ep") * spec.local_experts
    kept = [first, first + spec.local_experts]
    smooth = block.x_smooth
    if smooth is not None and spec.ep_size > 1:
        smooth = emit.call(aten.slice.Tensor, smooth, 0, *kept)
    arguments = route_arguments(tokens.x, tokens.ids, tokens.scale, _ids(spec), kept, smooth)
    routed = emit_call(emit, ROUTE, arguments)
    rows, index, counts = (emit.item(routed, i) for i in range(3))
    scale = None if tokens.scale is None and smooth is None else emit.item(routed, 3)
    if _has_unused_rows(spec):
        # a token has at most E_local slots here: the remaining rows are never filled
        most = _row_bound(emit, tokens.x, spec, deployment)
        rows = emit.call(aten.slice.Tensor, rows, 0, 0, most)
        scale = scale if scale is None else emit.call(aten.slice.Tensor, scale, 0, 0, most)
    return rows, index, counts, scale


def _has_unused_rows(spec: BlockSpec) -> bool:
    """Whether there are more slots than rows that can be filled: then one of those is kept, to stand for no row."""
    return spec.top_k > spec.local_experts and spec.ep_size > 1


def _row_bound(emit: Emitter, x: Node, spec: BlockSpec, deployment: Deployment) -> Any:
    """tokens * E_local: all rows that can be valid; and one that never is, unless an operator has an index for that."""
    tokens, spare = emit.size(x, 0), int(deployment.unpermute_operator != FINALIZE_ROUTING)
    if isinstance(tokens, int):
        return tokens * spec.local_experts + spare
    bound = emit.call(operator.mul, tokens, spec.local_experts)
    return emit.call(operator.add, bound, 1) if spare else bound


def _zero_last_row(emit: Emitter, rows: Node, index: Node, counts: Node, spec: BlockSpec) -> Node:
    """The last row to zero where it is not valid, in place; the row index with -1 as the last row.

    The remainder is exact: a row takes at least 2 KiB on every SoC, so that no memory holds the 2**24 rows from which an
    int32 would not survive an operator that computes in float32.
    """
    total = emit.size(rows, 0)
    last = emit.call(aten.slice.Tensor, rows, 0, -1, sys.maxsize)
    if _has_unused_rows(spec):
        emit.call(aten.fill_.Scalar, last, 0)
    else:
        absent = emit.call(aten.lt.Scalar, emit.call(aten.sum.default, counts), total)
        emit.call(aten.masked_fill_.Scalar, last, absent, 0)
    return emit.call(aten.remainder.Scalar, index, max(total, 1) if isinstance(total, int) else total)
