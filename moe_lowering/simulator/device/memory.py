"""Device memory seen from the CPU: the stand-in allocates it on the host, so a CPU tensor can lie on an npu tensor.

Three views of a tensor on device "npu": its *host alias* (a CPU tensor on the same memory, which owns nothing: whoever
keeps one must know that the memory stays), its *shadow* (device "meta": shape, strides and dtype only), and a new npu
tensor of the same shape. Tensors of other devices are their own alias.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.utils._pytree import tree_map

from moe_lowering.simulator.device.generators import to_host_generator

NPU, CPU, META = "npu", "cpu", "meta"


def on_npu(value: object) -> bool:
    """Whether a value is a tensor on device "npu"."""
    return isinstance(value, torch.Tensor) and value.device.type == NPU


def host_alias(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on the memory of an npu tensor: the same sizes, strides and offset, and no ownership."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    host = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(host, tensor.storage_offset(), tensor.shape, tensor.stride())


def new_like(tensor: torch.Tensor) -> torch.Tensor:
    """An npu tensor from torch_npu's allocator, with sizes, strides and dtype of another tensor."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=NPU)


def to_host(value: Any) -> Any:
    """Arguments of an operator as its CPU kernel takes them: aliases for npu tensors, "cpu" for device "npu", a generator of the
    CPU for one of the device (which it moves on)."""
    if on_npu(value):
        return host_alias(value)
    if isinstance(value, torch.Generator) and value.device.type == NPU:
        return to_host_generator(value)
    return torch.device(CPU) if _is_npu_device(value) else value


def to_shadow(value: Any) -> Any:
    """Arguments of an operator for device "meta"."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    return torch.device(META) if _is_npu_device(value) else value


def tree_to_host(values: Any) -> Any:
    """``to_host`` of everything in nested arguments."""
    return tree_map(to_host, values)


def tree_to_shadow(values: Any) -> Any:
    """``to_shadow`` of everything in nested arguments."""
    return tree_map(to_shadow, values)


def spoil(alias: torch.Tensor) -> None:
    """Fill memory that nothing has been computed into yet with NaN, or the smallest value of an integer dtype."""
    if alias.numel():
        if alias.is_floating_point() or alias.is_complex():
            alias.fill_(float("nan"))
        else:
            alias.fill_(False if alias.dtype is torch.bool else torch.iinfo(alias.dtype).min)


def _is_npu_device(value: object) -> bool:
    return isinstance(value, torch.device) and value.type == NPU
