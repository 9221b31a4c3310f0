"""The named quantities of a block in a deployment: what the limit tables read."""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.custom_ops.sizes import ceil_div
from moe_lowering.deployment import Deployment
from moe_lowering.limits import Prover
from moe_lowering.limits.calls.tensors import data_dependent, shared_dtype
from moe_lowering.passes.blocks import BlockSpec, RouteSpec
from moe_lowering.passes.operands import weight_format
from moe_lowering.passes.token_ranges import hint, is_strict, known_range, must_vary
from moe_lowering.providers import same_version


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def max_output_size(spec: BlockSpec, deployment: Deployment, most: int | None) -> int | None:
    """Rows that a fused operator may process on one rank: the deployment's, else the receive bound proven from ``most``
    tokens; None when there is none."""
    if deployment.max_output_size:
        return deployment.max_output_size
    return None if most is None else spec.ep_size * most * min(spec.top_k, spec.local_experts)


def most_tokens(spec: BlockSpec, tokens: Any, prover: Prover) -> int | None:
    """The proven bound on the tokens that one rank works on; None when there is none."""
    _, most = prover.bounds(spec.max_tokens or tokens)
    return None if most is None else ceil_div(most, spec.tp_size)


def _padded(spec: BlockSpec, tokens: Any, prover: Prover) -> bool:
    """Whether some rank of a TP group may get a repeated token, because T is no multiple of the group's size."""
    tp = spec.tp_size
    return tp > 1 and not prover.equal(tokens, tokens // tp * tp)


def _buffers_are_shorter(spec: BlockSpec, deployment: Deployment, most: int | None) -> bool:
    """Whether ``max_rows`` is less than the rows that a rank may have for another one, or may be (``most`` None: no bound).

    Not in GE mode where T varies: torchair converts no minimum of sizes.
    """
    if deployment.mode == "ge" and not spec.max_tokens and not isinstance(spec.tokens, int):
        return False
    return bool(spec.max_rows) and (most is None or spec.max_rows < most * min(spec.top_k, spec.local_experts))


def strict_share_of_one(spec: BlockSpec) -> bool:
    """Whether a TP rank's share of T may be 1 where T forbids the guard that meta functions add then: in a strict range, and
    where T is marked dynamic and that guard would leave a single T."""
    if spec.tp_size == 1 or not isinstance(spec.tokens, torch.SymInt):
        return False
    low = known_range(spec.tokens).low
    if is_strict(spec.tokens):
        return low <= spec.tp_size
    started_at = hint(spec.tokens)
    return started_at is not None and low == started_at == spec.tp_size and must_vary(spec.tokens)


def block_quantities(
    spec: BlockSpec, deployment: Deployment, tokens: Any, prover: Prover, torch_npu: bool
) -> dict[str, Any]:
    """Quantities of a block, as the operators of every implementation would be called for it.

    ``tokens`` is T as the rules see it (``deciding``). The operators see a rank's share of it. With shared-expert ranks
    these are the quantities of a rank with routed experts, on every rank: it holds no fewer experts than the others, and
    has room for no fewer rows (one for each token of every rank at least, where those get at most one).
    """
    most = ceil_div(spec.max_tokens or tokens, spec.tp_size)
    proven = most_tokens(spec, tokens, prover)
    rows = max_output_size(spec, deployment, proven)
    return {
        "block_tokens": tokens,
        "tokens": ceil_div(tokens, spec.tp_size),
        "max_tokens": most,
        "tp_counts": spec.counts_are_read and _padded(spec, tokens, prover),
        # with unequal T a range of this rank alone takes no part in the decision: judging.refusal
        "strict_share_of_one": deployment.equal_tokens and strict_share_of_one(spec),
        **expert_quantities(spec, deployment),
        "top_k": spec.top_k,
        "experts": spec.experts,
        "ep_size": spec.ep_size,
        "ep_group": spec.ep_group,
        "tp_size": spec.tp_size,
        "block_max_tokens": spec.max_tokens,
        "x_dtype": "int8" if spec.quantised_input else dtype_name(spec.dtype),
        "result_dtype": dtype_name(spec.dtype),
        "ids_dtype": "int32",
        "has_mask": spec.has_mask,
        "quantised_input": spec.quantised_input,
        "data_dependent_bound": spec.max_tokens > 0 and data_dependent([spec.tokens]),
        "data_dependent_capacity": not spec.max_tokens and data_dependent([spec.tokens]),
        "counts_are_read": spec.counts_are_read,
        "scopes_differ": spec.scopes_differ,
        "counts_read_before_combine": spec.counts_read_before_combine,
        "counts_read_before_weights": spec.counts_read_before_weights,
        "has_communicator": bool(deployment.mc2_group),
        "communicator_is_shared": deployment.mc2_group in spec.collective_groups,
        "group_length": len(deployment.mc2_group) or None,  # has_communicator says it better
        "buffer_bytes": deployment.hccl_buffer_bytes,
        **provider_quantities(deployment),
        "capture": deployment.capture,
        "mode": deployment.mode,
        "fused_mode": deployment.fused_mode,
        "mask_is_prefix": deployment.mask_is_prefix,
        "equal_tokens": deployment.equal_tokens,
        "has_torch_npu": torch_npu,
        "received": spec.ep_size * most * min(spec.top_k, spec.local_experts),
        "most_tokens": proven,
        "max_rows": spec.max_rows,
        "buffers_are_shorter": _buffers_are_shorter(spec, deployment, proven),
        "max_output_size": rows,
        "has_receive_bound": rows is not None,
        "deployment_ep_size": deployment.ep_size,
        "deployment_ep_group": deployment.ep_group,
        "deployment_tp_size": deployment.tp_size,
        "deployment_token_bound": deployment.token_bound,
        "deployment_max_tokens": deployment.max_tokens,
        # what our calls pass to init_routing_v2
        "expert_tokens_num_type": 1,
        # and to MC2's dispatch and combine
        "global_bs": ceil_div(spec.max_tokens, spec.tp_size) * spec.ep_size,
        "quant_mode": 0,
        "comm_quant_mode": 0,
        "hierarchy": deployment.mc2_hierarchy,
        "comm_alg": "hierarchy" if deployment.mc2_hierarchy else "",
        "expert_token_nums_type": 1,
        "group_tp_is_group_ep": deployment.chip.graph_mode_group_tp and deployment.mode == "ge",
        "tp_world_size": deployment.chip.two_level_tp_world if deployment.mc2_hierarchy else 0,
        "has_weights": deployment.weighs_before_sending,
        "has_expand_scales": deployment.weighs_before_sending,
        "weights_dtype": "float32",
        "has_smooth_scales": False,
        "weight_on_input": False,
        "has_expert_map": False,
        "has_block_map": True,
        "special_experts": 0,
        "shared_expert_num": spec.shared_experts,
        "shared_expert_rank_num": spec.shared_expert_ranks,
        "deployment_shared_experts": deployment.shared_experts,
        "deployment_shared_expert_ranks": deployment.shared_expert_ranks,
        "expert_shard_type": 0,
    }


def provider_quantities(deployment: Deployment) -> dict[str, Any]:
    """The providers as they are declared, and what is installed of those; None where there is nothing to compare."""
    found: dict[str, Any] = {}
    here = {name: (version, build) for name, version, build in deployment.installed or ()}
    for name in ("vllm_ascend", "cann_ops_transformer"):
        declared = deployment.provider(name)
        found[f"has_{name}"] = declared is not None
        version, build = here.get(name, (None, None)) if declared is not None else (None, None)
        found[f"{name}_declared"] = declared
        found[f"{name}_installed"] = version
        found[f"{name}_is_as_declared"] = version and declared and same_version(version, declared)
        found[f"{name}_build"] = build or None
        found[f"{name}_is_built_for_soc"] = build == deployment.soc if build else None
    return found


def expert_quantities(spec: BlockSpec, deployment: Deployment) -> dict[str, Any]:
    """Those of a block's experts, and of what our calls pass to the grouped matmuls: T is in none of them."""
    return {
        "hidden": spec.hidden,
        "intermediate": spec.intermediate,
        "local_experts": spec.local_experts,
        "groups": spec.local_experts,
        "weight_dtype": shared_dtype([*spec.tensors.w13.kinds, *spec.tensors.w2.kinds]),
        "activation": spec.activation,
        "interleaved": spec.interleaved,
        "has_bias": spec.has_bias,
        "quantisation": spec.quantisation,
        **_scales(spec),
        "stacked": spec.stacked,
        "mixed_forms": spec.mixed_forms,
        "weights_contiguous": spec.weights_contiguous,
        "weight_format": weight_format(deployment, spec.tensors.w13, spec.tensors.w2),
        "single_weight": spec.stacked,
        "quantised": False,
        "form": "none",
        "group_type": 0,
        "group_list_type": 1,
        "split_item": 2,
        "n": max(2 * spec.intermediate, spec.hidden),
    }


def _scales(spec: BlockSpec) -> dict[str, Any]:
    """What the fused operators read of scales and compensation."""
    quantised = bool(spec.scale_dtypes)
    kinds = [*spec.tensors.w13_scale.kinds, *spec.tensors.w2_scale.kinds]
    return {
        "has_scales": len(spec.scale_dtypes) == 2,
        "scale_dtype": shared_dtype(kinds) if kinds else None,
        "w13_scale_count": spec.local_experts * 2 * spec.intermediate if quantised else None,
        "w2_scale_count": spec.local_experts * spec.hidden if quantised else None,
        "has_offset": spec.has_offset,
        "has_scale_bias": spec.has_scale_bias,
        "weight_count": spec.tensors.w13.count,
    }


GROUP_SELECT_MODES = {"max": 0, "top2_sum": 1}
NORM_TYPES = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}


def route_quantities(spec: RouteSpec) -> dict[str, Any]:
    """Quantities of a routing, as ``npu_moe_gating_top_k`` would be called for it."""
    return {
        "x_dtype": "float32",
        "tokens": spec.rows,
        "experts": spec.experts,
        "top_k": spec.top_k,
        "group_count": spec.num_groups,
        "k_group": spec.topk_groups,
        "group_select_mode": GROUP_SELECT_MODES[spec.group_score],
        "norm_type": NORM_TYPES[spec.scoring],
        "renorm": 0,
        "renormalize": spec.renormalize,
        "has_bias": spec.has_bias,
    }
