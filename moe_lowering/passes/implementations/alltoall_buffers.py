"""AllToAll with equal splits by row, where ``max_rows`` is few: every rank sends every other one a buffer of the same
size, so nothing is sized by data.

    init_routing_v2 (sort by expert) > fill the buffers > all_to_all(counts), all_to_all(rows) > init_routing_v2 (sort
    by local expert) > MLP > back to the order of arrival > all_to_all > token_unpermute

Rank s sends rank d the rows for d's experts, in order of expert, in the first lines of a buffer of C = M *
min(k, E_local) lines: a token has at most that many experts on one rank, so they always fit. With ``max_rows`` a
buffer is no longer than that, since no rank then receives more rows from all ranks together; should the promise be
broken all the same, the results of tokens whose rows did not fit are NaN, not garbage.
The receiver learns from the counts which lines are rows: line c of source s belongs to the first local expert whose
running count exceeds c, and to none past the last; those lines are outside of the second sort's range. Rows then are in
the generic order, by local expert, source and token.
Collectives get one-dimensional tensors: the kernel that torch_npu puts in their place inside graphs takes element counts
as row counts when there are more dimensions (torch_npu 2.13.0, npugraph_ex/ops).
Sources: vllm_ascend.token_dispatcher: the exact-split form; ops_transformer.init_routing.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.limits.calls.tensors import data_dependent
from moe_lowering.number_words import megabytes
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.implementations.base import Form, Replacement
from moe_lowering.passes.implementations.gathered import (
    ROUTE,
    gathered_bytes,
    route_arguments,
    route_call,
)
from moe_lowering.passes.implementations.mc2 import zero_masked_rows
from moe_lowering.passes.implementations.mlp import emit_mlp, mlp_calls
from moe_lowering.passes.implementations.quantised_calls import tokens_calls
from moe_lowering.passes.implementations.quantised_mlp import quantise_tokens
from moe_lowering.passes.implementations.tensor_parallel import OwnTokens, gather, tokens_per_rank
from moe_lowering.passes.implementations.unpermute import combine_calls, emit_combine, unpermute_words
from moe_lowering.passes.operator_calls import OperatorCall, Premises, Rules, emit_call

c10d = torch.ops._c10d_functional


def capacity(tokens: Any, spec: BlockSpec) -> Any:
    """C, the lines of one buffer, for T = ``tokens``; symbolic when that is."""
    most = tokens_per_rank(spec.max_tokens or tokens, spec) * min(spec.top_k, spec.local_experts)
    return torch.sym_min(most, spec.max_rows) if spec.max_rows else most


def padding_note(spec: BlockSpec, deployment: Deployment, tokens: int) -> str:
    """What equal splits cost, for the report: what one rank sends, with scales and counts, and what AllGather moves."""
    out, back = _line_bytes(spec)
    lines, own = spec.ep_size * int(capacity(tokens, spec)), tokens_per_rank(tokens, spec) * spec.top_k
    sent = lines * out + spec.experts * _COUNT_BYTES, lines * back
    gathered = spec.ep_size * tokens_per_rank(spec.max_tokens or tokens, spec)
    other = gathered * gathered_bytes(spec, deployment), gathered * back
    return (
        f"equal splits send {megabytes(sent[0])} per rank to the experts and {megabytes(sent[1])} back at {tokens} "
        f"tokens, of which {megabytes(own * out)} and {megabytes(own * back)} are rows; AllGather moves "
        f"{megabytes(other[0])} and {megabytes(other[1])}"
        + (
            ""
            if sum(sent) <= sum(other)
            else ", which is less: equal splits are a bad choice here, unless max_rows lowers C"
        )
    )


_COUNT_BYTES = 8  # of an expert's count, int64
_SCALE_BYTES = 4  # of an int8 row, float32


def _line_bytes(spec: BlockSpec) -> tuple[int, int]:
    """Bytes of one line to the experts, where it may be int8 with a scale, and back, in the block's dtype."""
    back = spec.hidden * int(spec.dtype.itemsize)
    return (spec.hidden + _SCALE_BYTES if spec.format.int8_rows else back), back


def _calls(spec: BlockSpec, deployment: Deployment) -> tuple[OperatorCall | Rules, ...]:
    rules = Rules("alltoall.buffers", lambda premises: _rules(spec, deployment, premises))
    return (
        rules,
        *tokens_calls(spec),
        route_call(spec, spec.top_k, _ids(spec), [0, spec.experts]),
        route_call(spec, 1, spec.local_experts + 1, [0, spec.local_experts]),
        *mlp_calls(spec, deployment),
        *combine_calls(
            spec,
            deployment,
            lambda tokens: tokens_per_rank(tokens, spec),
            lambda tokens: spec.ep_size * capacity(tokens, spec),
        ),
    )


