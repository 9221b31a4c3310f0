"""The activation between the two matmuls, as a device operator or composed of ATen operators.

``_GATED`` and ``_UNGATED`` hold the activations that can be emitted; a word that is in neither is refused by
``legality`` (``block.activation``), and an error here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.lookup import look_up
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.implementations.matmul_calls import counts_of
from moe_lowering.passes.operator_calls import OperatorCall, emit_call, tensor
from moe_lowering.vocabulary import SOCS


def activation_operator(spec: BlockSpec, soc: str) -> str | None:
    """The device operator of a block's activation; None where it is composed of ATen operators."""
    if spec.activation == "swiglu" and not spec.interleaved:
        return "npu_swiglu"
    if spec.activation in _CLIPPED and look_up(SOCS, soc, "activation: soc").clips_swiglu:
        return "npu_clipped_swiglu"
    return None


def activation_arguments(operator: str, x: Any, spec: BlockSpec, counts: Any) -> dict[str, Any]:
    """Arguments of that operator for x [N, 2I], of which the first sum(counts) rows are valid: one of the two can be told."""
    if operator == "npu_swiglu":
        return {"input": x, "dim": -1}
    alpha, bias = _CLIPPED[spec.activation]
    return {
        "x": x,
        "group_index": counts,
        "alpha": spec.alpha if alpha is None else alpha,
        "limit": spec.limit,
        "bias": bias,
        "interleaved": spec.interleaved,
    }


# What npu_clipped_swiglu computes, A * sigmoid(alpha * A) * (B + bias) of clamped halves, by activation: (alpha, bias); an
# alpha of None is the block's. Source: wheel.docs.
_CLIPPED: dict[str, tuple[float | None, float]] = {"swiglu_oai": (None, 1.0), "swiglu_clamp": (1.0, 0.0)}


def activation_calls(spec: BlockSpec, soc: str) -> tuple[OperatorCall, ...]:
    """The call of the device operator, where there is one; its rows are in the dtype of the block."""
    name = activation_operator(spec, soc)
    if name is None:
        return ()
    x = tensor(spec.dtype, None, spec.first_width)
    return (OperatorCall(name, activation_arguments(name, x, spec, counts_of(spec))),)


def emit_activation(emit: Emitter, h: Node, counts: Node, spec: BlockSpec, soc: str) -> Node:
    """[N, 2I], or [N, I] where the activation has no gate -> [N, I]; rows past sum(counts) are undefined.

    Raises:
        ValueError: an activation that has no emitter, which the judge should have refused.
    """
    operator = activation_operator(spec, soc)
    if operator is not None:
        return emit_call(emit, operator, activation_arguments(operator, h, spec, counts))
    if spec.activation in _UNGATED:
        return _UNGATED[spec.activation](emit, h)
    compose = look_up(_GATED, spec.activation, "emit_activation: activation")
    return emit.cast(emit.call(aten.mul.Tensor, *compose(emit, *_halves(emit, h, spec), spec)), h.meta["val"].dtype)


Halves = tuple[Node, Node]


def _swiglu(emit: Emitter, gate: Node, up: Node, spec: BlockSpec) -> Halves:
    return emit.call(aten.silu.default, gate), up


def _clamp_halves(emit: Emitter, gate: Node, up: Node, spec: BlockSpec) -> Halves:
    return emit.call(aten.clamp.default, gate, None, spec.limit), emit.call(
        aten.clamp.default, up, -spec.limit, spec.limit
    )


def _swiglu_clamp(emit: Emitter, gate: Node, up: Node, spec: BlockSpec) -> Halves:
    return _swiglu(emit, *_clamp_halves(emit, gate, up, spec), spec)


def _swiglu_oai(emit: Emitter, gate: Node, up: Node, spec: BlockSpec) -> Halves:
    gate, up = _clamp_halves(emit, gate, up, spec)
    slope = emit.call(aten.sigmoid.default, emit.call(aten.mul.Tensor, gate, spec.alpha))
    return emit.call(aten.mul.Tensor, gate, slope), emit.call(aten.add.Tensor, up, 1)


def _gelu(emit: Emitter, gate: Node, up: Node, spec: BlockSpec) -> Halves:
    return emit.call(aten.gelu.default, gate, approximate="none"), up


def _gelu_tanh(emit: Emitter, gate: Node, up: Node, spec: BlockSpec) -> Halves:
    return emit.call(aten.gelu.default, gate, approximate="tanh"), up


def _swiglu_clamp_after(emit: Emitter, gate: Node, up: Node, spec: BlockSpec) -> Halves:
    gate = emit.call(aten.silu.default, gate)
    return _clamp_halves(emit, gate, up, spec)


def _swiglu_softcap(emit: Emitter, gate: Node, up: Node, spec: BlockSpec) -> Halves:
    """In float32, as the model that has it computes it."""
    gate, up = emit.cast(gate, torch.float32), emit.cast(up, torch.float32)
    slope = emit.call(aten.sigmoid.default, gate)
    return emit.call(aten.mul.Tensor, _capped(emit, gate, spec.limit), slope), _capped(emit, up, spec.alpha)


def _capped(emit: Emitter, x: Node, cap: float) -> Node:
    return emit.call(aten.mul.Tensor, emit.call(aten.tanh.default, emit.call(aten.div.Tensor, x, cap)), cap)


def _relu(emit: Emitter, x: Node) -> Node:
    return emit.call(aten.relu.default, x)


def _relu2(emit: Emitter, x: Node) -> Node:
    positive = _relu(emit, x)
    return emit.call(aten.mul.Tensor, positive, positive)


_GATED: dict[str, Callable[[Emitter, Node, Node, BlockSpec], Halves]] = {
    "swiglu": _swiglu,
    "swiglu_clamp": _swiglu_clamp,
    "swiglu_oai": _swiglu_oai,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "swiglu_softcap": _swiglu_softcap,
    "swiglu_clamp_after": _swiglu_clamp_after,
}
_UNGATED: dict[str, Callable[[Emitter, Node], Node]] = {
    "relu": _relu,
    "relu2": _relu2,
    "silu": lambda emit, x: emit.call(aten.silu.default, x),
    "gelu_ungated": lambda emit, x: emit.call(aten.gelu.default, x, approximate="none"),
    "gelu_tanh_ungated": lambda emit, x: emit.call(aten.gelu.default, x, approximate="tanh"),
}
EMITTED = frozenset({*_GATED, *_UNGATED})


def _halves(emit: Emitter, h: Node, spec: BlockSpec) -> Halves:
    if spec.interleaved:
        last = spec.first_width
        return (
            emit.call(aten.slice.Tensor, h, 1, 0, last, 2),
            emit.call(aten.slice.Tensor, h, 1, 1, last, 2),
        )
    pair = emit.call(aten.split.Tensor, h, spec.intermediate, 1)
    return emit.item(pair, 0), emit.item(pair, 1)
