"""FusedMC2: the whole block in one operator of a provider, through a functional wrapper of ours.

``TARGETS`` is the table of fused operators; their versions and limits are rows in ``limits/data`` under their names. Each
dispatches, runs both matmuls with SwiGLU (gate first), and combines with the routing weights; a block with anything else
in it is not legal. ``Deployment.fused_mode`` and ``Deployment.providers`` say which of them may be used.
Sources: vllm_ascend.ffn_adapter, vllm_ascend.ffn_kernel, vllm_ascend.decode_tiling, ops_transformer.mega_moe: conditions;
vllm_ascend_wheel.schemas: signatures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emitting import Emitter, aten
from moe_lowering.passes.implementations.base import Call, Form, Implementation, Replacement
from moe_lowering.passes.implementations.quantised_mlp import as_float32
from moe_lowering.passes.implementations.tensor_parallel import Share, gather, share


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What every fused operator takes: this rank's share of the tokens, and the experts."""

    x: Node
    ids: Node
    weights: Node
    mask: Node | None
    w13: list[Node]
    w2: list[Node]
    w13_scale: list[Node]
    w2_scale: list[Node]
    w13_scale_bias: list[Node]
    w2_scale_bias: list[Node]


@dataclasses.dataclass(frozen=True)
class Target:
    """One fused operator.

    Attributes:
        name: of the wrapper in ``torch.ops.moe_lowering``, and of its rows in ``limits/data``.
        mode: the ``Deployment.fused_mode`` that asks for it.
        provider: the library that brings it.
        given: quantities of the call that are not the block's own.
        call: emits the call; its results are y [M, H] and counts [E_local].
    """

    name: str
    mode: int
    provider: str
    given: Callable[[BlockSpec, Deployment], dict[str, Any]]
    call: Callable[[Emitter, _Inputs, BlockSpec, Deployment, dict[str, Any]], Node]

    def form(self) -> Form:
        return Form(self.name, self._calls, self._emit)

    def _calls(self, spec: BlockSpec, deployment: Deployment) -> tuple[Call, ...]:
        return (Call(self.name, {**_common(spec), **self.given(spec, deployment)}),)

    def _emit(self, block: Block, emit: Emitter, deployment: Deployment, quantities: dict[str, Any]) -> Replacement:
        # One operator in place of three: it stands where the last of its inputs exists.
        with emit.at(block.combine, block.combine):
            inputs = _inputs(emit, block, deployment)
            fused = self.call(emit, inputs, block.spec, deployment, quantities)
            y = emit.item(fused, 0)
            counts = emit.cast(emit.item(fused, 1), torch.int64) if block.counts is not None else None
            return Replacement(emit.like(gather(emit, block, y), block.x), counts)


def _inputs(emit: Emitter, block: Block, deployment: Deployment) -> _Inputs:
    mine = Share(emit, block, deployment)
    experts = block.experts
    mask = None if block.mask is None else mine.of(emit.call(aten.reshape.default, block.mask, [-1]))
    x, ids, weights = (mine.of(emit.rows(n)) for n in (block.x, block.ids, block.weights))
    return _Inputs(
        x=x,
        ids=ids,
        weights=weights,
        mask=mask,
        w13=list(experts.w13),
        w2=list(experts.w2),
        w13_scale=list(experts.w13_scale or ()),
        w2_scale=list(experts.w2_scale or ()),
        w13_scale_bias=list(experts.w13_scale_bias or ()),
        w2_scale_bias=list(experts.w2_scale_bias or ()),
    )


def _common(spec: BlockSpec) -> dict[str, Any]:
    """Words that have their own meaning for fused operators: a bias is the compensation of int4 weights."""
    given: dict[str, Any] = {
        "mask_dtype": "bool" if spec.has_mask else None,
        "mask_dims": 1 if spec.has_mask else None,
        "ids_dtype": "int32",
    }
    if spec.format.weight_only:  # their int32 weights are not the W4A8 that rules on int32 are about
        given.update(dict.fromkeys(("weight_dtype", "has_scales", "scale_dtype", "bias_dtype", "has_offset")))
    if spec.format.has_scale_bias and not spec.has_bias:
        given.update(has_bias=spec.has_scale_bias, bias_dtype="float32" if spec.has_scale_bias else None)
    return given


def _ffn_quantities(spec: BlockSpec, deployment: Deployment) -> dict[str, Any]:
    # the wrapper widens float32 scales to the int64 that the operator takes
    return {"scale_dtype": "int64" if _float_scales(spec) else None} if spec.format.quantised else {}


def _float_scales(spec: BlockSpec) -> bool:
    kinds = (*spec.tensors.w13_scale.kinds, *spec.tensors.w2_scale.kinds)
    return {kind.dtype for kind in kinds} <= {torch.float32, torch.bfloat16, torch.int64}


