"""``alltoall_experts``: dispatch, grouped MLP and combine in one, with exactly the rows that go to each rank.

Meaning: ``dispatch``, ``grouped_mlp`` and ``combine`` one after the other, without tensor parallelism: y [M, H] is zero
for masked tokens, counts [E_local] int64 are the rows of each local expert from all ranks. The sizes of what travels
depend on the ids, so this is one operator that a compiler does not look into, and it cannot be captured: a captured
graph would keep the sizes of the capture. The equal-split form of the AllToAll implementation is for that.

On an NPU, as vllm-ascend does it:

    [dynamic_quant >] init_routing_v2 > all_to_all(counts) > counts to the host > all_to_all([scales,] rows)
    > init_routing_v2 > grouped matmul, activation, grouped matmul > all_to_all(rows) > token_unpermute

What leaves the device is one tensor of counts, which every rank gets from all: all of them find the same mistakes and
raise the same errors, and one synchronisation with the host is enough. Rows are ordered as after ``dispatch``: by local
expert, source rank, token. No device operator gets an empty tensor, of which their documentation says nothing.
``torch.distributed``'s own collective takes row splits of 2-D tensors as it should; the kernel that torch_npu puts in its
place inside of graphs takes them for element counts and is not reached from here.
Sources: vllm_ascend.token_dispatcher: TokenDispatcherWithAll2AllV; wheel.all_to_all: the kernel inside of graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Generic

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import NamedTuple

from moe_lowering.custom_ops import dispatch, grouped_mlp
from moe_lowering.custom_ops.combine import send_back, weighted_sum
from moe_lowering.custom_ops.dispatch import DispatchCall
from moe_lowering.custom_ops.exchange import ALONE, Group, open_group
from moe_lowering.custom_ops.fused import zero_masked_rows
from moe_lowering.custom_ops.grouped_mlp import GroupedMlpCall
from moe_lowering.custom_ops.library import Value, register, schema_of
from moe_lowering.custom_ops.npu_grouped_mlp import npu_grouped_mlp
from moe_lowering.custom_ops.placement import Placement
from moe_lowering.custom_ops.sizes import are_certainly_different, show, unify
from moe_lowering.custom_ops.token_exchange import DTYPES, FIELDS, Bounds, TokenBatch, agree, exchange, fits
from moe_lowering.vocabulary import EXPERT_FORMATS


class AllToAllExpertsCall(NamedTuple, Generic[Value]):
    """The arguments of ``alltoall_experts``: x [M, H], and the others as in ``DispatchCall``, ``GroupedMlpCall`` and
    ``CombineCall``."""

    x: Value
    x_scale: Value | None
    ids: Value
    weights: Value
    mask: Value | None
    w13: Sequence[Value]
    w2: Sequence[Value]
    w13_bias: Sequence[Value]
    w2_bias: Sequence[Value]
    activation: str
    limit: float
    alpha: float
    interleaved: bool
    quantisation: str
    w13_scale: Sequence[Value] | None
    w2_scale: Sequence[Value] | None
    w13_offset: Sequence[Value] | None
    w2_offset: Sequence[Value] | None
    w13_scale_bias: Sequence[Value] | None
    w2_scale_bias: Sequence[Value] | None
    out_dtype: torch.dtype | None
    num_experts: int
    ep_group: str
    ep_size: int
    max_tokens: int
    max_rows: int

    @property
    def placement(self) -> Placement:
        return Placement(self.num_experts, self.ep_size)

    @classmethod
    def of(cls, experts: GroupedMlpCall[Value], **others: Any) -> AllToAllExpertsCall[Value]:
        """With the experts of a call of ``grouped_mlp``; ``others`` are the arguments that it does not have."""
        return cls(**others, **{name: getattr(experts, name) for name in _OF_GROUPED_MLP})

    def dispatch(self) -> DispatchCall[Value]:
        """The call of ``dispatch`` that this one stands for."""
        arguments = {name: getattr(self, name) for name in _OF_DISPATCH}
        return DispatchCall(**arguments, tp_group="", tp_size=1)

    def grouped_mlp(self, rows: Value, row_scale: Value, counts: Value) -> GroupedMlpCall[Value]:
        """The call of ``grouped_mlp`` with these rows."""
        arguments = {name: getattr(self, name) for name in _OF_GROUPED_MLP}
        return GroupedMlpCall(rows=rows, row_scale=row_scale, counts=counts, **arguments)


def _shared_with(other: Any) -> tuple[str, ...]:
    return tuple(name for name in other._fields if name in AllToAllExpertsCall._fields)


_OF_DISPATCH, _OF_GROUPED_MLP = _shared_with(DispatchCall), _shared_with(GroupedMlpCall)
NAME = "alltoall_experts"
SCHEMA = schema_of(NAME, AllToAllExpertsCall, "(Tensor y, Tensor counts)")


def _bounds(call: AllToAllExpertsCall[Tensor]) -> Bounds:
    """What the exchange may not exceed; rows as in ``dispatch``."""
    rows = call.placement.row_bound(call.max_tokens or call.x.shape[0], call.ids.shape[1], call.max_rows)
    name = f"R = {rows}" + (f" (max_rows is {call.max_rows})" if call.max_rows else "")
    return Bounds(rows, name, call.max_tokens, equal_tokens=not call.max_tokens)


def _empty(call: AllToAllExpertsCall[Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Rows and their scales, of which there are none for rows without scales, as they would leave ``dispatch``."""
    scales = 0 if call.x_scale is None else rows
    return call.x.new_empty((rows, call.x.shape[1])), call.x.new_empty((scales,), dtype=torch.float32)


