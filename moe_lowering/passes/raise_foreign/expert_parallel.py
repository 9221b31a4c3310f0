"""transformers' expert parallelism without an exchange of tokens (``AllReduceEP``), raised to a block over all ranks.

Every rank has all tokens, computes its own n experts, and the results are added up:

    off = ids // n != rank;  own = where(off, n, ids % n);  w = masked_fill(weights, off, 0)
    y = all_reduce(experts(x, own, w))

This is a block over all ranks whose TP group is its EP group: all of them have the same tokens, and ``combine`` gives the
complete result on each. What a rank adds to its own result before (its part of a shared expert) is summed by an all_reduce of
its own. Proven: these lines, with this rank's place and the group of the deployment; that the ids are
chosen among exactly n * ranks experts; that nothing but the sum over the ranks reads a rank's own result.
Source: transformers.expert_parallel, transformers.moe: AllReduceEP, ids past the last expert.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import equal_sizes
from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.graph.walks import stock_name_of
from moe_lowering.passes.raise_foreign.ids_range import out_of_range
from moe_lowering.passes.raise_foreign.records import ForeignBlock, NotThisForm

CODE = "raise.expert_parallel"


@dataclasses.dataclass(frozen=True)
class _Own:
    """Ids of this rank's experts: what they are made from, which slots are of other ranks, and this rank's place."""

    ids: Node
    off: Node
    rank: int
    nodes: tuple[Node, ...]


def over_shared_tokens(block: ForeignBlock, deployment: Deployment) -> tuple[ForeignBlock, tuple[Node, ...]] | None:
    """The block over all ranks and the nodes that belong to it beside its own; None where ids are not of this form.

    Raises:
        NotThisForm: the ids are, and the rest is not.
    """
    own = _own_ids(block.ids, block.num_experts)
    if own is None:
        return None
    everywhere, ranks = block.num_experts * deployment.ep_size, deployment.ep_size
    if ranks == 1 or deployment.tp_size != ranks or deployment.shared_expert_ranks:
        raise _not(
            own.ids, f"tokens that all ranks have, in a deployment with ep_size {ranks} and tp_size {deployment.tp_size}",
            "both the number of ranks, with ep_group and tp_group over them, and no shared-expert ranks",
        )  # fmt: skip
    if own.rank != deployment.ep_rank:
        raise _not(own.off, f"the experts of rank {own.rank}", f"those of this rank, {deployment.ep_rank}")
    chosen = out_of_range(own.ids, everywhere) is None and out_of_range(own.ids, everywhere - 1) is not None
    if not chosen:
        raise _not(
            own.ids, f"ids from {own.ids.name} ({call_name(own.ids)})",
            f"ids of one choice among exactly {everywhere}, {block.num_experts} on each of {ranks} ranks",
        )  # fmt: skip
    weights, masked = _unmasked(block.weights, own.off)
    total = summed_over_ranks(block.result, deployment)
    places = {name: getattr(deployment, name) for name in ("ep_group", "ep_size", "tp_group", "tp_size")}
    whole = dataclasses.replace(
        block, ids=own.ids, weights=weights, result=total.result, num_experts=everywhere, **places,
        bases=(), partial=(*block.bases, *total.partial), partial_group=total.group,
    )  # fmt: skip
    return whole, (*own.nodes, *masked, *total.nodes)


def _not(node: Node, seen: str, expected: str) -> NotThisForm:
    return NotThisForm(node, CODE, seen, expected)


_SAME = frozenset({"alias", "detach", "clone", "contiguous", "lift_fresh_copy"})
_CASTS = frozenset({"_to_copy", "to", "convert_element_type"})


def _behind(node: Any, names: frozenset[str]) -> Any:
    """What a node is behind copies, and casts of whole numbers."""
    while isinstance(node, Node) and node.op == "call_function" and stock_name_of(node) in names:
        node = node.args[0]
    return node


def _own_ids(node: Node, experts: int) -> _Own | None:
    """``where(off, experts, ids % experts)`` with ``off = ids // experts != rank``."""
    node = _behind(node, _SAME | _CASTS)
    if node.op != "call_function" or stock_name_of(node) not in ("where", "masked_fill"):
        return None
    args: Any = node.args
    off, filler, inside = args[:3] if stock_name_of(node) == "where" else (args[1], args[2], args[0])
    if not isinstance(off, Node) or not isinstance(inside, Node) or stock_name_of(inside) != "remainder":
        return None
    source, by = inside.args[:2]
    made = _number(filler)
    if made is None or stock_name_of(off) != "ne" or not isinstance(off.args[0], Node):
        return None
    owner: Node = off.args[0]
    rank: Any = off.args[1]
    if stock_name_of(owner) not in ("floor_divide", "div") or not isinstance(source, Node):
        return None
    floors = stock_name_of(owner) == "floor_divide" or argument(owner, "rounding_mode") == "floor"
    if owner.args[0] is not source or not floors:
        raise _not(owner, f"the rank of {owner.args[0]}, of ids from {source.name}", "ids // experts, rounded down")
    if made != experts or by != experts or owner.args[1] != experts or type(rank) is not int:
        seen = f"ids % {by}, ids // {owner.args[1]} != {rank}, and {made} for those of other ranks"
        raise _not(node, seen, f"{experts} each, the number of this rank's experts, and its place")
    nodes = (node, inside, off, owner, *((filler,) if isinstance(filler, Node) else ()))
    return _Own(source, off, rank, nodes)


