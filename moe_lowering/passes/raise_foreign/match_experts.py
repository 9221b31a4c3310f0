"""From the meaning of a layer's result to its record: the one check that all forms of ATen operators end with.

A result is a layer's if its term is, for each token, the sum over its choices of weight * w2[id](gated(w13[id](x[token]))),
with one set of ids, one tensor of weights over token and choice, and x over token (``layer_parts``). Its nodes must be closed,
and its ids experts that it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.graph.walks import stock_name_of
from moe_lowering.passes.raise_foreign.closed_region import closed_region, copies_before, region_of
from moe_lowering.passes.raise_foreign.expert_map import reason_of_map, require_experts
from moe_lowering.passes.raise_foreign.expert_parallel import over_shared_tokens
from moe_lowering.passes.raise_foreign.find_result import end_of_casts, find_result
from moe_lowering.passes.raise_foreign.graph_facts import facts_of
from moe_lowering.passes.raise_foreign.ids_range import made_from, out_of_range
from moe_lowering.passes.raise_foreign.layer_parts import LayerParts
from moe_lowering.passes.raise_foreign.meanings import (
    opaque,
)
from moe_lowering.passes.raise_foreign.read_meanings import Reader
from moe_lowering.passes.raise_foreign.records import ForeignBlock, NotThisForm
from moe_lowering.passes.raise_foreign.terms import (
    Counts,
    Position,
    Tensor,
)
from moe_lowering.passes.raise_foreign.unrouted_rows import reason_of_rows

_FACTORIES = frozenset(f"{kind}{how}" for kind in ("empty", "zeros", "ones", "full") for how in ("", "_like")) | {
    "new_zeros",
    "new_empty",
    "new_ones",
    "new_full",
    "empty_strided",
    "new_empty_strided",
}


def match_experts(
    form: str,
    graph: Graph,
    products: Sequence[Node],
    deployment: Deployment,
    of_ids: Node | None,
    ids_are_shared: bool = False,
    spreads: bool = False,
) -> ForeignBlock:
    """The layer that ``products``, all matrix products of its experts, belong to.

    Args:
        of_ids: a node that is computed from the ids alone.
        ids_are_shared: another layer has the same ids: what is computed from them, and from x, in front of the products may
            be read by it too, and stays as long as it is.
        spreads: where ids are chosen among exactly as many experts as all ranks of the deployment hold together, and the weights
            are one rank's, as ``shard_experts`` cuts them, the layer is over the ranks of the deployment. Not for rows that are
            counted: there a count of fewer experts than ids name is another layer, whose other rows are nobody's.

    Raises:
        NotThisForm: it is not proven to be one.
    """
    try:
        return _match_experts(form, graph, products, deployment, of_ids, ids_are_shared, spreads)
    except NotThisForm as reason:
        raise reason_of_map(of_ids) or reason_of_rows(of_ids, products) or reason from None


def _match_experts(
    form: str,
    graph: Graph,
    products: Sequence[Node],
    deployment: Deployment,
    of_ids: Node | None,
    ids_are_shared: bool,
    spreads: bool,
) -> ForeignBlock:
    facts = facts_of(graph)
    reader = Reader(products)
    for node in facts.results:  # of other layers
        reader.assume(node, opaque(node))
    reader.start_at(of_ids)
    result = end_of_casts(reader, find_result(reader, products))
    value = reader.value(result)
    assert value is not None
    own = block = LayerParts(result, value).block(form)
    used = {node for node in reader._values if node in products}
    missing = [node for node in products if node not in used]
    if missing:
        raise NotThisForm(missing[0], "raise.incomplete", f"{missing[0].name} is no part of the result", "all products")
    shared = over_shared_tokens(block, deployment)
    block, beside = shared or (_over_ranks(block, deployment, spreads), ())
    result = block.result
    inside = region_of(own.result, block.operands, lambda node: _is_outside(reader, node))
    region = sorted({*inside, *beside, result})
    _require_bounds(reader, region, own, shared is not None)
    _require_precision(result, region, block)
    before, read = copies_before(region, lambda node: _is_own(reader, node))
    read += [*block.operands, *(sources := made_from(block.ids, block.num_experts))]
    before += [node for node in sources if node.op == "call_function"]
    stays = _is_shared if ids_are_shared else _may_stay
    interior = closed_region(result, region, before, read, lambda node: stays(reader, node), facts.scopes, facts.writes)
    facts.results.append(result)
    return dataclasses.replace(block, interior=interior, shared=tuple(sorted({*region} - {*interior})))


def _over_ranks(block: ForeignBlock, deployment: Deployment, spreads: bool) -> ForeignBlock:
    """The block with all experts that its ids name, on this rank or, where it ``spreads``, on those of the deployment."""
    require_experts(block.ids, block.num_experts, block.result)
    node = out_of_range(block.ids, block.num_experts)
    if node is None:
        return block
    everywhere = block.num_experts * deployment.ep_size
    alike = spreads and deployment.ep_size > 1 and not deployment.shared_expert_ranks
    if alike and out_of_range(block.ids, everywhere) is None and out_of_range(block.ids, everywhere - 1) is not None:
        places = {name: getattr(deployment, name) for name in ("ep_group", "ep_size", "tp_group", "tp_size")}
        return dataclasses.replace(block, num_experts=everywhere, **places)
    ranks = f", or among exactly {everywhere}, those of all {deployment.ep_size} ranks" if alike else ""
    raise NotThisForm(
        node,
        "raise.ids_range",
        f"ids from {node.name} ({call_name(node)}), which may be no expert of {block.num_experts}, or one twice for a token",
        f"ids of one choice among at most {block.num_experts}{ranks}, or given from outside of the graph",
    )


def _require_bounds(reader: Reader, region: Sequence[Node], own: ForeignBlock, shared: bool) -> None:
    """What was read as the identity, of ids that are experts, is it: these ids, this number of experts, and a choice of theirs
    (or ids that are past it on purpose)."""
    inside = {*region}
    for node, ids, experts in reader.bounds:
        if ids.node is not own.ids:
            if node in inside:
                raise NotThisForm(node, "raise.mask", f"{node.name} by {ids.node.name}", f"by the ids, {own.ids.name}")
            continue
        chosen = shared or out_of_range(own.ids, own.num_experts, given=False) is None
        if experts != own.num_experts or not chosen:
            raise NotThisForm(
                node,
                "raise.mask",
                f"{node.name} ({call_name(node)}) treats ids from {experts} on in another way, of {own.num_experts} experts",
                f"{own.num_experts}, and ids of one choice among as many, or transformers' expert parallelism",
            )


def _is_outside(reader: Reader, node: Node) -> bool:
    """Whether a node that the region reads is none of it: an opaque tensor, or a size."""
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return True
    if isinstance(node.meta["val"], torch.Tensor):
        value = reader.value(node)
        return value is None or (value.is_opaque and stock_name_of(node) not in _FACTORIES)
    return False


def _is_own(reader: Reader, node: Node) -> bool:
    """Whether a node is a tensor of its own, and no copy or view of another one."""
    value = reader.value(node) if isinstance(node.meta.get("val"), torch.Tensor) else None
    return value is None or (isinstance(value.term, Tensor) and value.term.node is node)


def _may_stay(reader: Reader, node: Node) -> bool:
    """Ids and other opaque tensors in another layout, numbers from 0 on, and counts of the experts' slots."""
    if not isinstance(node.meta["val"], torch.Tensor):
        return False
    value = reader.value(node)
    return value is not None and (not value.is_slotted or isinstance(value.term, (Counts, Position)))


def _is_shared(reader: Reader, node: Node) -> bool:
    """What another layer of the same ids may read too: all but what the products give."""
    return _may_stay(reader, node) or not reader.is_derived(node)


def _require_precision(result: Node, region: Sequence[Node], block: ForeignBlock) -> None:
    """Nothing in between may round to less than what the experts compute in."""
    dtype = block.w2.nodes[0].meta["val"].dtype
    for node in region:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype not in (dtype, torch.float32):
            raise NotThisForm(
                node, "raise.dtype", f"{node.name} is {value.dtype} among experts of {dtype}", f"{dtype}, or float32"
            )
