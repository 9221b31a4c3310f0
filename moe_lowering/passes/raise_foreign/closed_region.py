"""The proof that a layer can be taken out of a graph: which nodes go with its result, and that nobody else needs them.

Contract. Reads only. A region is closed when
- each of its values but the result is read by the region alone (what only ids are, and their counts, may be read elsewhere:
  such a node stays, since it costs next to nothing to have it twice);
- no scope begins or ends in it;
- nothing that it reads or computes is written in place between its first node and its result: of values that stay, too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping

import torch
from torch.fx import Node

from moe_lowering.passes.graph.memory_effects import Writes, describe
from moe_lowering.passes.graph.own_writes import is_own_write
from moe_lowering.passes.graph.walks import stock_name_of
from moe_lowering.passes.raise_foreign.records import NotThisForm


def region_of(result: Node, operands: Iterable[Node], is_outside: Callable[[Node], bool]) -> list[Node]:
    """The nodes that a result is computed from, in graph order, back to its operands and to what ``is_outside``."""
    stop, region, pending = set(operands), {result}, [result]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in region and source not in stop and not is_outside(source):
                region.add(source)
                pending.append(source)
    unread = sorted(region - {result})
    while unread:
        looks = {user for node in unread for user in node.users if looks_only(user) or is_dead(user)} - region
        unread = [node for node in looks if region.issuperset(node.all_input_nodes)]
        region.update(unread)
    return sorted(region)


def is_dead(node: Node, steps: int = 8) -> bool:
    """Whether nothing reads a node, nor notices that it is not run. Graphs of torch.export and make_fx have such nodes.

    Args:
        steps: the longest chain of nodes that read each other and that nothing else reads.
    """
    if node.op != "call_function" or not may_be_left_out(node) or steps == 0:
        return False
    return all(is_dead(user, steps - 1) for user in node.users)


def may_be_left_out(node: Node) -> bool:
    """Whether a call has no other effect than its result: it checks nothing, and draws no random numbers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    draws = torch.Tag.nondeterministic_seeded in target.tags
    return not draws and bool(target._schema.returns) and not target._schema.is_mutable and not node.is_impure()


def looks_only(node: Node) -> bool:
    """Whether a node only checks dtype and device of a value, as torch.export puts it behind ``Tensor.to``."""
    return stock_name_of(node) == "_assert_tensor_metadata"


def copies_before(region: Iterable[Node], is_own: Callable[[Node], bool]) -> tuple[list[Node], list[Node]]:
    """What a region reads from outside: (copies and views, back to the tensors that they are of; these tensors, for which
    ``is_own`` holds). The layer will read the tensors in place of the copies."""
    copies: list[Node] = []
    own: list[Node] = []
    visited, pending = {*region}, [*region]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in visited:
                continue
            visited.add(source)
            if is_own(source):
                own.append(source)
            else:
                copies.append(source)
                pending.append(source)
    return copies, own


def closed_region(
    result: Node,
    region: Iterable[Node],
    before: Iterable[Node],
    read: Iterable[Node],
    may_stay: Callable[[Node], bool],
    scopes: Mapping[Node, tuple[str, ...]],
    writes: Writes,
) -> tuple[Node, ...]:
    """The nodes of a region that go with its result, in graph order.

    Args:
        before: what stands in front of the region and was read to prove it, such as what ids were chosen by.
        read: what will be read where the result stands.
        may_stay: whether a value of the region may be read outside of it, too.
        scopes: see ``scopes.scope_paths``.

    Raises:
        NotThisForm: the region is not closed; names the node, and who reads, writes or encloses it.
    """
    whole = set(region)
    interior = {*whole}
    for node in sorted(interior, reverse=True):
        outside = [user for user in node.users if user not in interior]
        if node is result or not outside:
            continue
        if not may_stay(node):
            raise NotThisForm(
                node,
                "raise.read_outside",
                f"{node.name} is also read by {', '.join(user.name for user in outside)}",
                "values inside of a layer that are read inside only",
            )
        interior.discard(node)
    _require_one_scope(result, interior, scopes)
    _require_unwritten(result, interior, whole.union(before), read, writes)
    return tuple(sorted(interior))


def _require_one_scope(result: Node, interior: set[Node], scopes: Mapping[Node, tuple[str, ...]]) -> None:
    around = scopes.get(result, ())
    for node in sorted(interior):
        if scopes.get(node, ()) != around:
            raise NotThisForm(
                node,
                "raise.scope",
                f"{node.name} is in scope {scopes.get(node, ()) or 'none'}, the result {result.name} in {around or 'none'}",
                "a layer within one stream, super-kernel or core-limit scope",
            )


def _require_unwritten(
    result: Node, interior: set[Node], whole: set[Node], read: Iterable[Node], writes: Writes
) -> None:
    """Nothing that the region reads or computes is written before its result. Nodes that stay for other readers count, since
    the layer computes them anew."""
    own = {node for node in whole if is_own_write(node)}
    stays = min(own - interior, default=None)  # and what it writes into is read anew
    writer = stays or writes.between(min(whole), result, [*whole, *read], gone=own)
    if writer is not None:
        raise NotThisForm(
            writer,
            "raise.written_between",
            f"{describe(writer)} writes in place into what the layer reads or computes, between its first operation and its "
            f"result {result.name}",
            "the write before or after the layer, or into a copy",
        )
