"""Scales of weights in the dtype that an operator takes: cast in every forward where they are stored in another one.

``npu_grouped_matmul`` takes scales of int8 rows by the result's dtype, and the bits of float32 in int64 for int4 weights; the
operators with an activation take float32: limits/data/grouped_matmul_quantised.toml.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.emission.emitter import Emitter, aten

_LOW_HALF = 0xFFFFFFFF


def scale_dtype(spec: BlockSpec) -> torch.dtype:
    """What ``npu_grouped_matmul`` takes as scale of int8 rows: bits for int4 weights, else by the result's dtype."""
    if spec.format.bits_of_scales:
        return torch.int64
    return torch.bfloat16 if spec.dtype == torch.bfloat16 else torch.float32


def matmul_scale(emit: Emitter, scale: Node, spec: BlockSpec) -> Node:
    """A scale as ``npu_grouped_matmul`` takes it for a block."""
    if spec.format.bits_of_scales:
        return _as_bits(emit, scale)
    return emit.cast(_as_float(emit, scale), scale_dtype(spec))


def _as_float(emit: Emitter, scale: Node) -> Node:
    """Scales that are kept as bits (float32 in the low half of int64, for dispatch_ffn_combine) as float32."""
    if scale.meta["val"].dtype != torch.int64:
        return scale
    return emit.call(aten.view.dtype, emit.cast(scale, torch.int32), torch.float32)


def as_float32(emit: Emitter, scale: Node) -> Node:
    """Scales as the float32 numbers that they are, also where they are kept as bits."""
    return emit.cast(_as_float(emit, scale), torch.float32)


def _as_bits(emit: Emitter, scale: Node) -> Node:
    """The bits of float32 in the low half of int64, and nothing in the high one, where the sign would go and hardware
    reads flags. With a tensor for the mask: torchair has no converter of ``bitwise_and.Scalar``."""
    value = scale.meta["val"]
    if value.dtype == torch.int64:
        return scale
    bits = emit.cast(emit.call(aten.view.dtype, emit.cast(scale, torch.float32), torch.int32), torch.int64)
    low = emit.constant(aten.full.default, [], _LOW_HALF, dtype=torch.int64, device=value.device, pin_memory=False)
    return emit.call(aten.bitwise_and.Tensor, bits, low)
