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

from moe_lowering.custom_ops.dispatch_ffn_combine import counts_of_a_row
from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.context import most_tokens
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.implementations.base import Form, Implementation, Replacement
from moe_lowering.passes.implementations.mc2 import global_tokens
from moe_lowering.passes.implementations.scale_casts import as_float32
from moe_lowering.passes.implementations.tensor_parallel import OwnTokens, gather, tokens_per_rank
from moe_lowering.passes.operator_calls import OperatorCall, Premises, Rules, emit_call, tensor


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """The arguments that all fused operators take: this rank's share of the tokens, and the experts. Nodes or records."""

    x: Any
    ids: Any
    weights: Any
    mask: Any
    w13: list[Any]
    w2: list[Any]
    w13_scale: list[Any]
    w2_scale: list[Any]
    w13_scale_bias: list[Any]
    w2_scale_bias: list[Any]


@dataclasses.dataclass(frozen=True)
class FusedOperator:
    """One fused operator.

    Attributes:
        name: of the wrapper in ``torch.ops.moe_lowering``, and of its rows in ``limits/data``.
        mode: the ``Deployment.fused_mode`` that asks for it.
        provider: the library that brings it.
        arguments: of the call; its results are y [M, H] and counts [E_local]. The rank is None in a call that is judged.
        scale_dtype: what scales of a dtype are handed over as.
        told_rows: the bound on the rows of one rank that it is told; None when it is told none.
    """

    name: str
    mode: int
    provider: str
    arguments: Callable[[BlockSpec, Deployment, int | None, Premises, _Inputs], dict[str, Any]]
    scale_dtype: Callable[[torch.dtype], torch.dtype]
    told_rows: Callable[[BlockSpec, Deployment, Premises], int | None] | None = None

    def form(self) -> Form:
        return Form(self.name, self._calls, self._emit, told_rows=self.told_rows)

    def _calls(self, spec: BlockSpec, deployment: Deployment) -> tuple[OperatorCall | Rules, ...]:
        def judged(premises: Premises) -> dict[str, Any]:
            return self.arguments(spec, deployment, None, premises, self._records(spec, premises))

        return (OperatorCall(self.name, judged, _word_quantities(spec, deployment)),)

    def _records(self, spec: BlockSpec, premises: Premises) -> _Inputs:
        tokens, experts = tokens_per_rank(premises.tokens, spec), spec.tensors
        return _Inputs(
            tensor(torch.int8 if spec.quantised_input else spec.dtype, tokens, spec.hidden),
            tensor(torch.int32, tokens, spec.top_k),
            tensor(torch.float32, tokens, spec.top_k),
            tensor(torch.bool, tokens) if spec.has_mask else None,
            experts.w13.items,
            experts.w2.items,
            experts.w13_scale.cast_each(self.scale_dtype).items,
            experts.w2_scale.cast_each(self.scale_dtype).items,
            experts.w13_scale_bias.items,
            experts.w2_scale_bias.items,
        )

    def _emit(self, block: Block, emit: Emitter, deployment: Deployment, premises: Premises) -> Replacement:
        # One operator in place of three: it stands where the last of its inputs exists.
        with emit.at(block.combine, block.combine):
            inputs = self._nodes(emit, block, deployment)
            arguments = self.arguments(block.spec, deployment, deployment.own_rank("ep"), premises, inputs)
            fused = emit_call(emit, self.name, arguments)
            y = emit.item(fused, 0)
            counts = emit.cast(emit.item(fused, 1), torch.int64) if block.counts is not None else None
            return Replacement(emit.like(gather(emit, block, y), block.x), counts)

    def _nodes(self, emit: Emitter, block: Block, deployment: Deployment) -> _Inputs:
        own_tokens = OwnTokens(emit, block, deployment)
        experts = block.experts
        mask = None if block.mask is None else own_tokens.of(emit.call(aten.reshape.default, block.mask, [-1]))
        x, ids, weights = (own_tokens.of(emit.rows(n)) for n in (block.x, block.ids, block.weights))
        return _Inputs(
            x=x,
            ids=ids,
            weights=emit.cast(weights, torch.float32),
            mask=mask,
            w13=list(experts.w13),
            w2=list(experts.w2),
            w13_scale=[self._scale(emit, node) for node in experts.w13_scale or ()],
            w2_scale=[self._scale(emit, node) for node in experts.w2_scale or ()],
            w13_scale_bias=list(experts.w13_scale_bias or ()),
            w2_scale_bias=list(experts.w2_scale_bias or ()),
        )

    def _scale(self, emit: Emitter, node: Node) -> Node:
        dtype = node.meta["val"].dtype
        return node if dtype == self.scale_dtype(dtype) else as_float32(emit, node)  # the only other that is asked for


def _word_quantities(spec: BlockSpec, deployment: Deployment) -> dict[str, Any]:
    """Quantities that no argument of a fused operator shows, and those that mean something else there: a bias is the
    compensation of int4 weights."""
    words: dict[str, Any] = {
        "activation": spec.activation,
        "interleaved": spec.interleaved,
        "quantised_input": spec.quantised_input,
        "has_offset": spec.has_offset,
    }
    if spec.has_bias:
        words.update(has_bias=True, bias_dtype=None)
    if spec.format.weight_only:  # rules on int32 weights are about W4A8, and must not be applied to W4A16
        words.update(dict.fromkeys(("weight_dtype", "has_scales", "scale_dtype", "bias_dtype", "has_offset")))
    if not deployment.mc2_group:
        words["group_length"] = None  # left out: the rule on has_communicator has the better message
    return words