def _ffn_call(
    emit: Emitter, given: _Inputs, spec: BlockSpec, deployment: Deployment, quantities: dict[str, Any]
) -> Node:
    extra: dict[str, Any] = {}
    if spec.format.quantised:
        extra = {
            "quantisation": spec.quantisation,
            "w13_scale": _scales(emit, given.w13_scale),
            "w2_scale": _scales(emit, given.w2_scale),
            "swiglu_limit": spec.limit,
        }
    if spec.format.has_scale_bias:
        extra.update(w13_scale_bias=given.w13_scale_bias, w2_scale_bias=given.w2_scale_bias)
    if given.mask is not None:
        extra["mask"] = given.mask
    return emit.call(
        torch.ops.moe_lowering.dispatch_ffn_combine.default, given.x, given.w13, given.w2, given.ids, given.weights,
        deployment.mc2_group, spec.ep_size, quantities["max_output_size"], **extra,
    )  # fmt: skip


def _scales(emit: Emitter, scales: list[Node]) -> list[Node]:
    """float32, or the bits that are there."""
    return [s if s.meta["val"].dtype == torch.int64 else emit.cast(s, torch.float32) for s in scales]


def _decode_quantities(spec: BlockSpec, deployment: Deployment) -> dict[str, Any]:
    scales = {"scale_dtype": "float32"} if spec.format.weight_dtype == "int8" and _float_scales(spec) else {}
    return {"has_bias": spec.has_bias, **scales}  # it knows no compensation, which w4a8's rule on weights is about


def _decode_call(
    emit: Emitter, given: _Inputs, spec: BlockSpec, deployment: Deployment, quantities: dict[str, Any]
) -> Node:
    extra: dict[str, Any] = {}
    if spec.format.quantised:
        scales = {"w13_scale": given.w13_scale, "w2_scale": given.w2_scale}
        extra = {name: [as_float32(emit, node) for node in nodes] for name, nodes in scales.items()}
    if given.mask is not None:
        extra["mask"] = given.mask
    return emit.call(
        torch.ops.moe_lowering.dispatch_gmm_combine_decode.default, given.x, given.w13, given.w2, given.ids,
        given.weights, deployment.mc2_group, spec.ep_size, deployment.own_rank("ep"), spec.experts,
        global_bs=share(spec.max_tokens, spec) * spec.ep_size, **extra,
    )  # fmt: skip


def _mega_quantities(spec: BlockSpec, deployment: Deployment) -> dict[str, Any]:
    eight_bits = spec.format.int8_rows
    return {
        "dispatch_quant_mode": 2 if eight_bits else 0,
        "scale_dtype": "int64" if eight_bits and _float_scales(spec) else None,
        "mask_dtype": "int8" if spec.has_mask else None,
        "shared_expert_num": 0,
    }


def _mega_call(
    emit: Emitter, given: _Inputs, spec: BlockSpec, deployment: Deployment, quantities: dict[str, Any]
) -> Node:
    extra: dict[str, Any] = {}
    if spec.format.quantised:
        extra = {
            "quantisation": spec.quantisation,
            "w13_scale": _scales(emit, given.w13_scale),
            "w2_scale": _scales(emit, given.w2_scale),
        }
    if spec.format.has_scale_bias:
        extra.update(w13_scale_bias=given.w13_scale_bias, w2_scale_bias=given.w2_scale_bias)
    if given.mask is not None:
        extra["mask"] = given.mask
    return emit.call(
        torch.ops.moe_lowering.mega_moe.default, given.x, given.w13, given.w2, given.ids, given.weights,
        deployment.mc2_group, spec.ep_size, spec.experts, quantities["most_tokens"], quantities["max_output_size"],
        **extra,
    )  # fmt: skip


TARGETS = (
    Target("mega_moe", 1, "cann_ops_transformer", _mega_quantities, _mega_call),
    Target("dispatch_ffn_combine", 1, "vllm_ascend", _ffn_quantities, _ffn_call),
    Target("dispatch_gmm_combine_decode", 2, "vllm_ascend", _decode_quantities, _decode_call),
)


def _forms(deployment: Deployment) -> tuple[Form, ...]:
    """The targets of the deployment's mode whose provider is declared; of the mode when none is."""
    mode = deployment.fused_mode or 1  # 0 is refused by a rule of its own (fused.mode)
    asked = [target for target in TARGETS if target.mode == mode] or list(TARGETS)  # a mode that fused.mode refuses
    declared = [target for target in asked if deployment.provider(target.provider) is not None]
    # without a provider, the operator that vllm-ascend brings is the one to ask for
    return tuple(target.form() for target in declared or asked[-1:])


FUSED_MC2 = Implementation("fused_mc2", _forms, is_one_operator=True)
