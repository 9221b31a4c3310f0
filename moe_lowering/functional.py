"""The functions that models call to use the generic operators: ``route``, ``moe_experts`` and ``check_expert_map``.

They check arguments in the caller's words, bring them to the operators' dtypes and forms, and trace to
``torch.ops.moe_lowering.*``. ``layers.MoE`` and the integration with transformers are written with them.

Float arguments default to None: with ``dynamic=True`` dynamo turns a float default, like a float attribute, into an
input of the graph, finds that an operator wants it as a constant, and calls the backend a second time.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from moe_lowering import custom_ops as _custom_ops  # registers the operators
from moe_lowering.argument_checks import require_instance, require_integer
from moe_lowering.custom_ops import one_rank
from moe_lowering.deployment import Deployment
from moe_lowering.expert_maps import compare_map, rank_of
from moe_lowering.groups import Claim, own_ranks
from moe_lowering.model_arguments import (
    Weights,
    as_int32,
    as_list,
    as_routing_weights,
    check_experts_options,
    check_experts_tensors,
    check_route,
    check_tokens,
    check_weight_dtypes,
    list_matrices,
    one_rank_key,
    physical_ids,
    weigh_tokens,
)
from moe_lowering.vocabulary import EXPERT_FORMATS, swiglu_alpha

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["check_expert_map", "moe_experts", "route"]

_ops = torch.ops.moe_lowering
_SINGLE_RANK = Deployment()
assert _custom_ops

_COUNTS = 1  # Ascend's group_list_type: rows of each expert, not prefix sums


def route(
    logits: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    scoring: str = "softmax",
    renormalize: bool = True,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2_sum",
    scale: float | None = None,
    epsilon: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose ``top_k`` experts for each token.

    Source: ops_transformer.gating: scores, groups, ties and the epsilon.

    Args:
        logits: router scores [..., E], float32, float16 or bfloat16; computed with in float32.
        bias: [E], added to the scores to choose experts, not to their weights (DeepSeek-V3's correction bias).
        scoring: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``.
        renormalize: divide a token's weights by their sum.
        num_groups, topk_groups, group_score: keep the best ``topk_groups`` of ``num_groups`` equal groups of experts,
            by their largest score (``max``) or by the sum of the two largest (``top2_sum``).
        scale: factor of the weights; 1 when None.
        epsilon: is added to that sum; 1e-20 when None. 0 is what models without one compute.

    Returns:
        weights [..., top_k] float32 and ids [..., top_k] int32, largest first; the lower id first among equals.

    Raises:
        ValueError, TypeError: an argument out of range, with its value and what is accepted.
    """
    integers = {"top_k": top_k, "num_groups": num_groups, "topk_groups": topk_groups}
    check_route(logits, bias, integers, {"scoring": scoring, "group_score": group_score}, renormalize, scale, epsilon)
    factor = 1.0 if scale is None else scale
    options = (scoring, renormalize, num_groups, topk_groups, group_score, factor)
    if epsilon is None:
        return _ops.route.default(logits, bias, top_k, *options)
    return _ops.route.default(logits, bias, top_k, *options, epsilon)


class _Options(TypedDict, total=False):
    """The keyword arguments of ``moe_experts``, for its two result types."""

    num_experts: int | None
    w13_bias: Weights | None
    w2_bias: Weights | None
    activation: str
    limit: float | None
    alpha: float | None
    interleaved: bool
    mask: Tensor | None
    deployment: Deployment | None
    quantisation: str
    w13_scale: Weights | None
    w2_scale: Weights | None
    w13_offset: Weights | None
    w2_offset: Weights | None
    w13_scale_bias: Weights | None
    w2_scale_bias: Weights | None
    pertoken_scale: Tensor | None
    out_dtype: torch.dtype | None
    need_trans: bool
    apply_router_weight_on_input: bool
    log2phy: Tensor | None
    expert_map: Tensor | None


@overload
def moe_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    w13: Weights,
    w2: Weights,
    *,
    return_counts: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def moe_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    w13: Weights,
    w2: Weights,
    *,
    return_counts: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor, int]: ...


