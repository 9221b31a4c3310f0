"""torch.distributed's collectives (``c10d::``) on device "npu": over gloo now, or on the tape and at every replay.

Data moves as bytes, so that every dtype can. Reductions add in rank order, 16-bit floats in float32 and rounded once:
the result is the same bits on every rank. HCCL promises neither order nor rounding. A collective has finished when it
returns, so every ``Work`` is a finished one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork
from torch.distributed import ProcessGroup, ReduceOp

from moe_lowering.simulator.device import capture_state
from moe_lowering.simulator.device.hccl import SimulatedHccl
from moe_lowering.simulator.device.kernels import Kernel
from moe_lowering.simulator.device.memory import host_alias
from moe_lowering.simulator.standins import SimulatorError

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
_REDUCE: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    ReduceOp.SUM: lambda parts: _add_parts(parts),
    ReduceOp.AVG: lambda parts: _add_parts(parts) / len(parts),
    ReduceOp.MAX: lambda parts: parts.amax(0),
    ReduceOp.MIN: lambda parts: parts.amin(0),
    ReduceOp.PRODUCT: lambda parts: parts.prod(0),
}


def _add_parts(parts: torch.Tensor) -> torch.Tensor:
    return functools.reduce(torch.add, parts.unbind(0))


def _launch(name: str, group: Any, run: Callable[[Any], object]) -> Any:
    """Run a collective on the group's backend, now or at replay; a finished Work."""
    backend = ProcessGroup.unbox(group)._get_backend(torch.device("npu"))
    if not isinstance(backend, SimulatedHccl):
        raise SimulatorError(f"c10d::{name}: the group's backend for device npu is {type(backend).__name__}, not hccl")
    if capture_state.tape_in_progress(f"c10d::{name}") is None:
        run(backend)
    else:
        capture_state.record(f"c10d::{name}", lambda: run(backend))
    return FakeWork().boxed()


