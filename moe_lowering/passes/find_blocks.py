"""Raise: find MoE blocks in a graph and bring each to a record. Reads the graph, never edits it, never guesses.

Contract. A block is ``dispatch -> grouped_mlp -> combine`` of our generic operators such that
- dispatched rows, their scale and the handle are read by the next stage only (counts may be read elsewhere too);
- the grouped MLP's result is read by ``combine`` only;
- both ends name the same ids, mask, group, sizes and token bound;
- nothing that it reads, and no counts, are written in place between its first and its last stage (``memory_effects``).
Everything else that contains a generic operator is left alone and returned with what was seen.
Source: here.architecture: the operators' schemas.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

import moe_lowering.custom_ops  # noqa: F401  (registers torch.ops.moe_lowering)
from moe_lowering.custom_ops.combine import CombineCall
from moe_lowering.custom_ops.dispatch import DispatchCall
from moe_lowering.custom_ops.grouped_mlp import GroupedMlpCall
from moe_lowering.custom_ops.route import RouteCall
from moe_lowering.custom_ops.sizes import token_count
from moe_lowering.passes.block_specs import Surroundings, spec_of_graph
from moe_lowering.passes.blocks import Block, BlockSpec, Route, RouteSpec, shape_key
from moe_lowering.passes.emission.wiring import Wiring, read_wiring
from moe_lowering.passes.graph.arguments import argument, read, results
from moe_lowering.passes.graph.memory_effects import Writes, describe
from moe_lowering.passes.graph.scopes import scope_paths
from moe_lowering.passes.operands import OPERAND_NAMES, ExpertOperands, Operands, is_stored
from moe_lowering.passes.quantities import GROUP_SELECT_MODES, NORM_TYPES
from moe_lowering.passes.token_ranges import is_strict, must_vary

OPS = torch.ops.moe_lowering
_COLLECTIVES = tuple(
    getattr(torch.ops._c10d_functional, name).default
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single", "broadcast")
)
_ARGUMENT = re.compile(r"^L\['(\w+)'\]")  # what dynamo calls the module that is compiled
# Of its own forward, and of one of torch's own (nn.Sequential), which dynamo's external_utils.wrap_inline calls.
_COMPILED = ("self", "fn")
_BOTH_ENDS = tuple(name for name in CombineCall._fields if name in DispatchCall._fields)  # must be alike in both
_of_both_ends = operator.attrgetter(*_BOTH_ENDS)


class _NotABlock(Exception):
    """Why a generic operator is not part of a block: a stable code, and words. Never leaves this module."""

    def __init__(self, code: str, words: str) -> None:
        super().__init__(f"[{code}] {words}")


def module_path(node: Node) -> str:
    """Where in the model a node comes from: the innermost module's path, or the node's name."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    try:
        path = str(next(reversed(stack.values()))[0])
    except Exception:  # metadata that others wrote, in another form: a name is for people, and must not fail a compile
        return node.name
    path = _ARGUMENT.sub(lambda match: "" if match[1] in _COMPILED else match[1], path)
    return path.replace("._modules['", ".").replace("']", "").removeprefix(".") or node.name


class GraphSummary(NamedTuple):
    """What records of blocks read of a whole graph: routings by their ids, scopes, and groups that collectives use."""

    routes: dict[Node, Route]
    scopes: dict[Node, tuple[str, ...]]
    groups: frozenset[str]


def find_block(dispatch: Node, summary: GraphSummary) -> Block | str:
    """The block of one dispatch, or why it is none."""
    try:
        return _block(dispatch, summary, Specs())
    except _NotABlock as reason:
        return str(reason)


