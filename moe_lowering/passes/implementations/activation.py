"""The gated activation between the two matmuls, as a device operator or composed of ATen operators."""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.emitting import Emitter, aten


def activation_operator(spec: BlockSpec, soc: str) -> str | None:
    """The device operator of a block's activation; None where it is composed of ATen operators."""
    if spec.activation == "swiglu" and not spec.interleaved:
        return "npu_swiglu"
    if spec.activation == "swiglu_oai" and soc in ("A2", "A3"):
        return "npu_clipped_swiglu"  # documented for A2 and A3 only
    return None


def emit_activation(emit: Emitter, h: Node, spec: BlockSpec, soc: str) -> Node:
    """[N, 2I] -> [N, I]."""
    operator = activation_operator(spec, soc)
    if operator == "npu_swiglu":
        return emit.call(torch.ops.npu.npu_swiglu.default, h, -1)
    if operator == "npu_clipped_swiglu":
        return emit.call(
            torch.ops.npu.npu_clipped_swiglu.default, h,
            alpha=spec.alpha, limit=spec.limit, bias=1.0, interleaved=spec.interleaved,
        )  # fmt: skip
    gate, up = _halves(emit, h, spec)
    if spec.activation in ("swiglu_clamp", "swiglu_oai"):
        gate = emit.call(aten.clamp.default, gate, None, spec.limit)
        up = emit.call(aten.clamp.default, up, -spec.limit, spec.limit)
    if spec.activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if spec.activation == "gelu_tanh" else "none"
        gate = emit.call(aten.gelu.default, gate, approximate=approximate)
    elif spec.activation == "swiglu_oai":
        slope = emit.call(aten.sigmoid.default, emit.call(aten.mul.Tensor, gate, spec.alpha))
        gate = emit.call(aten.mul.Tensor, gate, slope)
        up = emit.call(aten.add.Tensor, up, 1)
    else:
        gate = emit.call(aten.silu.default, gate)
    return emit.call(aten.mul.Tensor, gate, up)


def _halves(emit: Emitter, h: Node, spec: BlockSpec) -> tuple[Node, Node]:
    if spec.interleaved:
        last = 2 * spec.intermediate
        return (
            emit.call(aten.slice.Tensor, h, 1, 0, last, 2),
            emit.call(aten.slice.Tensor, h, 1, 1, last, 2),
        )
    pair = emit.call(aten.split.Tensor, h, spec.intermediate, 1)
    return emit.item(pair, 0), emit.item(pair, 1)