def moe_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    w13: Weights,
    w2: Weights,
    *,
    num_experts: int | None = None,
    w13_bias: Weights | None = None,
    w2_bias: Weights | None = None,
    activation: str = "swiglu",
    limit: float | None = None,
    alpha: float | None = None,
    interleaved: bool = False,
    mask: Tensor | None = None,
    deployment: Deployment | None = None,
    quantisation: str = "none",
    w13_scale: Weights | None = None,
    w2_scale: Weights | None = None,
    w13_offset: Weights | None = None,
    w2_offset: Weights | None = None,
    w13_scale_bias: Weights | None = None,
    w2_scale_bias: Weights | None = None,
    pertoken_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    need_trans: bool = False,
    apply_router_weight_on_input: bool = False,
    log2phy: Tensor | None = None,
    expert_map: Tensor | None = None,
    return_counts: bool = False,
) -> Tensor | tuple[Tensor, Tensor, int]:
    """Send tokens to their experts, run the experts, and sum the weighted results: dispatch, grouped_mlp, combine.

    y = sum over k of weight * (act(x @ w13[id]) @ w2[id]), each stage rounded once (docs/architecture.md, "Generic operators").
    Names and words of arguments follow the interface that this generalises. Source: vllm_ascend_0_13.comm_method: fused_experts.

    Args:
        x: tokens [..., H], float32, float16 or bfloat16; or int8 with ``pertoken_scale``.
        weights, ids: [..., k], floats and integers; used in float32 and int32. Ids of one token are distinct.
        w13: gate and up projection of this rank's experts, [E_local, H, 2I] or E_local tensors [H, 2I]. A shared-expert
            rank (``deployment.on_shared_rank``) gives those of its shared expert, as its only one. They must be in the
            form, dtypes and I of the routed experts: a rank sees its own weights only, and all ranks must decide alike. A
            shared expert that is n times as wide is n shared experts.
        w2: down projection, [E_local, I, H] or E_local tensors [I, H].
        num_experts: routed experts on all ranks, redundant ones included; when None E_local * ep_size. Must be given
            where the deployment has shared-expert ranks, whose weights do not say it.
        w13_bias, w2_bias: [E_local, 2I] and [E_local, H], or lists.
        activation, limit, alpha, interleaved: see ``docs/architecture.md``. ``limit`` (none: 0 or None) is for
            ``swiglu_clamp`` and ``swiglu_oai``, ``alpha`` (1.702 when None) for ``swiglu_oai``; ``interleaved`` says
            that w13's columns alternate gate and up.
        mask: [...] bool; tokens with False are not sent, and their result is zero.
        deployment: groups and bounds; one rank when None.
        quantisation: ``none``, ``w8a8``, ``w4a8`` or ``w4a16``. Weights are then int8, or int32 that hold eight int4 along
            their last axis, with ``w13_scale`` [E_local, 2I] and ``w2_scale`` [E_local, H]; ``w4a16`` may have offsets of
            the same shapes, ``w4a8`` scale biases. ``moe_lowering.quantisation`` makes them all.
        pertoken_scale: [...] float32, the scales of int8 tokens. ``out_dtype`` is then the dtype of y.
        need_trans: w13 is [E_local, 2I, H] and w2 [E_local, H, I]; not for packed int4.
        apply_router_weight_on_input: multiply x by its weight before it is sent, instead of the expert's result. k is 1.
            Not with shared-expert ranks.
        log2phy: [logical experts] int32 or int64: ``ids`` are logical, and expert i is the physical expert log2phy[i].
        expert_map: see ``check_expert_map``, which is called with it. Under torch.compile that happens once, with the
            first map.
        return_counts: return (y, counts, 1): rows of each local expert, int64 [E_local], and Ascend's group_list_type
            for counts.

    Returns:
        y [..., H] of x's dtype (of ``out_dtype`` for int8), complete on every rank of the TP group.

    Raises:
        ValueError, TypeError: an argument out of range, with its value and what is accepted; ``deployment`` contradicts a
            process group (another rank's).
        RuntimeError: a rank receives more rows than ``deployment.max_rows`` (CPU only).
    """
    quantisers = {
        "w13_scale": w13_scale,
        "w2_scale": w2_scale,
        "w13_offset": w13_offset,
        "w2_offset": w2_offset,
        "w13_scale_bias": w13_scale_bias,
        "w2_scale_bias": w2_scale_bias,
    }
    place = _SINGLE_RANK if deployment is None else deployment
    key = None
    if not torch.compiler.is_compiling():  # 1. one rank on CPU, whose like was checked before: no operator is called
        absent = (w13_bias, w2_bias, mask, pertoken_scale, out_dtype, log2phy, expert_map, *quantisers.values())
        options = (num_experts, quantisation, need_trans, apply_router_weight_on_input, return_counts)
        layer = one_rank.Layer(x, weights, ids, w13, w2, activation, limit, alpha, interleaved)
        key = one_rank_key(layer, absent, options, place)
        y = None if key is None else one_rank.compute(layer, key)
        if y is not None:
            return y

    # 2. checks in the caller's words
    check_experts_tensors(
        {"x": x, "weights": weights, "ids": ids},
        {"w13": w13, "w2": w2},
        {"w13_bias": w13_bias, "w2_bias": w2_bias, **quantisers},
        {"mask": mask, "pertoken_scale": pertoken_scale, "log2phy": log2phy, "expert_map": expert_map},
    )
    flags = {"interleaved": interleaved, "need_trans": need_trans}
    flags |= {"apply_router_weight_on_input": apply_router_weight_on_input, "return_counts": return_counts}
    words = {"activation": activation, "quantisation": quantisation}
    check_experts_options(flags, {"limit": limit, "alpha": alpha}, num_experts, words, deployment)
    if place.ep_size > 1:
        _check_places(place.places)
    check_tokens(x, pertoken_scale, quantisation, out_dtype)
    scales = {"w13_scale": w13_scale, "w2_scale": w2_scale}
    check_weight_dtypes(x, quantisation, scales, w13=w13, w2=w2)

    # 3. arguments as the operators take them
    w13, w2 = (list_matrices(name, w, need_trans, quantisation) for name, w in (("w13", w13), ("w2", w2)))
    if num_experts is None:
        num_experts = _all_experts(w13, place)
    if expert_map is not None:  # index: a constant for dynamo also where E is a dynamic size of w13
        compare_map(expert_map, operator.index(num_experts), *rank_of(place))
    weights, ids = as_routing_weights(weights), as_int32("ids", ids)
    if log2phy is not None:
        ids = physical_ids(ids, log2phy)
    if apply_router_weight_on_input:
        x, pertoken_scale, weights = weigh_tokens(x, pertoken_scale, weights.float(), place)
    experts = (w13, w2, as_list(w13_bias), as_list(w2_bias))
    function = (activation, 0.0 if limit is None else limit, swiglu_alpha() if alpha is None else alpha, interleaved)
    quantised = _quantised_arguments(quantisation, quantisers, out_dtype)
    y, counts = _run_stages(
        x, pertoken_scale, weights, ids, mask, num_experts, place, (*experts, *function, *quantised)
    )
    if key is not None:
        one_rank.remember(key)
    return (y, counts, _COUNTS) if return_counts else y