@contextlib.contextmanager
def _errors_in_own_name(operator: str) -> Iterator[None]:
    """Errors of another operator's checks, in this one's name."""
    try:
        yield
    except (NotImplementedError, TypeError, ValueError) as error:
        raise type(error)(f"{NAME}: {str(error).removeprefix(f'{operator}: ')}") from None


def _check(call: AllToAllExpertsCall[Tensor]) -> torch.dtype:
    """The dtype of y, when nothing is wrong that can be seen without data."""
    x, ids, weights = call.x, call.ids, call.weights
    if x.dim() != 2:
        raise ValueError(f"{NAME}: x has shape {show(x.shape)}; accepted: [M, hidden]")
    with _errors_in_own_name("dispatch"):
        dispatch._check(call.dispatch())
    if weights.dtype != torch.float32:
        raise TypeError(f"{NAME}: weights is {weights.dtype}; accepted: float32")
    if are_certainly_different(weights.shape, ids.shape):
        raise ValueError(f"{NAME}: weights has shape {show(weights.shape)}; accepted: that of ids, {show(ids.shape)}")
    counts = x.new_empty((call.placement.local_experts,), dtype=torch.int64)
    with _errors_in_own_name("grouped_mlp"):
        return grouped_mlp._fake(call.grouped_mlp(*_empty(call, 1), counts)).dtype


def _fake(call: AllToAllExpertsCall[Tensor]) -> tuple[Tensor, Tensor]:
    dtype = _check(call)
    for tensor in (call.ids, call.weights, call.x_scale, call.mask):
        if tensor is not None:
            unify(tensor.shape[:1], call.x.shape[:1])
    return (
        call.x.new_empty(call.x.shape, dtype=dtype),
        call.x.new_empty((call.placement.local_experts,), dtype=torch.int64),
    )


def _cpu(call: AllToAllExpertsCall[Tensor]) -> tuple[Tensor, Tensor]:
    """The same as the three generic operators over gloo. Mistakes in ids and sizes raise on all ranks alike."""
    _check(call)
    ep, top_k = open_group(NAME, "ep", call.ep_group, call.ep_size), call.ids.shape[1]
    tokens = TokenBatch(call.x, call.ids, call.x_scale, call.mask)
    received = exchange(NAME, tokens, call.placement, ep, ALONE, _bounds(call))
    scale = _empty(call, 0)[1] if received.scale is None else received.scale
    result = grouped_mlp._cpu(call.grouped_mlp(received.rows, scale, received.counts))
    kept = None if call.mask is None else call.mask.nonzero().squeeze(1)
    expected = top_k * (call.ids.shape[0] if kept is None else kept.numel())
    returned, slots = send_back(NAME, result, received.handle, top_k, expected, ep)
    return weighted_sum(NAME, returned, slots, call.weights, kept), received.counts


# ---------------------------------------------------------------------------------------------------------------- device


