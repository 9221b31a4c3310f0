"""``torch.npu.NPUGraph`` and ``torch.npu.graph``: their errors, and a watch over operators on the CPU.

A replay repeats what is on the tape, so what the CPU computes inside a capture happens once and never again. That is
right for constants, which the CPU makes from nothing but numbers, and wrong for everything else: the watch tells one
from the other by where the operands of a CPU operator come from. The same holds for the host scalars that an operator on
the device takes, which a real capture reads once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_lowering.simulator.device.capture_state import capture_error as capturing_error
from moe_lowering.simulator.device.capture_state import (
    is_capturing,
    latest_tape,
    refuse,
    tape_in_progress,
    waiting_failure,
)
from moe_lowering.simulator.device.memory import on_npu
from moe_lowering.simulator.device.tape import CaptureError

HOST_VALUE = (
    ", which a replay would not see change; accepted: a Python number, or torch.tensor(...) of such inside the capture"
)
CONSTANTS = ("aten::lift_fresh", "aten::lift_fresh_copy")  # of torch.tensor(...) and of a compiled graph
_KEYS = (
    "PrivateUse1",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
)

_OURS = "moe_lowering_watches"  # that a method is wrapped does not say by whom
_watches: list[CpuWatch] = []  # of the capture under way


class CpuWatch(TorchDispatchMode):
    """Active during a capture: refuses operators that the CPU would run, and values of the host, but for constants.

    Of a higher-order operator, such as ``auto_functionalized_v2`` in a graph that is functional, the operators inside
    are watched: a capture sees nothing else of it.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives this __init__ no types
        self._constants: set[StorageWeakRef] = set()  # a reference keeps the storage's identity, not its memory

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # dynamo does not have to trace it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._run_watched(func, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        reads_npu = any(map(on_npu, tensors))
        if reads_npu or any(isinstance(leaf, torch.device) and leaf.type == "npu" for leaf in leaves):
            tape_in_progress(func.name())
        if reads_npu and not _has_npu_kernel(func):
            raise refuse(func.name(), "has no kernel for device npu: torch_npu runs it on the CPU")
        if reads_npu and any(
            _on_cpu(tensor) and not tensor.dim() and not self.is_constant(tensor) for tensor in tensors
        ):
            raise refuse(func.name(), f"takes a value of the host{HOST_VALUE}{_advice(tensors)}")  # arrays: kernels.py
        constant = func._schema.name in CONSTANTS or all(map(self.is_constant, tensors))
        random = torch.Tag.nondeterministic_seeded in func.tags
        on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
        if tensors and on_cpu and not constant and not func.is_view:
            raise refuse(func.name(), f"a CPU operator inside a capture: a replay skips it{_advice(tensors)}")
        result = func(*args, **kwargs)
        for leaf in filter(_on_cpu, tree_leaves(result)):
            storage = _storage(leaf)
            if constant and not random:
                self._constants.add(storage)
            elif random:
                self._constants.discard(storage)  # written in place, which all its views see
        return result

    def _run_watched(self, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        """A higher-order operator by its own kernel, with the watch on (which is off in ``__torch_dispatch__``)."""
        kernel = func.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
        if kernel is None:
            name = func.name()
            raise refuse(name, "has no kernel that calls other operators, and what it does cannot be watched")
        with self:
            return kernel(*args, **kwargs)

    def is_constant(self, tensor: torch.Tensor) -> bool:
        """Whether the capture made this tensor of the host from nothing but numbers."""
        return _on_cpu(tensor) and _storage(tensor) in self._constants


def _storage(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def require_constant(operator: str, tensor: torch.Tensor) -> None:
    """A tensor of the host that an operator reads in a way that the watch does not see.

    Raises:
        CaptureError: a capture is under way, and the tensor is no constant of it.
    """
    if is_capturing() and not (_watches and _watches[-1].is_constant(tensor)):
        raise refuse(operator, f"reads a tensor of the host{HOST_VALUE}")


def _advice(tensors: list[torch.Tensor]) -> str:
    if any(tensor.dim() and _on_cpu(tensor) for tensor in tensors):
        return ""
    return " (a float of the model that dynamo made an input? set torch._dynamo.config.specialize_float = True)"


def _on_cpu(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


@functools.lru_cache(None)
def _has_npu_kernel(func: Any) -> bool:
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in _KEYS)


def install() -> None:
    """Wrap ``NPUGraph`` and ``torch.npu.graph``. Idempotent."""
    from torch_npu.npu import ExternalEvent, NPUGraph, graph

    if getattr(NPUGraph.capture_begin, _OURS, False):
        return
    _wrap_graph(NPUGraph)
    _wrap_capture_context(graph)
    _wrap_external_event(ExternalEvent)


def _wrap_graph(NPUGraph: Any) -> None:
    """A graph knows its tape, watches the CPU while it is captured, and raises what a capture or a replay refused."""
    begin, end, replay = NPUGraph.capture_begin, NPUGraph.capture_end, NPUGraph.replay

    @functools.wraps(begin)
    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        _refuse_capture_inside()
        begin(self, *args, **kwargs)
        self.simulated_tape = latest_tape()
        self.simulated_watch = CpuWatch()
        self.simulated_watch.__enter__()
        _watches.append(self.simulated_watch)

    @functools.wraps(end)
    def capture_end(self: Any) -> None:
        if (watch := self.__dict__.pop("simulated_watch", None)) is not None:
            _watches.remove(watch)
            watch.__exit__(None, None, None)
        end(self)
        self.simulated_tape.pool = tuple(self.pool())
        if self.simulated_tape.error is not None:
            raise self.simulated_tape.error

    @functools.wraps(replay)
    def replay_(self: Any) -> None:
        try:
            replay(self)
        except RuntimeError as error:
            if (first := capturing_error()) is not None:
                raise first from error
            tape = getattr(self, "simulated_tape", None)
            if tape is None or tape.failure is None:
                raise
            failure, tape.failure = tape.failure, None
            raise failure from error

    setattr(capture_begin, _OURS, True)
    NPUGraph.capture_begin, NPUGraph.capture_end, NPUGraph.replay = capture_begin, capture_end, replay_


def _wrap_capture_context(graph: Any) -> None:
    """``torch.npu.graph``: no capture inside a capture, and a capture's own error leaves the stream as it was."""
    enter, leave = graph.__enter__, graph.__exit__

    @functools.wraps(enter)
    def enter_(self: Any) -> Any:
        _refuse_capture_inside()  # before torch_npu waits for the device
        return enter(self)

    @functools.wraps(leave)
    def exit_(self: Any, kind: Any, value: Any, trace: Any) -> None:
        try:
            leave(self, kind, value, trace)
        except CaptureError as error:
            self.stream_ctx.__exit__(kind, value, trace)  # not reached when capture_end raises
            if error is not value:
                raise

    graph.__enter__, graph.__exit__ = enter_, exit_


def _wrap_external_event(ExternalEvent: Any) -> None:
    """An event that is recorded outside of a capture raises the failure of the replay that waited for it."""
    record = ExternalEvent.record

    @functools.wraps(record)
    def record_(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            record(self, *args, **kwargs)
        except RuntimeError as error:
            if (failure := waiting_failure()) is None:
                raise
            raise failure from error

    ExternalEvent.record = record_


def _refuse_capture_inside() -> None:
    if is_capturing():
        raise refuse("aclmdlRICaptureBegin", "begins a capture inside a capture")
