"""Puts the kernels of this package in place of torch_npu's for dispatch key PrivateUse1.

Kept from torch_npu: whatever allocates without computing, views, storage and stream functions (NATIVE and every
operator whose result is a view). Replaced: every other aten operator that torch_npu registers and the CPU can compute.
Added: the ``npu::`` operators that the simulator has CPU kernels for, all operators of ``moe_lowering::``, and
torch.distributed's collectives with the backend "hccl". The generic operators of ``moe_lowering::`` are among them, for
convenience and not in a capture: they have no kernel for a device.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from moe_lowering import _versions
from moe_lowering.simulator.device import attention, attention_out, collectives, hccl, special_kernels
from moe_lowering.simulator.device.kernels import Kernel, kernel
from moe_lowering.simulator.kernels import clip_quant

KEY = "PrivateUse1"
NATIVE = {
    "empty", "empty_like", "empty_strided", "new_empty_strided", "as_strided", "as_strided_", "view", "_copy_from",
    "_copy_from_and_resize", "set_", "resize_", "resize_as_", "_reshape_alias", "is_pinned", "_pin_memory",
    "record_stream", "is_set_to", "_has_compatible_shallow_copy_type", "unfold",
}  # fmt: skip
# torch_npu gives these an autograd kernel that calls the device itself; what they return has no gradient.
BELOW_AUTOGRAD = ("argsort", "argsort.stable", "one_hot")
_LIBRARIES: list[torch.library.Library] = []


def register() -> int:
    """Register all kernels; how many. Idempotent."""
    if _LIBRARIES:
        return 0
    importlib.import_module("moe_lowering.custom_ops")  # defines the operators
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel.*")
        count = _register_aten() + _register_libraries()
        c10d = _implementer("c10d")
        for name, collective in collectives.kernels(_registered_operators("c10d", KEY)).items():
            c10d(name, collective, KEY)
    hccl.register()
    return count


def _register_aten() -> int:
    """Kernels of ATen's operators that torch_npu has kernels for; how many of them are the CPU's own."""
    known = _registered_operators("aten", KEY)
    count = 0
    aten = _implementer("aten")
    for name in known:
        op = _overload(torch.ops.aten, name)
        if name not in special_kernels.KERNELS and op is not None and _is_ours(op):
            own = kernel(op)
            aten(name, special_kernels.histc_of(own) if name == "histc" else own, KEY)
            count += 1
    for name, special_kernel in special_kernels.KERNELS.items():
        aten(name, special_kernel, KEY)
    for name, special_kernel in special_kernels.COMPOSITE.items():
        for key in (KEY, f"Autograd{KEY}"):
            aten(name, special_kernel, key)
    for name in BELOW_AUTOGRAD:
        op = _overload(torch.ops.aten, name)
        assert op is not None
        aten(name, _below_autograd(op), f"Autograd{KEY}")
    return count


def _register_libraries() -> int:
    """Kernels of torch_npu's, ATB's and this package's own operators; how many."""
    npu = _implementer("npu")
    npu(attention.NAME, attention.fusion_attention_v3, "CPU")
    npu("_npu_dtype_cast", special_kernels.dtype_cast, "CPU")
    for name, special_kernel in attention_out.KERNELS.items():
        npu(name, special_kernel, KEY)
    lowered = frozenset(_registered_operators("moe_lowering", KEY))
    return (
        register_namespace("npu", _registered_operators("npu", "CPU"))
        + register_namespace("atb", _registered_operators("atb", "CPU"))
        + register_namespace(clip_quant.NAMESPACE, clip_quant.KERNELS)
        + register_namespace("moe_lowering", _registered_operators("moe_lowering", "CPU"), lowered)
    )


def register_namespace(namespace: str, names: Iterable[str], real: Collection[str] | None = None) -> int:
    """Give operators that have a CPU kernel one for the device; how many.

    Args:
        namespace: ``npu``, or of another library of operators.
        names: the operators.
        real: those that a device has too; None for all.
    """
    implement, count = _implementer(namespace), 0
    with_autograd = _registered_operators(namespace, f"Autograd{KEY}") if namespace == "npu" else []
    around = functools.partial(hccl.resolve_groups, namespace)
    for name in names:
        op = _overload(getattr(torch.ops, namespace), name)
        assert op is not None
        implement(name, kernel(op, around, real is None or name in real), KEY)
        if name in with_autograd:
            implement(name, _below_autograd(op), f"Autograd{KEY}")
        count += 1
    return count


def _below_autograd(op: torch._ops.OpOverload) -> Kernel:
    """Passes the call on to the next kernel: a fake tensor's while tracing, ours elsewhere."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    return call


def _implementer(namespace: str) -> Callable[..., None]:
    """``(name, kernel, dispatch key)``: put a kernel there, whatever was there before."""
    library = torch.library.Library(namespace, "IMPL")
    _LIBRARIES.append(library)
    return _versions.overriding_impl(library)


def _registered_operators(namespace: str, key: str) -> list[str]:
    """Operators of a namespace that have a kernel of their own for a dispatch key."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return sorted(name.partition("::")[2] for name in names if name.startswith(f"{namespace}::"))


def _overload(namespace: Any, name: str) -> torch._ops.OpOverload | None:
    base, _, overload = name.partition(".")
    packet = getattr(namespace, base, None)
    return getattr(packet, overload or "default", None) if packet is not None else None


def _is_ours(op: torch._ops.OpOverload) -> bool:
    if op._schema.name.partition("::")[2] in NATIVE:
        return False
    views = any(value.alias_info and not value.alias_info.is_write for value in op._schema.returns)
    qualified = op.name()
    has_cpu = torch._C._dispatch_has_computed_kernel_for_dispatch_key(qualified, "CPU")
    return not views and bool(has_cpu)