def _npu(call: AllToAllExpertsCall[Tensor]) -> tuple[Tensor, Tensor]:
    """The device's kernel; see the top of this file.

    Raises:
        RuntimeError: a graph is being captured; a rank would receive more than ``max_rows`` rows (on all ranks).
        TypeError: quantised weights and a result that is not in 16 bits.
        ValueError: an id outside [0, num_experts), or T that breaks what ``max_tokens`` says (on all ranks). Ids that
            are twice in one row are not looked for: both count.
    """
    _refuse_capture()
    dtype = _check(call)
    _check_device(call, dtype)
    ep = open_group(NAME, "ep", call.ep_group, call.ep_size)
    outbox = _sort_by_expert(call)
    send, receive, arriving = _exchange_counts(call, outbox, ep)
    total, slots = sum(receive), call.ids.numel()
    arrived = _swap(outbox.rows, send, receive, total, ep)
    scale = None if outbox.scale is None else _swap(outbox.scale, send, receive, total, ep)
    counts = arriving.sum(0)
    result = _run_experts(call, arrived, scale, arriving, counts, dtype)
    home = _swap(result, receive, send, slots, ep)
    if not slots:
        return home, counts
    # Slots of masked tokens have the index -1 and may read any row: their results are selected to zero afterwards.
    index = outbox.place if call.mask is None else outbox.place.clamp(min=0)
    y = torch.ops.npu.npu_moe_token_unpermute(home, index, call.weights.to(dtype))
    return zero_masked_rows(y, call.mask), counts


def _refuse_capture() -> None:
    npu = getattr(torch, "npu", None)
    if npu is not None and npu.is_current_stream_capturing():
        raise RuntimeError(
            f"{NAME}: called during the capture of a graph, which would keep the numbers of rows that it needs on the "
            "host; accepted: eager execution. Declare Deployment.capture=True for AllToAll with static sizes"
        )


def _check_device(call: AllToAllExpertsCall[Tensor], dtype: torch.dtype) -> None:
    """What the device's operators want beyond the meaning of the generic ones."""
    if not EXPERT_FORMATS[call.quantisation].quantised:
        return
    if dtype not in grouped_mlp.HALVES:
        raise TypeError(
            f"{NAME}: the result is {dtype} for quantisation {call.quantisation!r}; accepted: float16 or bfloat16"
        )
    for name in ("w13", "w2"):
        if EXPERT_FORMATS[call.quantisation].has_scale_bias and not getattr(call, f"{name}_scale_bias"):
            raise ValueError(
                f"{NAME}: {name}_scale_bias is None for {call.quantisation!r}; accepted: 8 * sum over K of w * scale, which "
                "npu_grouped_matmul adds"
            )


@dataclasses.dataclass(frozen=True)
class _Outbox:
    """This rank's rows [M * k, H] in order of expert, those of masked tokens undefined at the end; scales alike.

    place: [M * k] int32, the row of each slot, -1 for those of masked tokens. counts: [num_experts] int64. fault:
    [3] int64 as in ``dispatch``'s: whether an id is out of range, its token, the id.
    """

    rows: Tensor
    scale: Tensor | None
    place: Tensor
    counts: Tensor
    fault: Tensor


