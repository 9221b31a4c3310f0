"""Quantities for rules that are not about a call: those of the pseudo-operator ``deployment``, and those of a routing.

``legality`` reads the first for every block, ``lower_route`` the second. Quantities of a call come from ``context``; those of
an implementation's own rules stand in its file.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.deployment import Deployment
from moe_lowering.limits import Prover
from moe_lowering.limits.calls.tensors import shared_dtype
from moe_lowering.passes.blocks import BlockSpec, RouteSpec
from moe_lowering.passes.operator_calls import Rules
from moe_lowering.passes.token_ranges import is_strict, known_range, must_vary, size_hint


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _may_be_padded(spec: BlockSpec, tokens: Any, prover: Prover) -> bool:
    """Whether some rank of a TP group may get a repeated token, because T is no multiple of the group's size."""
    tp = spec.tp_size
    return tp > 1 and not prover.equal(tokens, tokens // tp * tp)


def strict_share_of_one(tp_size: int, tokens: Any) -> bool:
    """Whether a TP rank's share of T may be 1 where T forbids the guard that meta functions add then: in a strict range, and
    where T is marked dynamic and that guard would leave a single T."""
    if tp_size == 1 or not isinstance(tokens, torch.SymInt):
        return False
    low = known_range(tokens).low
    if is_strict(tokens):
        return low <= tp_size
    started_at = size_hint(tokens)
    return started_at is not None and low == started_at == tp_size and must_vary(tokens)


def deployment_rules(spec: BlockSpec, deployment: Deployment) -> Rules:
    """Whether the block was written for the deployment, and what binds every implementation.

    With shared-expert ranks these are the quantities of a rank with routed experts, on every rank: it holds no fewer
    experts than the others, and has room for no fewer rows (one for each token of every rank at least, where those get at
    most one).
    """
    fixed = _deployment_quantities(spec, deployment)
    return Rules(
        "deployment",
        lambda premises: {
            **fixed,
            "has_torch_npu": premises.torch_npu,
            "block_tokens": premises.tokens,
            "tp_counts": spec.counts_are_read and _may_be_padded(spec, premises.tokens, premises.prover),
            # with unequal T the range of this rank alone must not enter the decision; ``legality.refusal`` reads it
            "strict_share_of_one": deployment.equal_tokens and strict_share_of_one(spec.tp_size, premises.own_tokens),
        },
    )


def _deployment_quantities(spec: BlockSpec, deployment: Deployment) -> dict[str, Any]:
    """The quantities that do not depend on T."""
    return {
        "ep_size": spec.ep_size,
        "ep_group": spec.ep_group,
        "tp_size": spec.tp_size,
        "experts": spec.experts,
        "block_max_tokens": spec.max_tokens,
        "shared_expert_num": spec.shared_experts,
        "shared_expert_rank_num": spec.shared_expert_ranks,
        "deployment_ep_size": deployment.ep_size,
        "deployment_ep_group": deployment.ep_group,
        "deployment_tp_size": deployment.tp_size,
        "deployment_token_bound": deployment.token_bound,
        "deployment_max_tokens": deployment.max_tokens,
        "deployment_shared_experts": deployment.shared_experts,
        "deployment_shared_expert_ranks": deployment.shared_expert_ranks,
        "mode": deployment.mode,
        "quantisation": spec.quantisation,
        "quantised_input": spec.quantised_input,
        "scopes_differ": spec.scopes_differ,
        "x_dtype": "int8" if spec.quantised_input else dtype_name(spec.dtype),
        "result_dtype": dtype_name(spec.dtype),
        "weight_dtype": shared_dtype([*spec.tensors.w13.kinds, *spec.tensors.w2.kinds]),
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
