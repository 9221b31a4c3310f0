"""``torch.npu.NPUGraph`` and ``torch.npu.graph``: their errors, and a watch over operators on the CPU.

A replay repeats what is on the tape, so what the CPU computes inside a capture happens once and never again. That is
right for constants, which the CPU makes from nothing but numbers, and wrong for everything else: the watch tells one
from the other by where the operands of a CPU operator come from.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from moe_lowering.simulator.device.capturing import current, latest, refuse
from moe_lowering.simulator.device.memory import on_npu
from moe_lowering.simulator.device.tape import CaptureError

CONSTANTS = ("aten::lift_fresh", "aten::lift_fresh_copy")  # of torch.tensor(...) and of a compiled graph
_KEYS = (
    "PrivateUse1",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
)


class CpuWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Active during a capture: refuses operators that the CPU would run, unless they make a constant."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._constants: Any = WeakIdKeyDictionary()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # dynamo need not care

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        there = any(map(on_npu, tensors))
        if there or any(isinstance(leaf, torch.device) and leaf.type == "npu" for leaf in leaves):
            current(func.name())
        if there and not _has_npu_kernel(func):
            raise refuse(func.name(), "has no kernel for device npu: torch_npu runs it on the CPU")
        constant = func._schema.name in CONSTANTS or all(tensor in self._constants for tensor in tensors)
        random = torch.Tag.nondeterministic_seeded in func.tags
        on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
        if tensors and on_cpu and not constant and not func.is_view:
            raise refuse(func.name(), f"a CPU operator inside a capture: a replay skips it{_advice(tensors)}")
        result = func(*args, **kwargs)
        if constant and not random:
            self._constants.update({leaf: None for leaf in tree_leaves(result) if _on_cpu(leaf)})
        return result


def _advice(tensors: list[torch.Tensor]) -> str:
    if any(tensor.dim() for tensor in tensors):
        return ""
    return " (a float of the model that dynamo made an input? set torch._dynamo.config.specialize_float = True)"


def _on_cpu(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


@functools.lru_cache(None)
def _has_npu_kernel(func: Any) -> bool:
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in _KEYS)


def install() -> None:
    """Wrap ``NPUGraph`` and ``torch.npu.graph``. Idempotent."""
    from torch_npu.npu import NPUGraph, graph

    if hasattr(NPUGraph.capture_begin, "__wrapped__"):
        return
    begin, end, replay, leave = NPUGraph.capture_begin, NPUGraph.capture_end, NPUGraph.replay, graph.__exit__

    @functools.wraps(begin)
    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.simulated_tape = latest()
        self.simulated_watch = CpuWatch()
        self.simulated_watch.__enter__()

    @functools.wraps(end)
    def capture_end(self: Any) -> None:
        if (watch := self.__dict__.pop("simulated_watch", None)) is not None:
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
            tape = getattr(self, "simulated_tape", None)
            if tape is None or tape.failure is None:
                raise
            failure, tape.failure = tape.failure, None
            raise failure from error

    @functools.wraps(leave)
    def exit_(self: Any, kind: Any, value: Any, trace: Any) -> None:
        try:
            leave(self, kind, value, trace)
        except CaptureError as error:
            self.stream_ctx.__exit__(kind, value, trace)  # not reached when capture_end raises
            if error is not value:
                raise

    NPUGraph.capture_begin, NPUGraph.capture_end, NPUGraph.replay = capture_begin, capture_end, replay_
    graph.__exit__ = exit_