def _number(value: Any) -> Any:
    """A number, or that of which a tensor is made."""
    if not isinstance(value, Node):
        return value
    at = {"scalar_tensor": 0, "full": 1, "full_like": 1}.get(stock_name_of(value))
    return None if at is None else value.args[at]


def _unmasked(weights: Node, off: Node) -> tuple[Node, tuple[Node, ...]]:
    """Weights that are zero where ``off``: those before, and the nodes in between."""
    node = _behind(weights, _SAME)
    if node.op == "call_function" and stock_name_of(node) in ("masked_fill", "where"):
        by_where = stock_name_of(node) == "where"
        mask, fill, before = node.args[:3] if by_where else (node.args[1], node.args[2], node.args[0])
        if mask is off and _number(fill) == 0 and isinstance(before, Node):
            return before, (node, *((fill,) if isinstance(fill, Node) else ()))
    raise _not(weights, f"weights from {weights.name} of experts of other ranks", "zero for those, by the same mask")


@dataclasses.dataclass(frozen=True)
class RankSum:
    """What a rank's own result becomes in the sum over the ranks.

    Attributes:
        result: the sum. nodes: those that add up, it among them.
        partial: what is added to the rank's own result before, such as a shared expert's part. group: that the sum is over.
    """

    result: Node
    nodes: tuple[Node, ...]
    partial: tuple[Node, ...]
    group: str


def summed_over_ranks(result: Node, deployment: Deployment) -> RankSum:
    """How one rank's own result is summed over the ranks.

    Raises:
        NotThisForm: it is not, or by others too.
    """
    own, additions, partial = result, list[Node](), list[Node]()
    while len(own.users) == 1 and (other := _added_to(own)) is not None:
        (own,) = own.users
        additions.append(own)
        partial.append(other)
    sums = [user for user in own.users if stock_name_of(user) == "all_reduce"]
    if len(sums) != 1:
        raise _not(own, f"{own.name}, one rank's sum, goes to {', '.join(map(str, own.users))}", "one all_reduce")
    (reduce,) = sums
    _, operation, group = reduce.args[:3]
    groups = (deployment.ep_group, deployment.tp_group)
    if operation != "sum" or group not in groups:
        raise _not(reduce, f"all_reduce({operation!r}, {group!r})", f"a sum over the ranks of {groups[0]!r}")
    nodes, end = [*additions, reduce], reduce
    for name in ("wait_tensor", "copy"):  # a reduction in place is copied to where the tensor was
        following = [user for user in end.users if stock_name_of(user) == name]
        if len(following) == len(end.users) == 1 and following[0].args[-1] is end:
            end = following[0]
            nodes.append(end)
        elif name == "wait_tensor":
            raise _not(end, f"{end.name} is not waited for", "wait_tensor")
    others = [user for user in own.users if user is not reduce and user is not end]
    if others:
        raise _not(own, f"{own.name}, one rank's sum, is also read by {others[0].name}", "the sum over the ranks alone")
    return RankSum(end, tuple(nodes), tuple(partial), str(group))


def _added_to(own: Node) -> Node | None:
    """The tensor like a rank's own result that its only reader adds to it; None where it does something else."""
    (user,) = own.users
    if stock_name_of(user) != "add" or argument(user, "alpha") != 1:
        return None
    first, second = user.args[:2]
    other = second if first is own else first
    if not isinstance(other, Node) or other is own:
        return None
    total, own_value, added = (each.meta["val"] for each in (user, own, other))
    same_dtype = own_value.dtype == added.dtype == total.dtype
    return other if same_dtype and equal_sizes(own_value.shape, added.shape) else None