def _aliases(name: str, **tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of a collective on the host. torch_npu refuses what is in pieces ("Tensors must be contiguous")."""
    for argument, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise SimulatorError(
                f"c10d::{name}: {argument} has shape {list(tensor.shape)} and strides {list(tensor.stride())}; accepted: "
                "contiguous tensors, as torch_npu gives HCCL no others"
            )
    return [host_alias(tensor) for tensor in tensors.values()]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _gather_tensors(backend: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of every rank, of one shape, as [ranks, ...]."""
    own = _bytes(tensor)
    everyone = torch.empty((backend.size(), own.numel()), dtype=torch.uint8)
    backend.allgather([list(everyone.unbind(0))], [own]).wait()
    return everyone.view(-1).view(tensor.dtype).reshape(backend.size(), *tensor.shape)


def _swap_rows(backend: Any, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
    """All-to-all of rows, ``send[r]`` to rank r; [sum(receive), ...] by source rank."""
    row = tensor[:1].numel() if len(tensor) else tensor[0:0].new_empty(tensor.shape[1:]).numel()
    width = row * tensor.element_size()
    arrived = torch.empty(sum(receive) * width, dtype=torch.uint8)
    sizes = [n * width for n in receive], [n * width for n in send]
    backend.alltoall_base(arrived, _bytes(tensor), *sizes).wait()
    return arrived.view(tensor.dtype).reshape(sum(receive), *tensor.shape[1:])


def _reduce_parts(parts: torch.Tensor, reduce_op: Any) -> torch.Tensor:
    kind = reduce_op.op()
    for known, function in _REDUCE.items():
        if kind == known:
            return function(parts.to(_WIDE.get(parts.dtype, parts.dtype))).to(parts.dtype)
    raise SimulatorError(f"a reduction by {kind} is not simulated")


def allgather_base(output: torch.Tensor, input: torch.Tensor, group: Any, *_: Any) -> Any:
    out, own = _aliases("_allgather_base_", output=output, input=input)
    work = _launch("_allgather_base_", group, lambda b: _put(out, _gather_tensors(b, own)))
    return output, work


def _put(out: torch.Tensor, value: torch.Tensor) -> None:
    out.copy_(value.reshape(out.shape))


def allgather(outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], group: Any, *_: Any) -> Any:
    outs, (own,) = [host_alias(t) for t in _only(outputs)], _aliases("allgather_", input=_only(inputs))
    most = max(out.numel() for out in outs)  # tensors of ranks may differ in size, as in torch_npu

    def run(backend: Any) -> None:
        padded = own.new_zeros(most)
        padded[: own.numel()] = own.reshape(-1)
        for out, value in zip(outs, _gather_tensors(backend, padded), strict=True):
            _put(out, value[: out.numel()])

    return outputs, _launch("allgather_", group, run)


def allreduce(tensors: list[torch.Tensor], group: Any, reduce_op: Any, *_: Any) -> Any:
    (alias,) = _aliases("allreduce_", tensor=_only(tensors))
    work = _launch("allreduce_", group, lambda b: _put(alias, _reduce_parts(_gather_tensors(b, alias), reduce_op)))
    return tensors, work


def reduce_scatter_base(output: torch.Tensor, input: torch.Tensor, group: Any, reduce_op: Any, *_: Any) -> Any:
    out, own = _aliases("_reduce_scatter_base_", output=output, input=input)

    def run(backend: Any) -> None:
        ranks = backend.size()
        parts = _swap_rows(backend, own.reshape(ranks, *out.shape), [1] * ranks, [1] * ranks)
        _put(out, _reduce_parts(parts, reduce_op))

    return output, _launch("_reduce_scatter_base_", group, run)


def alltoall_base(
    output: torch.Tensor, input: torch.Tensor, group: Any, receive: list[int], send: list[int], *_: Any
) -> Any:
    out, own = _aliases("alltoall_base_", output=output, input=input)
    _refuse_unequal(send, receive)

    def run(backend: Any) -> None:
        sizes = [_sizes(t, split, backend.size()) for t, split in ((own, send), (out, receive))]
        _put(out, _swap_rows(backend, own, *sizes))

    return _launch("alltoall_base_", group, run)


def _refuse_unequal(send: list[int], receive: list[int]) -> None:
    """Splits that differ between ranks come from one routing, read on the host: a graph would send all others by them.

    Raises:
        CaptureError: a capture is under way, and there are such splits.
    """
    name = "c10d::alltoall_base_"
    if capture_state.tape_in_progress(name) is not None and any(len(set(splits)) > 1 for splits in (send, receive)):
        raise capture_state.refuse(
            name,
            f"has unequal splits, sent {list(send)} and received {list(receive)}: numbers of the host, which every "
            "replay would use; accepted: equal splits",
        )


def _sizes(tensor: torch.Tensor, split: list[int], ranks: int) -> list[int]:
    if split:
        if sum(split) != len(tensor):
            raise SimulatorError(f"c10d::alltoall_base_: split sizes {split} for {len(tensor)} rows")
        return list(split)
    if len(tensor) % ranks:
        raise SimulatorError(f"c10d::alltoall_base_: {len(tensor)} rows are not divisible by {ranks} ranks")
    return [len(tensor) // ranks] * ranks


def broadcast(tensors: list[torch.Tensor], group: Any, root_rank: int, root_tensor: int, *_: Any) -> Any:
    (alias,) = _aliases("broadcast_", tensor=_only(tensors))
    return tensors, _launch("broadcast_", group, lambda b: _put(alias, _gather_tensors(b, alias)[root_rank]))


def barrier(tensor: torch.Tensor, group: Any, *_: Any) -> Any:
    if capture_state.is_capturing():
        raise capture_state.refuse("c10d::barrier", "waits on the host")
    return _launch("barrier", group, lambda b: b.barrier().wait())


def allgather_coalesced(outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Any, *_: Any) -> Any:
    return [allgather_base(o, i, group)[1] for o, i in zip(outputs, inputs, strict=True)][-1]


def reduce_scatter_coalesced(
    outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Any, reduce_op: Any, *_: Any
) -> Any:
    return [reduce_scatter_base(o, i, group, reduce_op)[1] for o, i in zip(outputs, inputs, strict=True)][-1]


def _make_refusing_kernel(name: str) -> Kernel:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise SimulatorError(f"c10d::{name} is not simulated on device npu; simulated: {', '.join(KERNELS)}")

    return call


def _only(values: list[Any]) -> Any:
    (value,) = values  # more than one device per process is not torch_npu's either
    return value


KERNELS: dict[str, Kernel] = {
    "_allgather_base_": allgather_base,
    "allgather_": allgather,
    "allgather_into_tensor_coalesced_": allgather_coalesced,
    "allreduce_": allreduce,
    "_reduce_scatter_base_": reduce_scatter_base,
    "reduce_scatter_tensor_coalesced_": reduce_scatter_coalesced,
    "alltoall_base_": alltoall_base,
    "broadcast_": broadcast,
    "barrier": barrier,
}


def kernels(registered: list[str]) -> dict[str, Kernel]:
    """A kernel for every ``c10d::`` operator on device npu: one of ``KERNELS``, or one that raises and names what is
    missing."""
    return {name: KERNELS.get(name) or _make_refusing_kernel(name) for name in registered}
