"""``npu_moe_distribute_dispatch_v2`` > experts > ``npu_moe_distribute_combine_v2``: a whole block, written by hand.

The anchor is dispatch. Proven, each from literal arguments or by the identity of nodes:
1. dispatch is over the ranks that the deployment names, in this rank's place, for all of its experts, in the layout of rows
   and with the counts that the generic ``dispatch`` has; experts past these give nothing, or copies (``special_experts``);
2. the experts compute ``grouped_mlp`` (``match_npu_mlp``) on its rows, scales and counts;
3. combine takes these rows, the auxiliary tensors of this dispatch, and the same ids, mask and sizes;
4. nothing of it is read elsewhere, but for the counts.
``group_ep`` is a communicator's name: the deployment's ``mc2_group`` or ``ep_communicator``.

``npu_moe_distribute_combine_add_rms_norm`` may stand at the end of it (``normed_combine``).
The first versions of the two operators differ in the auxiliary tensor (``expand_idx``) and have fewer arguments. They become
version 2.
Sources: ops_transformer.dispatch, ops_transformer.combine, op_plugin.dispatch, op_plugin.combine: arguments;
recipes.fused_mlp: what is written.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.raise_foreign.chain_walk import (
    Walk,
    equal_values,
    has_argument,
    is_operator,
    other_operator,
    require,
    require_of,
    require_value,
    same_sizes,
    value_of,
)
from moe_lowering.passes.raise_foreign.group_lists import COUNTS, PREFIX_SUMS
from moe_lowering.passes.raise_foreign.match_npu_mlp import match_npu_experts
from moe_lowering.passes.raise_foreign.normed_combine import NORMED, read_norm
from moe_lowering.passes.raise_foreign.npu_chain import Chain
from moe_lowering.passes.raise_foreign.npu_matmuls import Experts
from moe_lowering.passes.raise_foreign.records import NotThisForm
from moe_lowering.passes.raise_foreign.special_experts import (
    SPECIAL,
    constant_experts,
    copied_tokens,
    require_special,
    special_experts,
)

DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"


@dataclasses.dataclass(frozen=True)
class Version:
    """One pair of operators: the form that reports name, what combine calls the auxiliary tensor, and the implementation that the
    pair is ("" for none)."""

    form: str
    dispatch: str
    combine: str
    auxiliary: str
    own: str
    alike: tuple[str, ...]


NO_QUANT, PER_TOKEN = 0, 2  # quant_mode
TWO_LEVELS = "hierarchy"
_ALIKE = (
    "group_ep", "ep_world_size", "ep_rank_id", "moe_expert_num", "x_active_mask", "global_bs", "shared_expert_rank_num",
)  # fmt: skip
SECOND = Version("mc2_v2", DISPATCH, COMBINE, "assist_info_for_combine", "mc2", (*_ALIKE, *SPECIAL))
WITH_NORM = Version("mc2_v2_norm", DISPATCH, NORMED, "expand_idx", "", (*_ALIKE, *SPECIAL))
FIRST = Version("mc2_v1", "npu_moe_distribute_dispatch", "npu_moe_distribute_combine", "expand_idx", "", _ALIKE)
# What only the first version of combine has, and its only meaning; shared_expert_x of it is documented in no source.
_OF_FIRST = {
    **dict.fromkeys(("activation_scale", "weight_scale", "group_list", "shared_expert_x"), (None,)),
    **dict.fromkeys(("out_dtype", "group_list_type"), (0,)),
}


def match_mc2_v1(dispatch: Node, deployment: Deployment) -> Chain:
    """As ``match_mc2``, of the operators' first versions."""
    require(dispatch, {"x_active_mask": (None,)})
    return match_mc2(dispatch, deployment, FIRST)


def match_mc2(dispatch: Node, deployment: Deployment, version: Version = SECOND) -> Chain:
    """The chain that begins with a dispatch.

    Raises:
        NotThisForm: it is none that the generic operators say.
    """
    walk = Walk()
    _check_dispatch(dispatch, deployment)
    made = _Dispatched(*walk.results(dispatch, 7))
    quantises = argument(dispatch, "quant_mode") == PER_TOKEN
    kind = argument(dispatch, "expert_token_nums_type")
    experts = match_npu_experts(walk, made.rows, made.scales if quantises else None, made.counts, kind, dispatch)
    if kind == PREFIX_SUMS:  # who else reads them would keep this dispatch
        walk.read_by(made.counts, "prefix sums", *walk.interior)
    _check_types(dispatch, experts)
    combine, rows = walk.onward(experts.result, "the experts' result")
    if version is SECOND and is_operator(combine, NORMED):
        version = WITH_NORM
    _check_combine(combine, dispatch, deployment, version)
    walk.add(combine)
    norm = read_norm(walk, combine) if version is WITH_NORM else None
    require_value(combine, "expand_x", rows)
    _check_handed_over(walk, dispatch, combine, made, version.auxiliary)
    if not quantises:
        walk.read_by(made.scales, "dispatch's scales")
    chain = Chain(
        form=version.form,
        own=version.own,
        walk=walk,
        dispatch=dispatch,
        experts=experts,
        combine=combine,
        sent=_sent(dispatch, deployment),
        weights=argument(combine, "expert_scales"),
        counts=made.counts if kind == COUNTS else None,
        x_smooth=argument(dispatch, "scales"),
    )
    if norm is not None:
        return dataclasses.replace(chain, combine=norm.first, norm=norm)
    shared = argument(combine, "shared_expert_x")
    added = () if shared is None else (shared,)
    return dataclasses.replace(chain, added=added, copied=copied_tokens(combine), constant=constant_experts(combine))