def _quantised_arguments(
    quantisation: str, quantisers: Mapping[str, Weights | None], out_dtype: torch.dtype | None
) -> tuple[Any, ...]:
    """What ``grouped_mlp`` takes from ``quantisation`` on; nothing of float weights, whose calls have no such arguments."""
    if not EXPERT_FORMATS[quantisation].quantised and all(tensors is None for tensors in quantisers.values()):
        return ()
    return (quantisation, *(as_list(tensors) or None for tensors in quantisers.values()), out_dtype)


def _run_stages(
    x: Tensor,
    pertoken_scale: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    num_experts: int,
    place: Deployment,
    mlp: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """``dispatch``, ``grouped_mlp`` and ``combine``: y [..., H], and the rows of each local expert.

    Args:
        mlp: what ``grouped_mlp`` takes after the rows, their scales and counts.
    """
    groups = (place.ep_group, place.ep_size, place.tp_group, place.tp_size, place.token_bound)
    shared = (place.shared_expert_ranks, place.shared_experts) if place.shared_expert_ranks else ()
    on_shared = (*shared, place.on_shared_rank) if shared else ()
    rows, row_scale, counts, handle = _ops.dispatch.default(
        x, pertoken_scale, ids, mask, num_experts, *groups, place.max_rows, *on_shared
    )
    rows = _ops.grouped_mlp.default(rows, row_scale, counts, *mlp)
    y = _ops.combine.default(rows, weights, ids, handle, mask, num_experts, *groups, *shared)
    return y, counts


def check_expert_map(expert_map: Tensor, num_experts: int, deployment: Deployment | None = None) -> None:
    """Refuse every placement of experts but the one that the operators have: rank r holds a block of E_local experts.

    Args:
        expert_map: [num_experts], as vLLM has it: the index on this rank of each expert that is here, -1 for the others.
            Of a fake or meta tensor only shape and dtype are looked at.
        num_experts: experts on all ranks.

    Raises:
        ValueError: ``expert_map`` is not 0 to E_local - 1 for experts [ep_rank * E_local, (ep_rank + 1) * E_local); with
            shared-expert ranks, routed experts begin at the first rank after them, which then counts as rank 0.
    """
    require_instance("check_expert_map", "expert_map", expert_map, Tensor, "an int32 or int64 tensor [num_experts]")
    require_integer("check_expert_map", "num_experts", num_experts, 1)
    if deployment is not None:
        require_instance("check_expert_map", "deployment", deployment, Deployment, "a moe_lowering.Deployment, or None")
    compare_map(expert_map, num_experts, *rank_of(_SINGLE_RANK if deployment is None else deployment.placed()))


@torch.compiler.assume_constant_result  # when it is traced: a string of constants, and no look-up in the graph
def _check_places(places: str) -> bool:
    """Compare ``Deployment.places`` with the process groups: the deployment may come from another rank."""
    ep, tp, mc2_group = json.loads(places)
    own_ranks(Claim(*ep), Claim(*tp), mc2_group)
    return True


def _all_experts(w13: list[Tensor], place: Deployment) -> int:
    """Routed experts of all ranks, from the weights of this one."""
    if place.shared_expert_ranks:  # on all ranks: otherwise the ranks that can tell raise, and the others wait for them
        raise ValueError(
            f"moe_experts: num_experts is None with {place.shared_expert_ranks} shared-expert ranks; accepted: the number of "
            "routed experts on all ranks"
        )
    local = w13[0].shape[0] if len(w13) == 1 and w13[0].dim() == 3 else len(w13)
    return local * place.ep_size