def _rules(spec: BlockSpec, deployment: Deployment, premises: Premises) -> dict[str, Any]:
    return {
        **unpermute_words(spec, deployment),
        "tokens": tokens_per_rank(premises.tokens, spec),
        "has_x_smooth": spec.has_x_smooth,
        "zero_experts": spec.zero_experts,
        "data_dependent_capacity": sized_by_data(spec, premises),
    }


def sized_by_data(spec: BlockSpec, premises: Premises) -> bool:
    """Whether equal splits would be as long as a size that depends on what tensors hold."""
    return not spec.max_tokens and data_dependent([premises.own_tokens])


def _ids(spec: BlockSpec) -> int:
    """How many ids there are: those of the experts, and past them those of masked tokens."""
    return spec.experts + (spec.top_k if spec.has_mask else 0)


@dataclasses.dataclass
class _Outbox:
    """Where this rank's rows stand in its buffers.

    Attributes:
        capacity: C, an int or a node.
        sent: [E] rows for each expert. start: [ep] place of each rank's first row in sorted order.
        place: [M * k] place of each slot in sorted order, -1 for masked ones.
    """

    capacity: Any
    sent: Node
    start: Node
    place: Node
    rank: Node


class _Exchange:
    """The emission of one block: what all steps share."""

    def __init__(self, block: Block, emit: Emitter, deployment: Deployment) -> None:
        self.block, self.emit, self.deployment, self.spec = block, emit, deployment, block.spec
        self.own_tokens = OwnTokens(emit, block, deployment)
        self.lines: Node  # [C] 0, 1, ...
        self.make: Callable[..., Node]  # makes nodes of C and of nothing else

    def times(self, size: Any, factor: int) -> Any:
        return size * factor if isinstance(size, int) else self.emit.call(operator.mul, size, factor)

    def route(self, x: Node, ids: Node, scale: Node | None, experts: int, kept: int) -> tuple[Node, ...]:
        """init_routing_v2: rows in order of expert, place of each slot or -1, counts of the first ``kept`` experts, scales."""
        routed = emit_call(self.emit, ROUTE, route_arguments(x, ids, scale, experts, [0, kept]))
        return tuple(self.emit.item(routed, i) for i in range(3 if scale is None else 4))

    def swap(self, node: Node, each: Any) -> Node:
        """all_to_all of a tensor whose ``each`` elements per rank go to that rank; the same shape."""
        emit, shape = self.emit, node.meta["val"].shape
        flat = node if len(shape) == 1 else emit.call(aten.reshape.default, node, [-1])
        splits = [each] * self.spec.ep_size
        swapped = emit.call(c10d.all_to_all_single.default, flat, splits, splits, self.spec.ep_group)
        arrived = emit.call(c10d.wait_tensor.default, swapped)
        return arrived if len(shape) == 1 else emit.call(aten.reshape.default, arrived, [-1, int(shape[1])])

    def send(self) -> tuple[Node, Node | None, _Outbox]:
        """(arrived rows [ep * C, H], their scales, where this rank's own rows went)."""
        emit, spec = self.emit, self.spec
        x, scale = quantise_tokens(emit, self.block, self.own_tokens)
        ids = self.own_tokens.of(emit.rows(self.block.ids))
        if self.block.mask is not None:
            ids = self._mask(ids)
        rows, place, sent, *scales = self.route(x, ids, scale, _ids(spec), spec.experts)
        size, self.make = self._capacity(x)
        device = x.meta["val"].device
        self.lines = self.make(aten.arange.default, size, dtype=torch.int64, device=device, pin_memory=False)
        to_rank = emit.call(aten.sum.dim_IntList, emit.call(aten.reshape.default, sent, [spec.ep_size, -1]), [1])
        start = emit.call(aten.sub.Tensor, emit.call(aten.cumsum.default, to_rank, 0), to_rank)
        source = emit.call(aten.add.Tensor, emit.call(aten.unsqueeze.default, start, 1), self.lines)
        last = self.times(emit.size(x, 0), spec.top_k)
        last = last - 1 if isinstance(last, int) else emit.call(operator.sub, last, 1)
        source = emit.call(aten.reshape.default, emit.call(aten.clamp.default, source, None, last), [-1])
        arrived = self.swap(emit.call(aten.index_select.default, rows, 0, source), self.times(size, spec.hidden))
        swapped = [self.swap(emit.call(aten.index_select.default, each, 0, source), size) for each in scales]
        rank = emit.call(aten.floor_divide.default, emit.call(aten.reshape.default, ids, [-1]), spec.local_experts)
        return arrived, swapped[0] if swapped else None, _Outbox(size, sent, start, place, rank)

    def _capacity(self, x: Node) -> tuple[Any, Callable[..., Node]]:
        """C, and what makes nodes of it alone (``size_and_maker``)."""
        spec = self.spec
        if spec.max_tokens or isinstance(spec.tokens, int):
            return int(capacity(spec.tokens, spec)), self.emit.constant
        tokens, make = self.emit.size_and_maker(x, 0)
        size = make(operator.mul, tokens, min(spec.top_k, spec.local_experts))
        return make(torch.sym_min, size, spec.max_rows) if spec.max_rows else size, make

    def _mask(self, ids: Node) -> Node:
        """Masked tokens get ids past the last expert, which are outside of the sort's range."""
        emit, spec, value = self.emit, self.spec, ids.meta["val"]
        mask = self.own_tokens.of(emit.call(aten.reshape.default, self.block.mask, [-1]))
        nowhere = emit.constant(
            aten.arange.start,
            spec.experts,
            spec.experts + spec.top_k,
            dtype=value.dtype,
            device=value.device,
            pin_memory=False,
        )
        return emit.call(aten.where.self, emit.call(aten.unsqueeze.default, mask, 1), ids, nowhere)

    def sort(self, arrived: Node, scale: Node | None, outbox: _Outbox) -> tuple[Node, Node, Node, Node | None]:
        """(rows by local expert, place of each line or -1, counts, scales)."""
        emit, spec = self.emit, self.spec
        counts = self.swap(outbox.sent, spec.local_experts)
        ends = emit.call(aten.cumsum.default, emit.call(aten.reshape.default, counts, [spec.ep_size, 1, -1]), 2)
        line = self.make(aten.unsqueeze.default, self.lines, 1)
        expert = emit.call(aten.sum.dim_IntList, emit.call(aten.ge.Tensor, line, ends), [2])
        expert = emit.call(aten.reshape.default, emit.cast(expert, torch.int32), [-1, 1])
        rows, place, counts, *scales = self.route(arrived, expert, scale, spec.local_experts + 1, spec.local_experts)
        return rows, place, counts, scales[0] if scales else None

    def bring_home(self, y_rows: Node, place: Node, outbox: _Outbox) -> Node:
        """Results in their tokens' order, weighted and summed: [M, H]."""
        emit, spec = self.emit, self.spec
        lines = emit.call(aten.index_select.default, y_rows, 0, emit.call(aten.clamp.default, place, 0))
        home = self.swap(lines, self.times(outbox.capacity, spec.hidden))
        device = place.meta["val"].device
        first = emit.constant(aten.arange.default, spec.ep_size, dtype=torch.int64, device=device, pin_memory=False)
        first = self.make(aten.mul.Tensor, first, outbox.capacity)
        # masked slots have ids past the last rank's: any rank will do, they are selected to zero in the end
        rank = emit.call(aten.clamp.default, outbox.rank, None, spec.ep_size - 1)
        offset = emit.call(aten.index_select.default, emit.call(aten.sub.Tensor, first, outbox.start), 0, rank)
        at = emit.call(aten.add.Tensor, outbox.place, offset)
        weights = self.own_tokens.of(emit.rows(self.block.weights))
        weights = self._poison(weights, outbox, at, first, rank) if spec.max_rows else weights
        last = emit.size(home, 0)
        last = last - 1 if isinstance(last, int) else emit.call(operator.sub, last, 1)
        at = emit.cast(emit.call(aten.clamp.default, at, 0, last), torch.int32)
        return emit_combine(emit, home, at, weights, self.deployment)

    def _poison(self, weights: Node, outbox: _Outbox, at: Node, first: Node, rank: Node) -> Node:
        """Weights with NaN where a row did not fit into its buffer."""
        emit = self.emit
        line = emit.call(aten.sub.Tensor, at, emit.call(aten.index_select.default, first, 0, rank))
        fits = emit.call(aten.lt.Scalar, line, outbox.capacity)
        fits = emit.call(aten.reshape.default, fits, [-1, self.spec.top_k])
        value = weights.meta["val"]
        nan = emit.constant(
            aten.full.default, [], float("nan"), dtype=value.dtype, device=value.device, pin_memory=False
        )
        return emit.call(aten.where.self, fits, weights, nan)


def _emit(block: Block, emit: Emitter, deployment: Deployment, premises: Premises) -> Replacement:
    run = _Exchange(block, emit, deployment)
    with emit.at(block.dispatch, block.dispatch):
        arrived, scale, outbox = run.send()
        rows, place, counts, row_scale = run.sort(arrived, scale, outbox)
    with emit.at(block.mlp, block.mlp):
        y_rows = emit_mlp(emit, block, rows, row_scale, counts, deployment)
    with emit.at(block.combine, block.combine):
        y = run.bring_home(y_rows, place, outbox)
        if block.mask is not None:
            y = zero_masked_rows(emit, y, run.own_tokens.of(emit.call(aten.reshape.default, block.mask, [-1])))
        return Replacement(emit.like(gather(emit, block, y), block.x), counts)


def _row_count(spec: BlockSpec, tokens: Any) -> Any:
    return capacity(tokens, spec)


BUFFERS = Form("buffers", _calls, _emit, padding_note, _row_count, sends_masks=False, keeps_max_rows=True)