def _sort_by_expert(call: AllToAllExpertsCall[Tensor]) -> _Outbox:
    x, scale, ids = call.x, call.x_scale, call.ids
    if not ids.numel():
        rows, scales = _empty(call, 0)
        quantised = EXPERT_FORMATS[call.quantisation].int8_rows
        counts = ids.new_zeros((call.num_experts,), dtype=torch.int64)
        return _Outbox(
            rows.to(torch.int8) if quantised else rows,
            scales if quantised else None,
            ids.new_empty((0,)),
            counts,
            counts.new_zeros((3,)),
        )
    if scale is None and EXPERT_FORMATS[call.quantisation].int8_rows:
        x, scale = torch.ops.npu.npu_dynamic_quant(x)
    outside = (ids < 0) | (ids >= call.num_experts)
    elsewhere = outside
    if call.mask is not None:
        masked = ~call.mask.unsqueeze(1)
        outside, elsewhere = outside & ~masked, outside | masked
    slot = outside.reshape(-1).float().argmax().reshape(1)
    fault = torch.cat([outside.any().reshape(1).long(), slot // ids.shape[1], ids.reshape(-1)[slot].long()])
    # Ids past the last expert are outside of the range that is kept.
    ids = ids.masked_fill(elsewhere, call.num_experts)
    rows, place, counts, scales = _route(x, ids, scale, call.num_experts + 1, call.num_experts)
    return _Outbox(rows, None if scale is None else scales, place, counts, fault)


def _route(x: Tensor, ids: Tensor, scale: Tensor | None, experts: int, kept: int) -> tuple[Tensor, ...]:
    """Rows in order of expert, the row of each slot or -1, counts of the first ``kept`` experts, scales."""
    return torch.ops.npu.npu_moe_init_routing_v2(
        x,
        ids,
        scale=scale,
        expert_num=experts,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, kept],
    )


def _exchange_counts(
    call: AllToAllExpertsCall[Tensor], outbox: _Outbox, ep: Group
) -> tuple[list[int], list[int], Tensor]:
    """Tell all ranks what this one sends, and learn what they do.

    Returns:
        Rows to send to each rank, to receive from each, and on the device [ep, E_local] those from each rank for each
        local expert.
    """
    x, ids = call.x, call.ids
    width = x.shape[1] * x.element_size() + (0 if call.x_scale is None else 4)
    # Filled on the device: a copy from the host would wait for it.
    before, after = ((ids.shape[0], -1), (ids.shape[1], width, DTYPES.index(x.dtype)))
    fill = [[ids.new_full((1,), n, dtype=torch.int64) for n in numbers] for numbers in (before, after)]
    numbers = torch.cat([*fill[0], outbox.fault, *fill[1], outbox.counts])
    everyone = numbers.new_empty((ep.size * numbers.numel(),))
    if ep.size == 1:
        everyone = numbers
    else:
        dist.all_to_all_single(everyone, numbers.repeat(ep.size), group=ep.handle)
    everyone = everyone.view(ep.size, -1)
    host = everyone.cpu()  # the one synchronisation with the host
    agree(NAME, host[:, :FIELDS].tolist(), call.num_experts, call.max_tokens, not call.max_tokens)
    by_rank = host[:, FIELDS:].view(ep.size, ep.size, -1)  # [source, destination, E_local]
    bounds = _bounds(call)
    fits(NAME, by_rank.sum((0, 2)).tolist(), bounds.rows, bounds.rows_name)
    arriving = everyone[:, FIELDS:].reshape(ep.size, ep.size, -1)[:, ep.rank]
    return by_rank[ep.rank].sum(1).tolist(), by_rank[:, ep.rank].sum(1).tolist(), arriving


def _swap(rows: Tensor, send: list[int], receive: list[int], lines: int, ep: Group) -> Tensor:
    """The first rows to rank 0, ...: what arrives, by source rank, in the first of ``lines`` lines."""
    arrived = rows.new_empty((lines, *rows.shape[1:]))
    target, sent = arrived[: sum(receive)], rows[: sum(send)]
    if ep.size == 1:
        target.copy_(sent)
    else:
        dist.all_to_all_single(target, sent, receive, send, group=ep.handle)
    return arrived


def _run_experts(
    call: AllToAllExpertsCall[Tensor],
    arrived: Tensor,
    scale: Tensor | None,
    arriving: Tensor,
    counts: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Results of the rows, in the order in which those arrived: by source rank, local expert, token."""
    total = arrived.shape[0]
    if not total:
        return arrived.new_empty(arrived.shape, dtype=dtype)
    local, unscaled = call.placement.local_experts, _empty(call, 0)[1]

    def run(rows: Tensor, scales: Tensor | None) -> Tensor:
        experts = call.grouped_mlp(rows, unscaled if scales is None else scales, counts)
        return npu_grouped_mlp(experts._replace(out_dtype=dtype))

    if local == 1:
        return run(arrived, scale)
    expert = torch.arange(local, dtype=torch.int32, device=arrived.device).repeat(call.ep_size)
    expert = expert.repeat_interleave(arriving.reshape(-1), output_size=total).unsqueeze(1)
    rows, place, _, scales = _route(arrived, expert, scale, local, local)
    return run(rows, None if scale is None else scales).index_select(0, place)


register(SCHEMA, AllToAllExpertsCall, cpu=_cpu, fake=_fake, npu=_npu, side_effect=True)