class _Dispatched(NamedTuple):
    """The results of a dispatch; None of those that nothing reads."""

    rows: Node | None
    scales: Node | None
    auxiliary: Node | None
    counts: Node | None
    received: Node | None
    tp_received: Node | None
    expand_scales: Node | None


def _check_handed_over(walk: Walk, dispatch: Node, combine: Node, made: _Dispatched, auxiliary: str) -> None:
    """What dispatch made for combine, which calls the auxiliary tensor ``auxiliary``, goes there and nowhere else."""
    for name, value in (
        ("expert_ids", argument(dispatch, "expert_ids")),
        (auxiliary, made.auxiliary),
        ("ep_send_counts", made.received),
    ):
        require_value(combine, name, value)
    _optional(combine, "tp_send_counts", made.tp_received)
    _optional(combine, "expand_scales", made.expand_scales)
    _own_weights(dispatch, combine)
    walk.read_by(made.auxiliary, "the auxiliary tensor", combine)
    walk.read_by(made.received, "numbers of rows", combine)
    walk.read_by(made.tp_received, "TP's numbers", combine)
    walk.read_by(made.expand_scales, "expand_scales", combine)


def _sent(dispatch: Node, deployment: Deployment) -> dict[str, Any]:
    """The arguments of the generic ``dispatch``."""
    mask = argument(dispatch, "x_active_mask")
    by_slot = mask is not None and value_of(mask).dim() == 2
    return {
        "x": argument(dispatch, "x"),
        "x_scale": None,
        "ids": argument(dispatch, "expert_ids"),
        "mask": None if by_slot else mask,
        "slot_mask": mask if by_slot else None,
        "num_experts": argument(dispatch, "moe_expert_num"),
        "zero_experts": special_experts(dispatch),
        "ep_group": deployment.ep_group,
        "ep_size": deployment.ep_size,
    }


def _check_dispatch(node: Node, deployment: Deployment) -> None:
    group = argument(node, "group_ep")
    if group not in deployment.communicators:
        known = ", ".join(map(repr, sorted(deployment.communicators))) or "none: give Deployment.ep_communicator"
        raise NotThisForm(node, "raise.other_group", f"{node.name}: group_ep is {group!r}", known)
    if deployment.ep_rank is None:
        raise NotThisForm(node, "raise.other_rank", deployment.unknown_rank, "this rank's place")
    require(node, {"ep_world_size": (deployment.ep_size,)}, "raise.other_group")
    require(node, {"ep_rank_id": (deployment.ep_rank,)}, "raise.other_rank")
    _check_tensor_parallel(node, group, deployment)
    require(node, {"expert_shard_type": (0,)})
    require_of(node, {"elastic_info": (None,), "performance_info": (None,)})
    require_special(node)
    require(node, {"shared_expert_rank_num": (0,)}, "raise.experts")
    require(node, {"expert_token_nums_type": (PREFIX_SUMS, COUNTS)}, "raise.counts")
    require(node, {"quant_mode": (NO_QUANT, PER_TOKEN)}, "raise.format")
    require_of(node, dict.fromkeys(("y_dtype", "x_dtype", "scales_dtype"), (None,)), "raise.format")
    _check_bound(node, deployment)
    _check_algorithm(node, deployment)
    if deployment.shared_expert_ranks:
        raise NotThisForm(
            node,
            "raise.experts",
            f"{node.name} has no shared-expert ranks, the deployment has some",
            "none on both sides",
        )
    mask, ids = argument(node, "x_active_mask"), value_of(argument(node, "expert_ids"))
    if mask is not None and value_of(mask).dim() != 1 and not same_sizes(value_of(mask), ids):
        shape = tuple(value_of(mask).shape)
        raise NotThisForm(node, "raise.literal", f"{node.name}: x_active_mask is {shape}", f"[T] or {tuple(ids.shape)}")


