"""MoE layers of vllm-ascend: whether one can be written with the generic operators, and the change that makes it so.

``read_layer`` says whether, ``take_over`` changes the layer. A layer (``AscendFusedMoE``, vllm-ascend 0.23.0) is read
after its weights are loaded. Nothing is guessed: a layer with a feature that is not known here keeps vllm-ascend's
operator, and ``Refused`` says why. Meaning of the attributes: vllm-ascend's ``ops/fused_moe/fused_moe_0_23_0.py``
(``forward_impl``), ``experts_selector.py`` and ``moe_mlp.py``.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

from moe_lowering.deployment import Deployment
from moe_lowering.functional import moe_experts, route
from moe_lowering.integrations.vllm_refusals import refuse
from moe_lowering.integrations.vllm_weights import Scheme, scheme_of, tensors_of

# vLLM's names of activations -> ours; the gate is the first half of w13.
ACTIVATIONS = {"silu": "swiglu"}
SCORINGS = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class LayerForm:
    """How a layer routes and computes: constants of the trace.

    Attributes:
        top_k, scoring, renormalize, num_groups, topk_groups, scale: as for ``route``.
        num_experts: on all ranks, redundant ones included.
        activation: one of ours.
        weight_on_input: multiply the tokens by their weight before the experts.
        scheme: how the experts are kept.
        deployment: the groups that the layer's experts are spread over.
    """

    top_k: int
    scoring: str
    renormalize: bool
    num_groups: int
    topk_groups: int
    scale: float | None
    num_experts: int
    activation: str
    weight_on_input: bool
    scheme: Scheme
    deployment: Deployment


def read_layer(layer: Any, deployment: Deployment) -> LayerForm:
    """What a layer computes.

    Raises:
        Refused: something that this package does not compute, or that is not known.
    """
    _check_features(layer)
    scheme = scheme_of(layer)
    groups, kept = layer.num_expert_group or 1, layer.topk_group or 1
    if layer.scoring_func not in SCORINGS or (layer.scoring_func == "sigmoid" and not layer.renormalize):
        value = f"{layer.scoring_func}, renormalize {layer.renormalize}"
        raise refuse("scoring", "the scoring", value, "softmax, or sigmoid with renormalize")
    name = getattr(layer.activation, "value", layer.activation)
    if name not in ACTIVATIONS:
        raise refuse("activation", "the activation", name, ", ".join(ACTIVATIONS))
    scale = float(layer._original_routed_scaling_factor)
    return LayerForm(
        top_k=int(layer.top_k),
        scoring=layer.scoring_func,
        renormalize=bool(layer.renormalize),
        num_groups=int(groups),
        topk_groups=int(kept),
        scale=None if scale == 1.0 else scale,
        num_experts=int(layer.global_num_experts),
        activation=ACTIVATIONS[name],
        weight_on_input=bool(layer.apply_router_weight_on_input),
        scheme=scheme,
        deployment=deployment,
    )


def _check_features(layer: Any) -> None:
    """Refuse what changes the layer's meaning and has no place in the generic operators, or none yet."""
    present = {
        "custom_routing": ("a routing function of the model's own", layer.custom_routing_function),
        "hash_routing": ("a table of experts for token ids", layer.tid2eid),
        "zero_experts": ("the number of zero experts", getattr(layer, "zero_expert_num", 0)),
        "dynamic_eplb": ("dynamic expert load balancing", layer.dynamic_eplb),
        "mix_placement": ("mix_placement", layer.mix_placement),
        "swiglu_limit": ("the limit of the activation", layer.swiglu_limit),
        "bias": ("biases of the experts", layer.moe_config.has_bias),
        "overlap_gate": ("multistream_overlap_gate", layer.multistream_overlap_gate),
        "overlap_shared": ("multistream_overlap_shared_expert", layer.multistream_overlap_shared_expert),
        "sequence_parallel": ("sequence parallelism", layer.moe_config.is_sequence_parallel),
        "shared_expert_dp": ("enable_shared_expert_dp", layer.enable_shared_expert_dp),
        "weight_lists": ("a tensor for each expert", getattr(layer, "w13_weight_list", None)),
    }
    for code, (what, value) in present.items():
        if value:
            raise refuse(code, what, "there" if isinstance(value, (list, Tensor)) or callable(value) else value, "none")
    if (context := getattr(layer.moe_config, "pcp_size", 1)) > 1:
        raise refuse("context_parallel", "the context parallel size", context, "1")
    if layer.moe_config.tp_size > 1 and layer.ep_size == 1:
        accepted = "1, or enable_expert_parallel=True"
        raise refuse("tensor_parallel", "the tensor parallel size of the experts", layer.moe_config.tp_size, accepted)


def compute_layer(layer: Any, form: LayerForm, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
    """The routed experts of a layer in generic operators: [T, H], logits [T, E] -> [T, H], complete on every TP rank."""
    weights, ids = route(
        router_logits,
        form.top_k,
        bias=layer.e_score_correction_bias,
        scoring=form.scoring,
        renormalize=form.renormalize,
        num_groups=form.num_groups,
        topk_groups=form.topk_groups,
        scale=form.scale,
    )
    tensors = tensors_of(layer, form.scheme)
    return moe_experts(
        hidden_states,
        weights,
        ids,
        tensors["w13"],
        tensors["w2"],
        quantisation=form.scheme.quantisation,
        w13_scale=tensors.get("w13_scale"),
        w2_scale=tensors.get("w2_scale"),
        w13_scale_bias=tensors.get("w13_scale_bias"),
        w2_scale_bias=tensors.get("w2_scale_bias"),
        num_experts=form.num_experts,
        activation=form.activation,
        deployment=form.deployment,
        apply_router_weight_on_input=form.weight_on_input,
        log2phy=layer.log2phy,
    )


def take_over(layer: Any, form: LayerForm) -> None:
    """Let a layer trace to the generic operators inside of a compile; outside of one it keeps vllm-ascend's operator.

    Replaced, on the layer's runner: what it calls for ``torch.ops.vllm.moe_forward``, and what reduces the result over the TP
    group, which is complete here.
    """
    runner = layer.runner
    opaque, reduce_output = runner._forward_entry, runner._maybe_reduce_final_output
    reduce_shared = importlib.import_module("vllm.distributed").tensor_model_parallel_all_reduce
    tp = form.deployment.tp_size

    def forward_entry(
        hidden_states: Tensor,
        router_logits: Tensor,
        shared_experts_input: Tensor | None,
        input_ids: Tensor | None,
        layer_name: Any,
        hidden_dim_unpadded: int,
    ) -> Any:
        if not torch.compiler.is_compiling():
            name = layer.layer_name  # it is not counted among vLLM's opaque layers
            return opaque(hidden_states, router_logits, shared_experts_input, input_ids, name, hidden_dim_unpadded)
        logits = router_logits
        if layer.is_internal_router:
            logits = torch.nn.functional.linear(hidden_states.float(), layer.gate.weight_fp32)
        routed = compute_layer(layer, form, hidden_states, logits)
        if layer._shared_experts is None:
            return routed
        shared = layer._shared_experts(hidden_states if shared_experts_input is None else shared_experts_input)
        return (reduce_shared(shared) if tp > 1 else shared), routed

    def reduce_final_output(states: Tensor, trunc_size: int) -> Any:
        return states[..., :trunc_size] if torch.compiler.is_compiling() else reduce_output(states, trunc_size)

    runner._forward_entry, runner._maybe_reduce_final_output = forward_entry, reduce_final_output
