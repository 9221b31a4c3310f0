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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lowering.custom_ops import dispatch, grouped_mlp
from moe_lowering.custom_ops.combine import send_back, weighted_sum
from moe_lowering.custom_ops.dispatch import DTYPES, FIELDS, agree, exchange, fits
from moe_lowering.custom_ops.exchange import ALONE, Group, open_group
from moe_lowering.custom_ops.fused import zero_masked
from moe_lowering.custom_ops.library import register
from moe_lowering.custom_ops.npu_grouped_mlp import npu_grouped_mlp
from moe_lowering.custom_ops.sizes import differ, row_bound, show, unify
from moe_lowering.vocabulary import EXPERT_FORMATS

NAME = "alltoall_experts"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor? x_scale, Tensor ids, Tensor weights, Tensor? mask, Tensor[] w13, Tensor[] w2, "
    "Tensor[] w13_bias, Tensor[] w2_bias, str activation, float limit, float alpha, bool interleaved, "
    "str quantisation, Tensor[]? w13_scale, Tensor[]? w2_scale, Tensor[]? w13_offset, Tensor[]? w2_offset, "
    "Tensor[]? w13_scale_bias, Tensor[]? w2_scale_bias, ScalarType? out_dtype, int num_experts, str ep_group, "
    "int ep_size, int max_tokens, int max_rows) -> (Tensor y, Tensor counts)"
)
Tensors = Sequence[Tensor]


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call, in the order of the schema. ``experts`` are those that ``grouped_mlp`` takes too."""

    x: Tensor
    x_scale: Tensor | None
    ids: Tensor
    weights: Tensor
    mask: Tensor | None
    w13: Tensors
    w2: Tensors
    w13_bias: Tensors
    w2_bias: Tensors
    activation: str
    limit: float
    alpha: float
    interleaved: bool
    quantisation: str
    w13_scale: Tensors | None
    w2_scale: Tensors | None
    w13_offset: Tensors | None
    w2_offset: Tensors | None
    w13_scale_bias: Tensors | None
    w2_scale_bias: Tensors | None
    out_dtype: torch.dtype | None
    num_experts: int
    ep_group: str
    ep_size: int
    max_tokens: int
    max_rows: int

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ep_size

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    @property
    def bound(self) -> tuple[int, str]:
        """How many rows a rank may receive, and where that comes from."""
        rows = row_bound(self.x.shape[0], self.top_k, self.num_experts, self.ep_size, 1, self.max_tokens, self.max_rows)
        return rows, f"R = {rows}" + (f" (max_rows is {self.max_rows})" if self.max_rows else "")

    @property
    def experts(self) -> tuple[Any, ...]:
        names = [field.name for field in dataclasses.fields(self)]
        first, last = names.index("w13"), names.index("out_dtype")
        return tuple(getattr(self, name) for name in names[first : last + 1])

    def empty(self, rows: int) -> tuple[Tensor, Tensor]:
        """Rows and their scales, of which there are none for rows without scales, as they would leave ``dispatch``."""
        scales = 0 if self.x_scale is None else rows
        return self.x.new_empty((rows, self.x.shape[1])), self.x.new_empty((scales,), dtype=torch.float32)


@contextlib.contextmanager
def _as_ours(operator: str) -> Iterator[None]:
    """Errors of another operator's checks, in this one's name."""
    try:
        yield
    except (NotImplementedError, TypeError, ValueError) as error:
        raise type(error)(f"{NAME}: {str(error).removeprefix(f'{operator}: ')}") from None


def _check(call: Call) -> torch.dtype:
    """The dtype of y, when nothing is wrong that can be seen without data."""
    x, ids, weights = call.x, call.ids, call.weights
    if x.dim() != 2:
        raise ValueError(f"{NAME}: x has shape {show(x.shape)}; accepted: [M, hidden]")
    with _as_ours("dispatch"):
        dispatch._check(
            x, call.x_scale, ids, call.mask, call.num_experts, call.ep_group, call.ep_size, "", 1, call.max_tokens,
            call.max_rows,
        )  # fmt: skip
    if weights.dtype != torch.float32:
        raise TypeError(f"{NAME}: weights is {weights.dtype}; accepted: float32")
    if differ(weights.shape, ids.shape):
        raise ValueError(f"{NAME}: weights has shape {show(weights.shape)}; accepted: that of ids, {show(ids.shape)}")
    counts = x.new_empty((call.local_experts,), dtype=torch.int64)
    with _as_ours("grouped_mlp"):
        return grouped_mlp._fake(*call.empty(1), counts, *call.experts).dtype


def _fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    call = Call(*arguments, **named)
    dtype = _check(call)
    for tensor in (call.ids, call.weights, call.x_scale, call.mask):
        if tensor is not None:
            unify(tensor.shape[:1], call.x.shape[:1])
    return (
        call.x.new_empty(call.x.shape, dtype=dtype),
        call.x.new_empty((call.local_experts,), dtype=torch.int64),
    )


def _cpu(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """The same as the three generic operators over gloo. Mistakes in ids and sizes raise on all ranks alike."""
    call = Call(*arguments, **named)
    _check(call)
    ep, (rows, rows_name) = open_group(NAME, "ep", call.ep_group, call.ep_size), call.bound
    received = exchange(
        NAME, call.x, call.x_scale, call.ids, call.mask, call.num_experts, ep, ALONE, limit=rows, limit_name=rows_name,
        max_tokens=call.max_tokens, equal_tokens=not call.max_tokens,
    )  # fmt: skip
    scale = call.empty(0)[1] if received.scale is None else received.scale
    result = grouped_mlp._cpu(received.rows, scale, received.counts, *call.experts)
    kept = None if call.mask is None else call.mask.nonzero().squeeze(1)
    expected = call.top_k * (call.ids.shape[0] if kept is None else kept.numel())
    returned, slots = send_back(NAME, result, received.handle, call.top_k, expected, ep)
    return weighted_sum(NAME, returned, slots, call.weights, kept), received.counts


# ---------------------------------------------------------------------------------------------------------------- device


def _npu(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """The device's kernel; see the top of this file.

    Raises:
        RuntimeError: a graph is being captured; a rank would receive more than ``max_rows`` rows (on all ranks).
        TypeError: quantised weights and a result that is not in 16 bits.
        ValueError: an id outside [0, num_experts), or T that breaks what ``max_tokens`` says (on all ranks). Ids that
            are twice in one row are not looked for: both count.
    """
    call = Call(*arguments, **named)
    _refuse_capture()
    dtype = _check(call)
    _check_device(call, dtype)
    ep = open_group(NAME, "ep", call.ep_group, call.ep_size)
    outbox = _sort_by_expert(call)
    send, receive, arriving = _tell(call, outbox, ep)
    total, slots = sum(receive), call.ids.numel()
    arrived = _swap(outbox.rows, send, receive, total, ep)
    scale = None if outbox.scale is None else _swap(outbox.scale, send, receive, total, ep)
    counts = arriving.sum(0)
    result = _run_experts(call, arrived, scale, arriving, counts, dtype)
    home = _swap(result, receive, send, slots, ep)
    if not slots:
        return home, counts
    # Slots of masked tokens have the index -1: any row will do for them, as they are selected to zero afterwards.
    index = outbox.place if call.mask is None else outbox.place.clamp(min=0)
    y = torch.ops.npu.npu_moe_token_unpermute(home, index, call.weights.to(dtype))
    return zero_masked(y, call.mask), counts


def _refuse_capture() -> None:
    npu = getattr(torch, "npu", None)
    if npu is not None and npu.is_current_stream_capturing():
        raise RuntimeError(
            f"{NAME}: called during the capture of a graph, which would keep the numbers of rows that it needs on the "
            "host; accepted: eager execution. Declare Deployment.capture=True for AllToAll with static sizes"
        )


def _check_device(call: Call, dtype: torch.dtype) -> None:
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


def _sort_by_expert(call: Call) -> _Outbox:
    x, scale, ids = call.x, call.x_scale, call.ids
    if not ids.numel():
        rows, scales = call.empty(0)
        quantised = EXPERT_FORMATS[call.quantisation].int8_rows
        counts = ids.new_zeros((call.num_experts,), dtype=torch.int64)
        return _Outbox(
            rows.to(torch.int8) if quantised else rows, scales if quantised else None, ids.new_empty((0,)), counts,
            counts.new_zeros((3,)),
        )  # fmt: skip
    if scale is None and EXPERT_FORMATS[call.quantisation].int8_rows:
        x, scale = torch.ops.npu.npu_dynamic_quant(x)
    outside = (ids < 0) | (ids >= call.num_experts)
    elsewhere = outside
    if call.mask is not None:
        masked = ~call.mask.unsqueeze(1)
        outside, elsewhere = outside & ~masked, outside | masked
    slot = outside.reshape(-1).float().argmax().reshape(1)
    fault = torch.cat([outside.any().reshape(1).long(), slot // call.top_k, ids.reshape(-1)[slot].long()])
    # Ids past the last expert are outside of the range that is kept.
    ids = ids.masked_fill(elsewhere, call.num_experts)
    rows, place, counts, scales = _route(x, ids, scale, call.num_experts + 1, call.num_experts)
    return _Outbox(rows, None if scale is None else scales, place, counts, fault)


def _route(x: Tensor, ids: Tensor, scale: Tensor | None, experts: int, kept: int) -> tuple[Tensor, ...]:
    """Rows in order of expert, the row of each slot or -1, counts of the first ``kept`` experts, scales."""
    return torch.ops.npu.npu_moe_init_routing_v2(
        x, ids, scale=scale, expert_num=experts, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[0, kept],
    )  # fmt: skip


def _tell(call: Call, outbox: _Outbox, ep: Group) -> tuple[list[int], list[int], Tensor]:
    """Tell all ranks what this one sends, and learn what they do.

    Returns:
        Rows to send to each rank, to receive from each, and on the device [ep, E_local] those from each rank for each
        local expert.
    """
    x, ids = call.x, call.ids
    width = x.shape[1] * x.element_size() + (0 if call.x_scale is None else 4)
    # Filled on the device: a copy from the host would wait for it.
    before, after = ((ids.shape[0], -1), (call.top_k, width, DTYPES.index(x.dtype)))
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
    fits(NAME, by_rank.sum((0, 2)).tolist(), *call.bound)
    arriving = everyone[:, FIELDS:].reshape(ep.size, ep.size, -1)[:, ep.rank]
    return by_rank[ep.rank].sum(1).tolist(), by_rank[:, ep.rank].sum(1).tolist(), arriving


def _swap(rows: Tensor, send: list[int], receive: list[int], lines: int, ep: Group) -> Tensor:
    """The first rows to rank 0, ...: what arrives, by source rank, in the first of ``lines`` lines."""
    arrived = rows.new_empty((lines, *rows.shape[1:]))
    here, sent = arrived[: sum(receive)], rows[: sum(send)]
    if ep.size == 1:
        here.copy_(sent)
    else:
        dist.all_to_all_single(here, sent, receive, send, group=ep.handle)
    return arrived


def _run_experts(
    call: Call, arrived: Tensor, scale: Tensor | None, arriving: Tensor, counts: Tensor, dtype: torch.dtype
) -> Tensor:
    """Results of the rows, in the order in which those arrived: by source rank, local expert, token."""
    total = arrived.shape[0]
    if not total:
        return arrived.new_empty(arrived.shape, dtype=dtype)
    experts, unscaled = (*call.experts[:-1], dtype), call.empty(0)[1]
    if call.local_experts == 1:
        return npu_grouped_mlp(arrived, unscaled if scale is None else scale, counts, *experts)
    expert = torch.arange(call.local_experts, dtype=torch.int32, device=arrived.device).repeat(call.ep_size)
    expert = expert.repeat_interleave(arriving.reshape(-1), output_size=total).unsqueeze(1)
    rows, place, _, scales = _route(arrived, expert, scale, call.local_experts, call.local_experts)
    return npu_grouped_mlp(rows, unscaled if scale is None else scales, counts, *experts).index_select(0, place)


register(SCHEMA, cpu=_cpu, fake=_fake, npu=_npu, side_effect=True)
