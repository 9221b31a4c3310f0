"""The record of a torch_npu chain, and its way into the record that all forms have.

A chain is proven to be alone here: it stands in one scope, and nothing that it reads or makes is written in place meanwhile.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_lowering.passes.blocks import equal_sizes
from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.graph.memory_effects import Writes, describe
from moe_lowering.passes.graph.operator_names import operator_name
from moe_lowering.passes.graph.scopes import is_marker, scope_paths
from moe_lowering.passes.raise_foreign.chain_walk import Walk, value_of, written_twice
from moe_lowering.passes.raise_foreign.ids_range import past_experts
from moe_lowering.passes.raise_foreign.joined_storage import joined_storage
from moe_lowering.passes.raise_foreign.keep_foreign import expert_operators
from moe_lowering.passes.raise_foreign.npu_matmuls import Experts
from moe_lowering.passes.raise_foreign.records import Constant, Copied, ForeignBlock, Norm, NotThisForm, Weights
from moe_lowering.vocabulary import EXPERT_FORMATS


@dataclasses.dataclass
class Chain:
    """One block, written with torch_npu's operators.

    Attributes:
        form: the name of the form, in reports and tests.
        own: the implementation that it is.
        walk: its nodes, and who only waits for one of them.
        dispatch, combine: its first and its last operator.
        experts: what is between.
        sent: the arguments of the generic ``dispatch``, by name.
        weights: the routing weights [T, k].
        counts: rows of each expert, [E_local] int64, which others may read too; None where they are not like that.
        added: [T, H] each, what is added to the result. copied, constant: what copy and const experts add to it.
        partial: what each rank adds to its own result before the sum over ``partial_group``.
        read_before: what stands in front of dispatch and is proven too, such as masks; read elsewhere perhaps.
        drops: a slot of another rank's expert gives nothing, whatever its weight is.
        norm: what the last operator does after combine; ``combine`` is the first of its results then.
        rounded: a dtype that the weights are rounded to on their way to combine; None for their own.
        x_smooth: [E, H], what tokens are multiplied by before they are quantised; None for nothing.
    """

    form: str
    own: str
    walk: Walk
    dispatch: Node
    experts: Experts
    combine: Node
    sent: dict[str, Any]
    weights: Node
    counts: Node | None = None
    added: tuple[Node, ...] = ()
    copied: Copied | None = None
    constant: Constant | None = None
    drops: bool = False
    norm: Norm | None = None
    rounded: Any = None
    x_smooth: Node | None = None
    partial: tuple[Node, ...] = ()
    partial_group: str = ""
    read_before: tuple[Node, ...] = ()

    @property
    def interior(self) -> tuple[Node, ...]:
        return tuple(sorted(self.walk.interior))


_LISTS = (
    "w13_bias", "w2_bias", "w13_scale", "w2_scale", "w13_offset", "w2_offset", "w13_scale_bias", "w2_scale_bias",
)  # fmt: skip


def foreign_block(chain: Chain, graph: Graph) -> ForeignBlock:
    """A chain as the record of a layer that others wrote.

    Raises:
        NotThisForm: another number of experts, smooth scales or clips of another form, several scopes, a write in between.
    """
    chain.walk.close()
    _require_local_experts(chain)
    _require_ids_of_experts(chain)
    _require_row_factors(chain)
    fields = dict(chain.experts.given)
    lists: dict[str, Any] = {name: tuple(fields.pop(name, ())) for name in _LISTS}
    out_dtype = fields.pop("out_dtype", None)
    outside = chain.counts is not None and any(user not in chain.walk.interior for user in chain.counts.users)
    block = ForeignBlock(
        form=chain.form,
        result=chain.combine,
        interior=chain.interior,
        w13=_first_weights(tuple(fields.pop("w13")), chain.experts, lists),
        w2=Weights(tuple(fields.pop("w2"))),
        weights=chain.weights,
        bases=chain.added,
        partial=chain.partial,
        partial_group=chain.partial_group,
        copied=chain.copied,
        constant=chain.constant,
        counts=chain.counts if outside else None,
        rounded=chain.rounded,
        norm=chain.norm,
        first=chain.dispatch,
        middle=chain.experts.last,
        edges=tuple(chain.walk.edges),
        own=chain.own,
        own_operators=expert_operators(tuple(operator_name(n) for n in chain.interior if n.op == "call_function")),
        x_smooth=chain.x_smooth,
        h_smooth=chain.experts.h_smooth,
        h_clip=chain.experts.h_clip,
        out_dtype=out_dtype if chain.sent["x_scale"] is not None or chain.x_smooth is not None else None,
        **chain.sent,
        **fields,
        **lists,
    )
    overlaps = _require_one_scope(chain, graph)
    _require_unwritten(block, graph, chain.read_before)
    return dataclasses.replace(block, overlaps=overlaps or bool(chain.walk.edges))


def _first_weights(nodes: tuple[Node, ...], experts: Experts, lists: dict[str, Any]) -> Weights:
    """One matmul's; or gate's and up's, which may be halves of one stored tensor."""
    if len(experts.firsts) == 1:
        return Weights(nodes)
    pair = Weights(nodes, joined=True)
    beside = any(lists[name] for name in _LISTS if name.startswith("w13"))
    return pair if beside or len(nodes) != 2 else joined_storage(pair) or pair


