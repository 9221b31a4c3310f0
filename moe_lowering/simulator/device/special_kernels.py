"""Operators on device "npu" whose kernel is not the general one: copies between devices, casts, clones, reads by the host."""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.simulator.device import capture_state, graphs
from moe_lowering.simulator.device.kernels import Kernel
from moe_lowering.simulator.device.memory import host_alias, on_npu


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return host_alias(tensor) if on_npu(tensor) else tensor


def copy_(self: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """``self.copy_(src)`` within the device or across: casts, broadcasts and strides are the CPU kernel's."""
    if capture_state.tape_in_progress() is None:
        _host(self).copy_(_host(src))
        return self
    if not on_npu(self):
        raise capture_state.refuse("aten::copy_", "copies from the device to the host, which waits for the device")
    if not on_npu(src) and src.dim() > 0:
        raise capture_state.refuse(
            "aten::copy_", "copies from the host to the device: a replay would not see new values"
        )
    to, source = host_alias(self), _host(src) if on_npu(src) else src.detach().clone()
    capture_state.record("aten::copy_", lambda: to.copy_(source))
    return self


def foreach_copy_(self: list[torch.Tensor], src: list[torch.Tensor], non_blocking: bool = False) -> None:
    for to, source in zip(self, src, strict=True):
        copy_(to, source, non_blocking)


def to_copy(
    self: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """A copy on ``device``, of ``dtype``: strides are kept when ``memory_format`` is preserve, as on other devices."""
    kept = memory_format or torch.preserve_format
    shadow = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
    like = torch.empty_like(shadow, dtype=dtype or self.dtype, memory_format=kept)
    target = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device or self.device)
    return copy_(target, self, non_blocking)


def clone(self: torch.Tensor, *, memory_format: torch.memory_format | None = None) -> torch.Tensor:
    return to_copy(self, memory_format=memory_format)


def contiguous(self: torch.Tensor, *, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    if self.is_contiguous(memory_format=memory_format):
        return self
    return to_copy(self, memory_format=memory_format)


def local_scalar_dense(self: torch.Tensor) -> Any:
    if capture_state.is_capturing():
        raise capture_state.refuse(
            "aten::_local_scalar_dense", "reads a value of the device on the host (item, bool, int)"
        )
    return host_alias(self).item()


def tensor_split(self: torch.Tensor, tensor_indices_or_sections: torch.Tensor, dim: int = 0) -> Any:
    """The composite operator reads its places on the host, where no dispatch mode sees it."""
    if tensor_indices_or_sections.device.type != "cpu":
        raise RuntimeError(
            "tensor_split expected tensor_indices_or_sections to be on cpu, but it's on "
            f"{tensor_indices_or_sections.device}"
        )
    graphs.require_constant("aten::tensor_split.tensor_indices_or_sections", tensor_indices_or_sections)
    return torch.tensor_split(self, tensor_indices_or_sections.tolist(), dim)


def dtype_cast(input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """CPU kernel of ``npu::_npu_dtype_cast``, which torch_npu makes of ``softmax(x, dtype=...)``: a cast."""
    return input.to(dtype, copy=True)


def histc_of(of_floats: Kernel) -> Kernel:
    """``histc`` of integers too, which a device counts and the CPU does not; a result of the input's dtype."""

    def histc(self: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Any:
        if self.is_floating_point():
            return of_floats(self, bins, min, max)
        return of_floats(self.to(torch.float64), bins, min, max).to(self.dtype)

    return histc


COMPOSITE: dict[str, Kernel] = {"tensor_split.tensor_indices_or_sections": tensor_split}
KERNELS: dict[str, Kernel] = {
    "copy_": copy_,
    "_foreach_copy_": foreach_copy_,
    "_to_copy": to_copy,
    "clone": clone,
    "contiguous": contiguous,
    "_local_scalar_dense": local_scalar_dense,
}