def _check_tensor_parallel(node: Node, group: str, deployment: Deployment) -> None:
    """TP within MC2 is no longer there: one rank of it, whose group may be named again (production code does)."""
    require(node, {"tp_world_size": (0, 1), "tp_rank_id": (0,), "group_tp": ("", group)})
    if deployment.tp_size != 1:
        raise NotThisForm(
            node,
            "raise.other_group",
            f"{node.name} sends this rank's tokens, the deployment has them on {deployment.tp_size} ranks",
            "tp_size 1",
        )


def _check_bound(node: Node, deployment: Deployment) -> None:
    """``global_bs`` 0 says that T is equal on all ranks, any other number is a bound times the ranks."""
    bound, ranks = deployment.max_tokens, deployment.ep_size
    accepted = [0] if deployment.equal_tokens else []
    if bound:
        accepted.append(bound * ranks)
    require(node, {"global_bs": accepted}, "raise.token_bound")


def _check_algorithm(node: Node, deployment: Deployment) -> None:
    """Sums are made in another order in two levels; all other algorithms make the same ones."""
    algorithm = argument(node, "comm_alg") if has_argument(node, "comm_alg") else ""
    if (algorithm == TWO_LEVELS) != deployment.mc2_hierarchy:
        accepted = repr(TWO_LEVELS) if deployment.mc2_hierarchy else f"any but {TWO_LEVELS!r}"
        raise NotThisForm(node, "raise.literal", f"{node.name}: comm_alg is {algorithm!r}", accepted)


def _check_types(dispatch: Node, experts: Experts) -> None:
    x, result = value_of(argument(dispatch, "x")), value_of(experts.result)
    if x.dim() != 2 or x.dtype != result.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        raise NotThisForm(
            dispatch,
            "raise.dtype",
            f"x is {x.dtype} {tuple(x.shape)}, the experts' result {result.dtype}",
            "[T, H] in bfloat16 or float16, both the same",
        )
    if value_of(argument(dispatch, "expert_ids")).dtype != torch.int32:
        raise NotThisForm(dispatch, "raise.dtype", f"{dispatch.name}: expert_ids is no int32", "int32")


def _check_combine(node: Node, dispatch: Node, deployment: Deployment, version: Version) -> None:
    if not is_operator(node, version.combine):
        raise other_operator(node, f"the experts' result goes to {call_name(node)}", f"npu.{version.combine}")
    for name in version.alike:
        combined, dispatched = argument(node, name), argument(dispatch, name)
        if not equal_values(combined, dispatched):
            raise NotThisForm(
                node,
                "raise.both_ends",
                f"{name} is {dispatched!r} at dispatch, {combined!r} at combine",
                "the same at both ends",
            )
    _check_tensor_parallel(node, argument(dispatch, "group_ep"), deployment)
    if version is FIRST:
        require(node, _OF_FIRST)
    elif argument(node, "comm_alg") == TWO_LEVELS:
        require_value(dispatch, "comm_alg", argument(node, "comm_alg"), "raise.both_ends")
    require(node, {"expert_shard_type": (0,), "comm_quant_mode": (0,)})
    require_of(node, {"elastic_info": (None,), "performance_info": (None,)})
    if version is WITH_NORM:  # its arguments of that kind are reserved
        return
    added, result = argument(node, "shared_expert_x"), value_of(node)
    if isinstance(added, Node) and not (same_sizes(value_of(added), result) and value_of(added).dtype == result.dtype):
        raise NotThisForm(
            node,
            "raise.dtype",
            f"{node.name}: shared_expert_x is not like the result, {tuple(result.shape)}",
            "[T, H], as the result",
        )


def _optional(node: Node, name: str, value: Node | None) -> None:
    """An auxiliary tensor that combine may leave out."""
    if argument(node, name) is not None:
        require_value(node, name, value)


def _own_weights(dispatch: Node, combine: Node) -> None:
    """Where dispatch takes the weights too, they are those of combine."""
    weights: Any = argument(combine, "expert_scales")
    if not isinstance(weights, Node) or value_of(weights).dtype != torch.float32:
        raise NotThisForm(combine, "raise.dtype", f"{combine.name}: expert_scales is no float32", "float32")
    ids = value_of(argument(dispatch, "expert_ids"))
    if not same_sizes(value_of(weights), ids):
        shape = tuple(value_of(weights).shape)
        raise NotThisForm(
            combine, "raise.weights", f"{combine.name}: expert_scales is {shape}", f"[T, k] = {tuple(ids.shape)}"
        )
    if argument(dispatch, "expert_scales") is not None:
        require_value(dispatch, "expert_scales", weights, "raise.both_ends")
        if argument(combine, "expand_scales") is None:
            raise NotThisForm(
                combine,
                "raise.both_ends",
                f"{dispatch.name} takes expert_scales, {combine.name} no expand_scales",
                "the same at both ends",
            )
