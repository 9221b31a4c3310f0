"""AllGather over the EP ranks, written by hand: every token on each rank, its own experts' rows, their sums scattered back.

    all_gather(x, ids, weights) > npu_moe_init_routing_v2 (this rank's range) > experts > npu_moe_token_unpermute or
    npu_moe_finalize_routing, with weights that are zero for experts of other ranks > reduce_scatter

In a deployment whose TP group is its EP group all ranks have the same tokens: nothing is gathered there, and an all_reduce gives
the sums to all of them. What a rank adds to its own sums before (a shared expert, ``skip1``) has an all_reduce of its own then.

The anchor is init_routing_v2 in a deployment of several ranks. Proven beside what ``match_routing_chain`` proves:
1. x, ids and weights are gathered over the EP group, in its order, or are those of the TP group;
2. the range is that of this rank's experts;
3. the weights are zero where the id is out of that range: such a slot has row index -1, whose absolute value is another row;
   or finalize_routing drops it (drop_pad_mode 3, which reads -1 as no row);
4. the result goes into a sum over the ranks of which each takes its tokens, and nowhere else.
A table of experts that comes from outside of the graph proves nothing: the mask must be a function of the ids (``masks_by_id``).
Source: vllm_ascend.token_dispatcher: the weights of other ranks' experts are multiplied by a mask; vllm_ascend.prepare_finalize.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.graph.arguments import argument, input_node
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.raise_foreign.chain_walk import same_sizes, same_value_before, value_of
from moe_lowering.passes.raise_foreign.distinct_ids import may_repeat
from moe_lowering.passes.raise_foreign.expert_parallel import summed_over_ranks
from moe_lowering.passes.raise_foreign.masked_weights import behind_casts, weights_before_mask
from moe_lowering.passes.raise_foreign.match_routing_chain import match_range
from moe_lowering.passes.raise_foreign.npu_chain import Chain
from moe_lowering.passes.raise_foreign.records import NotThisForm

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
FORM, REDUCED = "gathered_v2", "reduced_v2"


def match_gathered(route: Node, deployment: Deployment) -> Chain:
    """The chain that begins with a routing of gathered tokens.

    Raises:
        NotThisForm: it is none that the generic operators say.
    """
    first, last = _own_experts(route, deployment)
    chain = match_range(route, [first, last])
    unmasked, rounded = _weights_of_all(chain, route, first, last)
    for added in chain.added if deployment.tp_size == 1 else ():
        raise NotThisForm(added, "raise.literal", f"{added.name} is added on each rank", "no skip1, no skip2")
    sent = dict(chain.sent)
    if deployment.tp_size == 1:
        form, weights, result = FORM, _gathered(unmasked, deployment, route), _scattered(chain, deployment)
        sent["ids"] = behind_casts(sent["ids"])[0]
        sent |= {n: sent[n] and _gathered(sent[n], deployment, route) for n in ("x", "ids", "x_scale")}
    else:
        form, weights = REDUCED, unmasked
        total = summed_over_ranks(chain.combine, deployment)
        result, chain = total.result, dataclasses.replace(chain, added=(), partial=(*chain.added, *total.partial))
        chain = dataclasses.replace(chain, partial_group=total.group)
        chain.walk.add(*total.nodes)
    chain.walk.add(route, result)
    repeated = may_repeat(sent["ids"])
    if repeated is not None:
        seen = f"{repeated.name} ({call_name(repeated)}) may give a token one expert twice"
        raise NotThisForm(repeated, "raise.ids_range", seen, "different experts for a token, as MC2 wants them")
    if chain.x_smooth is not None:
        seen = f"{chain.x_smooth.name}: smooth scales of this rank's experts"
        raise NotThisForm(chain.x_smooth, "raise.smooth_scales", seen, "none, since other ranks' are not in this graph")
    before = _add_what_is_gathered(chain, route, (sent["x"], sent["ids"], weights, sent["x_scale"]))
    places = {name: getattr(deployment, name) for name in ("ep_group", "ep_size", "tp_group", "tp_size")}
    return dataclasses.replace(
        chain, form=form, sent={**sent, **places}, weights=weights, combine=result, read_before=before, rounded=rounded
    )  # fmt: skip


def _own_experts(route: Node, deployment: Deployment) -> tuple[int, int]:
    """The first expert of this rank, and the first one after them."""
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
    return rank * own, (rank + 1) * own


def _weights_of_all(chain: Chain, route: Node, first: int, last: int) -> tuple[Any, Any]:
    """(the weights before those of other ranks' experts became zero, the dtype that rounds them afterwards or None).

    Where finalize_routing drops such slots, weights that were gathered, each by its token's rank, need no mask.
    """
    node, rounded = behind_casts(chain.weights)
    if chain.drops and _gather_of(node) is not None:
        return node, rounded
    unmasked, rounded = weights_before_mask(chain.weights, route, first, last)
    behind, also = behind_casts(unmasked)
    if _gather_of(behind) is None or (rounded and also and rounded is not also):
        return unmasked, rounded
    return behind, rounded or also


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
    gather = _gather_of(value)
    if gather is None:
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


def _gather_of(value: Any) -> Node | None:
    """The all_gather whose result a value is, which may have been copied into a tensor that was there for it."""
    node = same_value_before(value) if isinstance(value, Node) else None
    if node is not None and _is_whole_copy(node):
        node = same_value_before(input_node(node, 1))
    gather = node.args[0] if node is not None and node.target is c10d.wait_tensor.default else None
    return gather if isinstance(gather, Node) and gather.target is c10d.all_gather_into_tensor.default else None


def _is_whole_copy(node: Node) -> bool:
    """Whether a node is its second argument: written over all of a tensor of the same sizes and dtype."""
    operands = [each for each in node.args[:2] if isinstance(each, Node)]
    if node.target is not aten.copy.default or len(operands) != 2:
        return False
    new, old = map(value_of, operands)
    return new.dtype == old.dtype and same_sizes(new, old)


def _scattered(chain: Chain, deployment: Deployment) -> Node:
    """What a rank gets of the sum over the ranks."""
    reduce, _ = chain.walk.onward(chain.combine, "the sum of one rank")
    if reduce.target is not c10d.reduce_scatter_tensor.default:
        raise NotThisForm(
            reduce, "raise.scattered", f"one rank's sums go to {call_name(reduce)}", "reduce_scatter of the EP group"
        )
    _, operation, ranks, group = reduce.args[:4]
    if (operation, ranks, group) != ("sum", deployment.ep_size, deployment.ep_group):
        raise NotThisForm(
            reduce, "raise.other_group", f"{reduce.name}: {operation!r} over {ranks} ranks of {group!r}",
            f"'sum' over {deployment.ep_size} of {deployment.ep_group!r}",
        )  # fmt: skip
    wait, _ = chain.walk.onward(reduce, "the scattered sum")
    if wait.target is not c10d.wait_tensor.default:
        raise NotThisForm(wait, "raise.scattered", f"the scattered sum goes to {call_name(wait)}", "wait_tensor")
    chain.walk.add(reduce)
    copied = [user for user in wait.users if _is_whole_copy(user) and user.args[1] is wait]
    if len(copied) != 1 or len(wait.users) != 1:
        return wait
    chain.walk.add(wait)  # into a tensor that was there for it
    return copied[0]
