"""AllGather over the EP ranks, written by hand: every token on each rank, its own experts' rows, their sums scattered back.

    all_gather(x, ids, weights) > npu_moe_init_routing_v2 (this rank's range) > experts > npu_moe_token_unpermute or
    npu_moe_finalize_routing, with weights that are zero for experts of other ranks > reduce_scatter

In a deployment whose TP group is its EP group all ranks have the same tokens: nothing is gathered there, and an all_reduce gives
the sums to all of them.

The anchor is init_routing_v2 in a deployment of several ranks. Proven beside what ``match_routing_chain`` proves:
1. x, ids and weights are gathered over the EP group, in its order, or are those of the TP group;
2. the range is that of this rank's experts;
3. the weights are zero where the id is out of that range: such a slot has row index -1, whose absolute value is another row;
4. the result goes into a sum over the ranks of which each takes its tokens, and nowhere else.
A table of experts that comes from outside of the graph proves nothing: the mask must compare ids with the range.
Source: vllm_ascend.token_dispatcher: the weights of other ranks' experts are multiplied by a mask; vllm_ascend.prepare_finalize.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.arguments import argument
from moe_lowering.passes.raise_foreign.chain_walk import equal_values, source_of, value_of
from moe_lowering.passes.raise_foreign.expert_parallel import summed_over_ranks
from moe_lowering.passes.raise_foreign.match_routing_chain import match_range
from moe_lowering.passes.raise_foreign.npu_chain import Chain
from moe_lowering.passes.raise_foreign.records import NotThisForm

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
FORM, REDUCED = "gathered_v2", "reduced_v2"
_NO_VALUE = (0, 0.0)


def match_gathered(route: Node, deployment: Deployment) -> Chain:
    """The chain that begins with a routing of gathered tokens.

    Raises:
        NotThisForm: it is none that the generic operators say.
    """
    rank, ranks = deployment.ep_rank, deployment.ep_size
    experts = argument(route, "expert_num")
    if rank is None or deployment.tp_size not in (1, ranks) or deployment.shared_expert_ranks:
        raise NotThisForm(
            route, "raise.other_rank", f"{route.name} on one of {ranks} ranks; {deployment.unknown_rank or 'TP or shared'}",
            "this rank's place in the EP group, tp_size 1 or ep_size, no shared-expert ranks",
        )  # fmt: skip
    if type(experts) is not int or experts < 1 or experts % ranks:
        raise NotThisForm(route, "raise.experts", f"{route.name}: expert_num is {experts!r}", f"a multiple of {ranks}")
    own = experts // ranks
    first, last = rank * own, (rank + 1) * own
    chain = match_range(route, [first, last])
    unmasked, mask = _unmasked(chain.weights)
    _require_range(mask, argument(route, "expert_idx"), first, last)
    for added in chain.added:
        raise NotThisForm(added, "raise.literal", f"{added.name} is added on each rank", "no skip1, no skip2")
    sent = dict(chain.sent)
    if deployment.tp_size == 1:
        form, weights, result = FORM, _gathered(unmasked, deployment, route), _scattered(chain, deployment)
        sent |= {n: sent[n] and _gathered(sent[n], deployment, route) for n in ("x", "ids", "x_scale")}
    else:
        form, weights = REDUCED, unmasked
        result, summing = summed_over_ranks(chain.combine, deployment)
        chain.walk.add(*summing)
    chain.walk.add(route, result)
    if chain.x_smooth is not None:
        seen = f"{chain.x_smooth.name}: smooth scales of this rank's experts"
        raise NotThisForm(chain.x_smooth, "raise.smooth_scales", seen, "none, since other ranks' are not in this graph")
    before = _add_what_is_gathered(chain, route, (sent["x"], sent["ids"], weights, sent["x_scale"]))
    places = {name: getattr(deployment, name) for name in ("ep_group", "ep_size", "tp_group", "tp_size")}
    return dataclasses.replace(
        chain, form=form, sent={**sent, **places}, weights=weights, combine=result, read_before=before
    )  # fmt: skip


def _add_what_is_gathered(chain: Chain, route: Node, own: tuple[Node | None, ...]) -> tuple[Node, ...]:
    """Exchanges and masks of what they gave; those that are there for the chain alone go with it."""
    pending, inside = [route, *chain.weights.all_input_nodes, chain.weights], chain.walk.interior
    before: set[Node] = {chain.weights}
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in own and node not in before and node not in inside and node.op == "call_function":
                before.add(node)
                pending.append(node)
    for node in sorted(before, reverse=True):
        if all(user in inside for user in node.users):
            chain.walk.add(node)
    return tuple(before)


def _gathered(value: Any, deployment: Deployment, route: Node) -> Node:
    """What each rank has of a value that is gathered over the EP group."""
    node = source_of(value) if isinstance(value, Node) else None
    gather = node.args[0] if node is not None and node.target is c10d.wait_tensor.default else None
    if not isinstance(gather, Node) or gather.target is not c10d.all_gather_into_tensor.default:
        raise NotThisForm(
            route,
            "raise.gathered",
            f"{route.name} takes {value}, which is not gathered",
            "all_gather over the EP group",
        )
    own, ranks, group = gather.args[:3]
    if (ranks, group) != (deployment.ep_size, deployment.ep_group) or not isinstance(own, Node):
        raise NotThisForm(
            gather, "raise.other_group", f"{gather.name}: {ranks} ranks of {group!r}",
            f"{deployment.ep_size} of {deployment.ep_group!r}, the EP group",
        )  # fmt: skip
    return own


def _unmasked(weights: Node) -> tuple[Any, Any]:
    """Weights that are zero where a mask is False: those before, and the mask."""
    node = source_of(weights)
    args: Any = node.args
    if node.target is aten.where.self and _is_zero(args[2]):
        return args[1], args[0]
    if node.target is aten.masked_fill.Scalar and args[2] in _NO_VALUE and args[1].target is aten.logical_not.default:
        return args[0], args[1].args[0]
    if node.target is aten.mul.Tensor:
        for gathered, mask in (args[:2], args[1::-1]):
            kind = value_of(mask).dtype if isinstance(mask, Node) else None
            if kind == torch.bool:
                return gathered, mask
            if isinstance(mask, Node) and mask.target is aten._to_copy.default and _is_mask(mask.args[0]):
                return gathered, mask.args[0]
    raise NotThisForm(
        weights, "raise.partial_range", f"weights from {weights.name} of all experts, for rows of some",
        "weights that are zero for experts of other ranks",
    )  # fmt: skip


def _is_mask(node: Any) -> bool:
    return isinstance(node, Node) and value_of(node).dtype == torch.bool


def _is_zero(value: Any) -> bool:
    if isinstance(value, Node):
        made = {aten.scalar_tensor.default: 0, aten.full.default: 1, aten.zeros_like.default: None}
        if value.target not in made:
            return False
        at = made[value.target]
        return at is None or value.args[at] in _NO_VALUE
    return value in _NO_VALUE


def _require_range(mask: Any, ids: Any, first: int, last: int) -> None:
    """The mask is True for ids from ``first`` to ``last`` - 1."""
    ands = (aten.logical_and.default, aten.bitwise_and.Tensor)
    args: Any = mask.args if isinstance(mask, Node) and mask.target in ands else ()
    bounds = sorted(filter(None, (_bound(each, ids) for each in args)))
    if bounds != [("from", first), ("to", last)]:
        raise NotThisForm(
            mask, "raise.partial_range", f"weights by {mask}: {bounds or 'no comparison of the ids'}",
            f"those of ids from {first} to {last - 1}, this rank's, by comparisons",
        )  # fmt: skip


def _bound(node: Any, ids: Any) -> tuple[str, int] | None:
    if not isinstance(node, Node) or not equal_values(node.args[0], ids) or type(node.args[1]) is not int:
        return None
    number = node.args[1]
    return {
        aten.ge.Scalar: ("from", number), aten.gt.Scalar: ("from", number + 1),
        aten.lt.Scalar: ("to", number), aten.le.Scalar: ("to", number + 1),
    }.get(node.target)  # type: ignore[call-overload]  # fmt: skip


def _scattered(chain: Chain, deployment: Deployment) -> Node:
    """What a rank gets of the sum over the ranks."""
    reduce, _ = chain.walk.onward(chain.combine, "the sum of one rank")
    if reduce.target is not c10d.reduce_scatter_tensor.default:
        raise NotThisForm(
            reduce, "raise.scattered", f"one rank's sums go to {reduce.target}", "reduce_scatter of the EP group"
        )
    _, operation, ranks, group = reduce.args[:4]
    if (operation, ranks, group) != ("sum", deployment.ep_size, deployment.ep_group):
        raise NotThisForm(
            reduce, "raise.other_group", f"{reduce.name}: {operation!r} over {ranks} ranks of {group!r}",
            f"'sum' over {deployment.ep_size} of {deployment.ep_group!r}",
        )  # fmt: skip
    wait, _ = chain.walk.onward(reduce, "the scattered sum")
    if wait.target is not c10d.wait_tensor.default:
        raise NotThisForm(wait, "raise.scattered", f"the scattered sum goes to {wait.target}", "wait_tensor")
    chain.walk.add(reduce)
    return wait