def max_output_size(spec: BlockSpec, deployment: Deployment, premises: Premises) -> int | None:
    """Rows that a fused operator may process on one rank: the deployment's, else the proven receive bound; None when there
    is none."""
    if deployment.max_output_size:
        return deployment.max_output_size
    most = most_tokens(spec, premises)
    return None if most is None else spec.ep_size * most * min(spec.top_k, spec.local_experts)


def _ffn_rows(spec: BlockSpec, deployment: Deployment, premises: Premises) -> int | None:
    """``max_output_size`` of dispatch_ffn_combine: enough for the proven bound where the deployment has none."""
    rows = max_output_size(spec, deployment, premises)
    return rows if rows is None or deployment.max_output_size else rows * counts_of_a_row(spec.quantisation)


def _tokens_and_experts(inputs: _Inputs, deployment: Deployment) -> dict[str, Any]:
    """The first arguments of each."""
    return {
        "x": inputs.x,
        "w13": inputs.w13,
        "w2": inputs.w2,
        "ids": inputs.ids,
        "weights": inputs.weights,
        "group": deployment.mc2_group,
    }


def _optional(spec: BlockSpec, inputs: _Inputs, *, says_format: bool) -> dict[str, Any]:
    """Scales, compensation and mask, as far as the block has them."""
    optional: dict[str, Any] = {}
    if spec.format.quantised:
        optional = {"quantisation": spec.quantisation} if says_format else {}
        optional.update(w13_scale=inputs.w13_scale, w2_scale=inputs.w2_scale)
    if spec.format.has_scale_bias and says_format:
        optional.update(w13_scale_bias=inputs.w13_scale_bias, w2_scale_bias=inputs.w2_scale_bias)
    return optional if inputs.mask is None else {**optional, "mask": inputs.mask}


def _ffn_arguments(
    spec: BlockSpec, deployment: Deployment, rank: int | None, premises: Premises, inputs: _Inputs
) -> dict[str, Any]:
    return {
        **_tokens_and_experts(inputs, deployment),
        "ep_size": spec.ep_size,
        "max_output_size": _ffn_rows(spec, deployment, premises),
        **({"swiglu_limit": spec.limit} if spec.format.quantised else {}),
        **_optional(spec, inputs, says_format=True),
    }


def _decode_arguments(
    spec: BlockSpec, deployment: Deployment, rank: int | None, premises: Premises, inputs: _Inputs
) -> dict[str, Any]:
    return {
        **_tokens_and_experts(inputs, deployment),
        "ep_size": spec.ep_size,
        "ep_rank": rank,
        "num_experts": spec.experts,
        "global_bs": global_tokens(spec),
        **_optional(spec, inputs, says_format=False),
    }


def _mega_arguments(
    spec: BlockSpec, deployment: Deployment, rank: int | None, premises: Premises, inputs: _Inputs
) -> dict[str, Any]:
    most = most_tokens(spec, premises)
    return {
        **_tokens_and_experts(inputs, deployment),
        "ep_size": spec.ep_size,
        "num_experts": spec.experts,
        # without a bound T itself, which then is refused as what it is: any number
        "max_tokens": tokens_per_rank(premises.tokens, spec) if most is None else most,
        "max_rows": max_output_size(spec, deployment, premises),
        **_optional(spec, inputs, says_format=True),
    }


def _bits_or_float(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales: int64 where they are stored as bits, else float32."""
    return dtype if dtype == torch.int64 else torch.float32


def _float(dtype: torch.dtype) -> torch.dtype:
    return torch.float32


TARGETS = (
    FusedOperator("mega_moe", 1, "cann_ops_transformer", _mega_arguments, _bits_or_float, max_output_size),
    FusedOperator("dispatch_ffn_combine", 1, "vllm_ascend", _ffn_arguments, _bits_or_float, _ffn_rows),
    FusedOperator("dispatch_gmm_combine_decode", 2, "vllm_ascend", _decode_arguments, _float),
)


def _rules(spec: BlockSpec, deployment: Deployment) -> Rules:
    return Rules(
        "fused_mc2",
        {
            "ep_size": spec.ep_size,
            "quantisation": spec.quantisation,
            "smooth_scales": spec.smooth_scales,
            "clips_activations": spec.has_h_clip,
            "zero_experts": spec.zero_experts,
            "mixed_forms": spec.mixed_forms,
            "shared_expert_rank_num": spec.shared_expert_ranks,
            "fused_mode": deployment.fused_mode,
            "hierarchy": deployment.mc2_hierarchy,
            "has_communicator": bool(deployment.mc2_group),
            "communicator_is_shared": deployment.mc2_group in spec.collective_groups,
            "counts_read_before_combine": spec.counts_read_before_combine,
        },
    )


def _forms(deployment: Deployment) -> tuple[Form, ...]:
    """The targets of the deployment's mode whose provider is declared; of the mode when none is."""
    mode = deployment.fused_mode or 1  # 0 is refused by a rule of its own (fused.mode)
    targets = [target for target in TARGETS if target.mode == mode] or list(TARGETS)  # a mode that fused.mode refuses
    declared = [target for target in targets if deployment.provider(target.provider) is not None]
    # without a provider, the operator that vllm-ascend brings is the one to ask for
    return tuple(target.form() for target in declared or targets[-1:])


FUSED_MC2 = Implementation("fused_mc2", _rules, _forms)