def _require_local_experts(chain: Chain) -> None:
    ranks, experts = chain.sent.get("ep_size", 1), chain.sent["num_experts"]
    pairs = len(chain.experts.firsts) == 2
    for name in ("w13", "w13, up", "w2"):
        weights = chain.experts.given[name.partition(",")[0]]
        if pairs and name != "w2":
            weights = weights[len(weights) // 2 :] if name != "w13" else weights[: len(weights) // 2]
        own_experts = len(weights) if len(weights) > 1 else value_of(weights[0]).shape[0]
        if own_experts * ranks != experts or value_of(weights[0]).dim() != (2 if len(weights) > 1 else 3):
            raise NotThisForm(
                chain.experts.first,
                "raise.experts",
                f"{own_experts} experts on each of {ranks} ranks, of {experts}",
                f"{experts} / {ranks} of them, [E, K, N]",
            )


def _require_ids_of_experts(chain: Chain) -> None:
    number = chain.sent["num_experts"] + chain.sent.get("zero_experts", 0)
    outside = past_experts(chain.sent["ids"], number)
    if outside is not None:
        seen = f"{outside.name} gives some tokens an id that is no expert"
        raise NotThisForm(
            outside, "raise.ids_range", seen, f"ids from 0 to {number - 1}; tokens without one by dispatch's mask"
        )


def _require_row_factors(chain: Chain) -> None:
    """Smooth scales and clips are those of every expert that they are for, of a chain that quantises."""
    experts, hidden = chain.sent["num_experts"], value_of(chain.sent["x"]).shape[-1]
    local, rows = experts // chain.sent.get("ep_size", 1), argument(chain.experts.last, "x")[0]
    middle = value_of(rows).shape[-1]
    of_tokens, of_activations = "smooth scales of tokens", "smooth scales of activations"
    for what, node, shape in (
        (of_tokens, chain.x_smooth, (experts, hidden)), (of_activations, chain.experts.h_smooth, (local, middle)),
        ("clips of activations", chain.experts.h_clip, (local,)),
    ):  # fmt: skip
        if node is None:
            continue
        value, code = value_of(node), "raise.clip" if node is chain.experts.h_clip else "raise.smooth_scales"
        if value.dtype != torch.float32 or not equal_sizes(value.shape, shape):
            seen = f"{node.name}: {what} are {value.dtype} {tuple(value.shape)}"
            raise NotThisForm(node, code, seen, f"float32 {shape}")
        if chain.sent["x_scale"] is not None and node is chain.x_smooth:
            seen = f"{node.name}: smooth scales of tokens that are int8 already"
            raise NotThisForm(node, "raise.smooth_scales", seen, "tokens of floats")
        if chain.experts.given["quantisation"] not in _INT8_ROWS:
            seen = f"{node.name}: {what}, which are not quantised"
            raise NotThisForm(node, code, seen, " or ".join(_INT8_ROWS))


_INT8_ROWS = tuple(form.name for form in EXPERT_FORMATS.values() if form.int8_rows)


def _require_one_scope(chain: Chain, graph: Graph) -> bool:
    """Whether something stands in another scope between the ends; looked at only where a graph has scopes at all."""
    if not _has_scopes(graph):
        return False
    paths = scope_paths(graph)
    around = paths.get(chain.combine, ())
    for node in (chain.dispatch, *chain.experts.firsts, chain.experts.last, chain.combine):
        if paths.get(node, ()) != around:
            raise NotThisForm(
                node,
                "raise.scope",
                f"{node.name} is in scope {paths.get(node, ()) or 'none'}, {chain.combine.name} in {around or 'none'}",
                "a layer within one stream, super-kernel or core-limit scope",
            )
    node = chain.dispatch
    while node is not chain.combine:
        if paths.get(node, ()) != around or getattr(node.target, "namespace", "") == "npugraph_ex":
            return True
        node = node.next
    return False


def _has_scopes(graph: Graph) -> bool:
    table = graph._find_nodes_lookup_table.table
    firsts = (next(iter(nodes)) for (op, _), nodes in table.items() if op == "call_function" and nodes)
    return any(is_marker(node) for node in firsts)


def _require_unwritten(block: ForeignBlock, graph: Graph, before: tuple[Node, ...]) -> None:
    assert block.first is not None
    tensors = [node for node in block.operands if isinstance(node.meta.get("val"), torch.Tensor)]
    inside = {*block.interior}
    again, sources = written_twice(each for node in inside for each in node.all_input_nodes if each not in inside)
    start = min((block.first, *before, *again))
    writer = Writes(graph).between(start, block.result, [*inside, *tensors, *before, *again, *sources])
    if writer is not None:
        raise NotThisForm(
            writer,
            "raise.written_between",
            f"{describe(writer)} writes in place into what the layer reads or computes, between {block.first.name} and "
            f"{block.result.name}",
            "the write before or after the layer, or into a copy",
        )