def find_blocks(graph: Graph) -> tuple[list[Block], list[Route], list[tuple[Node, str]]]:
    """All blocks in graph order, all routings, and each generic operator left over with the reason."""
    routes: list[Route] = []
    left: list[tuple[Node, str]] = []
    for node in graph.find_nodes(op="call_function", target=OPS.route.default):
        try:
            routes.append(_route(node))
        except _NotABlock as reason:
            left.append((node, str(reason)))
    dispatches = graph.find_nodes(op="call_function", target=OPS.dispatch.default)
    summary = summarise(graph, routes) if dispatches else GraphSummary({}, {}, frozenset())
    writes = Writes(graph) if dispatches else None
    blocks: list[Block] = []
    specs = Specs()
    for node in dispatches:
        try:
            block = _block(node, summary, specs)
            if writes is not None and writes.exist:
                _require_unwritten(block, writes)
            blocks.append(block)
        except _NotABlock as reason:
            left.append((node, str(reason)))
    in_blocks = {node for block in blocks for node in (block.mlp, block.combine)}
    for target in (OPS.grouped_mlp.default, OPS.combine.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if node not in in_blocks:
                left.append((node, "[raise.no_chain] not part of a dispatch, grouped_mlp, combine chain"))
    return blocks, routes, left


def summarise(graph: Graph, routes: Sequence[Route]) -> GraphSummary:
    by_ids = {route.ids: route for route in routes if route.ids is not None}
    return GraphSummary(by_ids, scope_paths(graph), _collective_groups(graph))


def _collective_groups(graph: Graph) -> frozenset[str]:
    """Names of the groups that collectives of the graph use."""
    collectives = (node for op in _COLLECTIVES for node in graph.find_nodes(op="call_function", target=op))
    return frozenset(str(argument(node, "group_name")) for node in collectives)


def _route(node: Node) -> Route:
    outputs, call = results(node), read(RouteCall[Node], node)
    if outputs is None:
        raise _NotABlock("raise.whole_result", "route's result is used as a whole, or one output twice")
    for name, known in (("scoring", NORM_TYPES), ("group_score", GROUP_SELECT_MODES)):
        if (word := getattr(call, name)) not in known:
            raise _NotABlock("raise.unknown_word", f"route's {name} is {word!r}; the pass knows {', '.join(known)}")
    value = _value(call.logits)
    spec = RouteSpec(
        experts=_width(value),
        rows=token_count(value.shape),
        top_k=call.top_k,
        scoring=call.scoring,
        renormalize=call.renormalize,
        num_groups=call.num_groups,
        topk_groups=call.topk_groups,
        group_score=call.group_score,
        scale=call.scale,
        has_bias=call.bias is not None,
        key=(shape_key(value), shape_key(call.bias.meta["val"]) if call.bias is not None else None),
        epsilon=call.epsilon,
    )
    return Route(node, outputs.get("weights"), outputs.get("ids"), spec)


class Specs:
    """Records of the blocks that were found so far. Equal layers get the same one, so that looking it up compares no fields, and
    it is made once for those that are wired alike."""

    def __init__(self) -> None:
        self._by_wiring: dict[tuple[Any, ...], tuple[BlockSpec, tuple[Any, ...]]] = {}
        self._specs: dict[BlockSpec, BlockSpec] = {}

    def get(
        self, wiring: Wiring, around: Surroundings, make: Callable[[], BlockSpec]
    ) -> tuple[BlockSpec, tuple[Any, ...]]:
        """The record of a block, and the key of its wiring, one object for blocks that are wired alike; ``make`` reads nothing
        but what wiring and surroundings describe."""
        key = (wiring.key, around)
        known = self._by_wiring.get(key)
        if known is None:
            made = make()
            known = self._by_wiring[key] = self._specs.setdefault(made, made), wiring.key
        return known


def _block(dispatch: Node, summary: GraphSummary, specs: Specs) -> Block:
    outputs, sent = results(dispatch), read(DispatchCall[Node], dispatch)
    if outputs is None:
        raise _NotABlock("raise.whole_result", "dispatch's result is used as a whole, or one output twice")
    rows, row_scale, counts, handle = (outputs.get(name) for name in ("rows", "row_scale", "counts", "handle"))
    mlp = _only_user(rows, "rows", OPS.grouped_mlp.default)
    combine = _only_user(mlp, "the grouped MLP's result", OPS.combine.default)
    experts, combined = read(GroupedMlpCall[Node], mlp), read(CombineCall[Node], combine)
    if experts.rows is not rows or experts.row_scale is not row_scale or experts.counts is not counts or counts is None:
        raise _NotABlock(
            "raise.other_stage", "grouped_mlp does not take rows, row_scale and counts of the same dispatch"
        )
    _require_alone(row_scale, "row_scale", mlp)
    _require_alone(handle, "handle", combine)
    if combined.rows is not mlp or combined.handle is not handle:
        raise _NotABlock("raise.other_stage", "combine does not take the rows and the handle of the same dispatch")
    if _of_both_ends(combined) != _of_both_ends(sent):
        _compare_ends(combined, sent)
    interior = (dispatch, *outputs.values(), mlp, combine)
    readers = [user for user in counts.users if user is not mlp]
    around = Surroundings(
        counts_are_read=bool(readers),
        counts_read_before_combine=any(reader < combine for reader in readers),
        counts_read_before_weights=any(reader < combined.weights for reader in readers),
        scopes_differ=len({summary.scopes.get(node, ()) for node in (dispatch, mlp, combine)}) > 1,
        collective_groups=summary.groups,
    )
    wiring = read_wiring((dispatch, mlp, combine), interior, mlp)
    spec, key = specs.get(wiring, around, lambda: _spec(sent, combined.weights, experts, around))
    return Block(
        module_path(combine),
        dispatch,
        mlp,
        combine,
        counts if readers else None,
        interior,
        summary.routes.get(sent.ids),
        spec,
        Wiring(wiring.inputs, key),
    )


def _compare_ends(combined: CombineCall[Node], sent: DispatchCall[Node]) -> None:
    """Nodes must be the same ones: equal to another node is none of them."""
    for name, a, b in zip(_BOTH_ENDS, _of_both_ends(combined), _of_both_ends(sent), strict=True):
        if a is not b and (isinstance(a, Node) or isinstance(b, Node) or a != b):
            raise _NotABlock("raise.both_ends", f"dispatch has {name} {b}, combine has {a}: both ends must agree")


def _spec(sent: DispatchCall[Node], weights: Node, experts: GroupedMlpCall[Node], around: Surroundings) -> BlockSpec:
    mask = None if sent.mask is None else _value(sent.mask)
    values = DispatchCall[Any](**{**sent._asdict(), "x": _value(sent.x), "ids": _value(sent.ids), "mask": mask})
    weights_value = _value(weights)
    tensors = ExpertOperands(**{name: _operands(getattr(experts, name) or ()) for name in OPERAND_NAMES})
    _width(values.x)
    for factors in (sent.x_smooth, experts.h_smooth, experts.h_clip):
        if factors is not None:
            _static_value(factors)
    return spec_of_graph(values, weights_value, experts, tensors, around)


def _operands(nodes: Sequence[Node]) -> Operands:
    return Operands.of([(_static_value(node), is_stored(node)) for node in nodes])


def _static_value(node: Node) -> torch.Tensor:
    """The value of an expert's tensor, whose sizes become static where they are symbolic: those of a model never vary.

    With ``dynamic=True`` weights that are arguments of the compiled function have symbolic sizes. A rule on them could be
    proven for some of its readers and not for others.
    """
    value = _value(node)
    for size in (*value.shape, *value.stride()):
        _require_static(size, f"{node.name}, a tensor of the experts, has shape {tuple(value.shape)} and size {size}")
    return value


def _require_static(size: Any, what: str) -> None:
    """A symbolic size can be fixed at its present value: that adds a guard, which nothing forbids."""
    if not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None:
        return
    if not size.node.has_hint():
        raise _NotABlock("raise.data_dependent", f"{what}, which depends on data")
    if is_strict(size) or must_vary(size):
        raise _NotABlock(
            "raise.size_varies", f"{what}, which must vary (mark_dynamic); accepted: a size that a graph may fix"
        )


def _width(value: torch.Tensor) -> int:
    """The last dimension, made static when it is symbolic: the widths of a model never vary."""
    width = value.shape[-1]
    _require_static(width, f"the last dimension of x or of the logits is {width}")
    return int(width)


def _value(node: Node) -> torch.Tensor:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise _NotABlock("raise.no_value", f"{node.name} has no fake value (meta['val'])")
    return value


def _require_unwritten(block: Block, writes: Writes) -> None:
    """The rewrite reads the block's inputs anywhere between its two ends, and others may see its counts there."""
    stages = block.stages
    read = [n for stage in stages for n in stage.all_input_nodes if n not in block.interior or n is block.counts]
    writer = writes.between(block.dispatch, block.combine, read)
    if writer is not None:
        raise _NotABlock(
            "raise.written_between",
            f"{describe(writer)} writes in place into what the block reads, between its dispatch {block.dispatch.name} and "
            f"its combine {block.combine.name}, where the lowering would read it elsewhere; accepted: the write before or "
            "after the block, or into a copy",
        )


def _only_user(node: Node | None, what: str, target: Any) -> Node:
    if node is None or not node.users:
        raise _NotABlock("raise.unused", f"{what} is not used")
    users = list(node.users)
    if len(users) > 1:
        raise _NotABlock(
            "raise.single_use", f"{what} is read by {len(users)} operations: {', '.join(u.name for u in users)}"
        )
    if users[0].target is not target:
        raise _NotABlock("raise.operation_between", f"{what} goes to {users[0].target}, expected {target}")
    return users[0]


def _require_alone(node: Node | None, what: str, user: Node) -> None:
    if node is not None and set(node.users) - {user}:
        others = ", ".join(u.name for u in node.users if u is not user)
        raise _NotABlock("raise.single_use", f"{what} is also read by {others}")
