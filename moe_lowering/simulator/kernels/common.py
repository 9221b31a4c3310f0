"""What the CPU kernels of ``npu::`` operators share: the check against the limit tables, refusals, undefined values."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch

from moe_lowering.limits import bind, check_call
from moe_lowering.simulator import state

Kernel = Callable[..., Any]
Record = TypeVar("Record")
UNDEFINED = "MOE_LOWERING_SIMULATOR_UNDEFINED"  # environment variable: one of
FILLS = ("nan", "finite")
DEFAULT_BUFFER_MB = 200  # CANN's default HCCL_BUFFSIZE
# What the kernels follow: the CANN that vllm-ascend 0.23.0 is released for (its versioning policy), and the wheel read here.
SIMULATED_VERSIONS = {"cann": "9.1.0", "torch_npu": "2.13.0"}


def current_soc() -> str:
    """The SoC whose limits and shapes apply: the simulator's, ``A3`` when it is not enabled."""
    return state.soc() if state.is_enabled() else "A3"


def buffer_bytes() -> int:
    """Size of the HCCL window: ``HCCL_BUFFSIZE`` in MiB, as CANN reads it."""
    return int(os.environ.get("HCCL_BUFFSIZE", DEFAULT_BUFFER_MB)) * 2**20


def make_undefined(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of what the real operator leaves undefined: NaN, or the smallest integer of the dtype; 1 for programs that are
    to see numbers there (``UNDEFINED``).

    Raises:
        ValueError: a word in ``UNDEFINED`` that is not accepted.
    """
    word = os.environ.get(UNDEFINED, "nan")
    if word not in FILLS:
        raise ValueError(f"{UNDEFINED} is {word!r}; accepted: {', '.join(FILLS)}")
    if word != "nan":
        return torch.ones(tuple(shape), dtype=dtype)
    return torch.full(tuple(shape), float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype)


def refuse(operator: str, argument: str, value: object, accepted: str) -> NoReturn:
    """Raise the ValueError of an argument that the real operator refuses or computes wrongly."""
    raise ValueError(f"{operator}: {argument} is {value}; accepted: {accepted}")


def refuse_unsimulated(operator: str, argument: str, value: object, accepted: str) -> NoReturn:
    """Raise the ValueError of an argument that may be legal on a device, but that no CPU kernel computes."""
    raise ValueError(f"{operator}: {argument} is {value}; the CPU kernel computes only: {accepted}")


def refuse_others(operator: str, arguments: dict[str, Any], accepted: dict[str, Any]) -> None:
    """``refuse_unsimulated`` of the first argument that has another value than the one in ``accepted``."""
    for name, value in accepted.items():
        if arguments[name] != value:
            refuse_unsimulated(operator, name, arguments[name], str(value))


# What torch_npu's int arguments call dtypes: torch's ScalarType numbers.
DTYPE_NUMBERS = {torch.int8: 1, torch.int32: 3, torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}


def check_own_dtype(operator: str, argument: str, number: int | None, tensor: torch.Tensor) -> None:
    """Accept a dtype argument that is None or the dtype that the tensor has; raise ValueError for others."""
    own = DTYPE_NUMBERS.get(tensor.dtype)
    if number is not None and number != own:
        refuse_unsimulated(operator, argument, number, f"None or {own}, the tensor's own {tensor.dtype}")


def violations(op: torch._ops.OpOverload, arguments: dict[str, Any]) -> str:
    """The broken limits of one call in one text; empty when it is legal."""
    extra = {"buffer_bytes": buffer_bytes()}
    broken = check_call(op, (), arguments, soc=current_soc(), extra=extra, versions=SIMULATED_VERSIONS)
    return "; ".join(f"{v}{f' ({v.advice})' if v.advice else ''}" for v in broken)


def with_limits(op: torch._ops.OpOverload, kernel: Kernel) -> Kernel:
    """The kernel, called with every argument of the schema by name, after the limit tables have accepted the call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = bind(op, args, kwargs)
        if text := violations(op, arguments):
            raise ValueError(text)
        return kernel(**arguments)

    return call


def take(record: Callable[..., Record], arguments: dict[str, Any]) -> Record:
    """The arguments that a kernel reads, of all that its operator has, as the named tuple ``record``."""
    named_tuple: Any = record  # no type says that a class is a named tuple's
    return record(**{name: arguments[name] for name in named_tuple._fields})


def collective(op: torch._ops.OpOverload, kernel: Kernel) -> Kernel:
    """Like ``with_limits``, but an illegal call reaches the kernel as ``refusal``: it must tell the other ranks before
    it raises."""

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = bind(op, args, kwargs)
        return kernel(refusal=violations(op, arguments), **arguments)

    return call
