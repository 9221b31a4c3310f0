"""Raise: find MoE blocks in a graph and bring each to a record. Reads the graph, never edits it, never guesses.

Contract. A block is ``dispatch -> grouped_mlp -> combine`` of our generic operators such that
- dispatched rows, their scale and the handle are read by the next stage only (counts may be read elsewhere too);
- the grouped MLP's result is read by ``combine`` only;
- both ends name the same ids, mask, group, sizes and token bound;
- nothing that it reads, and no counts, are written in place between its first and its last stage (``writes``).
Everything else that contains a generic operator is left alone and returned with what was seen.
Source: here.architecture: the operators' schemas.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

import moe_lowering.custom_ops  # noqa: F401  (registers torch.ops.moe_lowering)
from moe_lowering.passes.blocks import Block, BlockSpec, Route, RouteSpec, arguments, shape_key
from moe_lowering.passes.operands import Experts, Operands, is_stored
from moe_lowering.passes.quantities import GROUP_SELECT_MODES, NORM_TYPES
from moe_lowering.passes.scopes import scope_paths
from moe_lowering.passes.token_ranges import is_strict, must_vary
from moe_lowering.passes.writes import Writes, describe

OPS = torch.ops.moe_lowering
_COLLECTIVES = tuple(
    getattr(torch.ops._c10d_functional, name).default
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single", "broadcast")
)
_ARGUMENT = re.compile(r"^L\['(\w+)'\]")  # what dynamo calls the module that is compiled
# The order of arguments after the tensors: of both ends, and those of dispatch alone among them.
_DISPATCH = (
    "num_experts", "ep_group", "ep_size", "tp_group", "tp_size", "max_tokens", "max_rows", "shared_expert_ranks",
    "shared_experts", "on_shared_rank",
)  # fmt: skip
_COMBINE = tuple(name for name in _DISPATCH if name not in ("max_rows", "on_shared_rank"))


class _NotABlock(Exception):
    """Why a generic operator is not part of a block: a stable code, and words. Never leaves this module."""

    def __init__(self, code: str, words: str) -> None:
        super().__init__(f"[{code}] {words}")


def place(node: Node) -> str:
    """Where in the model a node comes from: the innermost module's path, or the node's name."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    try:
        path = str(next(reversed(stack.values()))[0])
    except Exception:  # metadata that others wrote, in another form: a name is for people, and must not fail a compile
        return node.name
    path = _ARGUMENT.sub(lambda found: "" if found[1] == "self" else found[1], path)
    return path.replace("._modules['", ".").replace("']", "").removeprefix(".") or node.name


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
    groups = _collective_groups(graph) if dispatches else frozenset()
    scopes = scope_paths(graph) if dispatches else {}
    by_ids = {route.ids: route for route in routes if route.ids is not None}
    writes = Writes(graph) if dispatches else None
    blocks: list[Block] = []
    for node in dispatches:
        try:
            block = _block(node, by_ids, scopes, groups)
            _require_unwritten(block, writes)
            blocks.append(block)
        except _NotABlock as reason:
            left.append((node, str(reason)))
    taken = {node for block in blocks for node in (block.mlp, block.combine)}
    for target in (OPS.grouped_mlp.default, OPS.combine.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if node not in taken:
                left.append((node, "[raise.no_chain] not part of a dispatch, grouped_mlp, combine chain"))
    return blocks, routes, left


def _collective_groups(graph: Graph) -> frozenset[str]:
    """Names of the groups that collectives of the graph use; each takes its group last."""
    found = (node for op in _COLLECTIVES for node in graph.find_nodes(op="call_function", target=op))
    return frozenset(str(node.args[-1]) for node in found)


def _route(node: Node) -> Route:
    items = _items(node)
    logits, bias, top_k, scoring, renormalize, num_groups, topk_groups, group_score, scale = arguments(node)
    if items is None:
        raise _NotABlock("raise.whole_result", "route's result is used as a whole, or one output twice")
    for name, word, known in (("scoring", scoring, NORM_TYPES), ("group_score", group_score, GROUP_SELECT_MODES)):
        if word not in known:
            raise _NotABlock("raise.unknown_word", f"route's {name} is {word!r}; the pass knows {', '.join(known)}")
    value = _value(logits)
    experts = _width(value)
    spec = RouteSpec(
        rows=_tokens(value),
        experts=experts,
        top_k=top_k,
        scoring=scoring,
        renormalize=renormalize,
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_score=group_score,
        scale=scale,
        has_bias=bias is not None,
        key=(shape_key(value), shape_key(bias.meta["val"]) if bias is not None else None),
    )
    return Route(node, items.get(0), items.get(1), spec)


def _block(
    dispatch: Node, by_ids: dict[Node, Route], scopes: dict[Node, tuple[str, ...]], groups: frozenset[str]
) -> Block:
    x, x_scale, ids, mask, *sizes = arguments(dispatch)
    shared = dict(zip(_DISPATCH, sizes, strict=True))
    items = _items(dispatch)
    if items is None:
        raise _NotABlock("raise.whole_result", "dispatch's result is used as a whole, or one output twice")
    rows, row_scale, counts, handle = (items.get(i) for i in range(4))
    mlp = _only_user(rows, "rows", OPS.grouped_mlp.default)
    combine = _only_user(mlp, "the grouped MLP's result", OPS.combine.default)
    mlp_rows, mlp_scale, mlp_counts, *experts = arguments(mlp)
    if mlp_rows is not rows or mlp_scale is not row_scale or mlp_counts is not counts or counts is None:
        raise _NotABlock(
            "raise.other_stage", "grouped_mlp does not take rows, row_scale and counts of the same dispatch"
        )
    combined_rows, weights, combine_ids, combine_handle, combine_mask, *combine_sizes = arguments(combine)
    _require_alone(row_scale, "row_scale", mlp)
    _require_alone(handle, "handle", combine)
    if combined_rows is not mlp or combine_handle is not handle:
        raise _NotABlock("raise.other_stage", "combine does not take the rows and the handle of the same dispatch")
    for name, a, b in [
        ("ids", combine_ids, ids),
        ("mask", combine_mask, mask),
        *((n, c, shared[n]) for n, c in zip(_COMBINE, combine_sizes, strict=True)),
    ]:
        if a is not b and (isinstance(a, Node) or isinstance(b, Node) or a != b):
            raise _NotABlock("raise.both_ends", f"dispatch has {name} {b}, combine has {a}: both ends must agree")
    interior = (dispatch, *items.values(), mlp, combine)
    readers = [user for user in counts.users if user is not mlp]
    spec = _spec(
        shared, (x, ids, weights, mask), experts, x_scale is not None,
        (bool(readers), any(r < combine for r in readers), any(r < weights for r in readers)),
        len({scopes.get(node, ()) for node in (dispatch, mlp, combine)}) > 1,
    )  # fmt: skip
    spec = dataclasses.replace(spec, collective_groups=groups)
    return Block(place(combine), dispatch, mlp, combine, counts if readers else None, interior, by_ids.get(ids), spec)


def _spec(
    shared: dict[str, Any],
    inputs: tuple[Node, Node, Node, Node | None],
    experts: Sequence[Any],
    quantised_input: bool,
    counts_read: tuple[bool, bool, bool],
    scopes_differ: bool,
) -> BlockSpec:
    values = [_value(node) if node is not None else None for node in inputs]
    x = values[0]
    assert x is not None
    name, limit, alpha, interleaved, quantisation = experts[4:9]
    tensors = Experts(*(_operands(nodes or ()) for nodes in (*experts[:4], *experts[9:15])))
    local_experts = shared["num_experts"] // (shared["ep_size"] - shared["shared_expert_ranks"])
    if shared["on_shared_rank"]:
        tensors = tensors.of_routed_rank(local_experts)
    w13, w2 = tensors.w13, tensors.w2
    scales = [each for each in (tensors.w13_scale, tensors.w2_scale) if each]
    return BlockSpec(
        tokens=_tokens(x),
        hidden=_width(x),
        intermediate=w2.first.shape[-2],
        top_k=int(_value(inputs[1]).shape[-1]),
        experts=shared["num_experts"],
        local_experts=local_experts,
        ep_size=shared["ep_size"],
        ep_group=shared["ep_group"],
        tp_size=shared["tp_size"],
        tp_group=shared["tp_group"],
        max_tokens=shared["max_tokens"],
        max_rows=shared["max_rows"],
        shared_expert_ranks=shared["shared_expert_ranks"],
        shared_experts=shared["shared_experts"],
        on_shared_rank=shared["on_shared_rank"],
        dtype=experts[15] or x.dtype,
        weight_dtype=w13.first.dtype,
        activation=name,
        limit=limit,
        alpha=alpha,
        interleaved=interleaved,
        stacked=w13.stacked and w2.stacked,
        weights_contiguous=all(w.is_contiguous() for w in (*w13.kinds, *w2.kinds)),
        has_bias=bool(tensors.w13_bias or tensors.w2_bias),
        has_mask=inputs[3] is not None,
        quantised_input=quantised_input,
        counts_are_read=counts_read[0],
        counts_read_before_combine=counts_read[1],
        counts_read_before_weights=counts_read[2],
        scopes_differ=scopes_differ,
        quantisation=quantisation,
        scale_dtypes=tuple(scale.first.dtype for scale in scales),
        scale_dims=max((scale.first.dim() + (scale.count > 1) for scale in scales), default=0),
        has_offset=bool(tensors.w13_offset or tensors.w2_offset),
        has_scale_bias=bool(tensors.w13_scale_bias and tensors.w2_scale_bias),
        mixed_forms=w13.first.dim() != w2.first.dim(),
        key=tuple(None if v is None else shape_key(v) for v in values),
        tensors=tensors,
    )


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


def _tokens(value: torch.Tensor) -> Any:
    tokens: Any = 1
    for size in value.shape[:-1]:
        tokens = tokens * size
    return tokens


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


def _items(node: Node) -> dict[int, Node] | None:
    """The getitem users of a node by output, -1 being the last one.

    None when it is used in another way, an output twice (under whatever index), or with an index that is none: a slice, a
    node, a number that it has no output for.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    outputs = len(node.target._schema.returns)
    items: dict[int, Node] = {}
    for user in node.users:
        index = user.args[1] if user.target is operator.getitem and len(user.args) == 2 else None
        if not isinstance(index, int) or not -outputs <= index < outputs or index % outputs in items:
            return None
        items[index % outputs] = user
    return items


def _require_unwritten(block: Block, writes: Writes | None) -> None:
    """The rewrite reads the block's inputs anywhere between its two ends, and others may see its counts there."""
    stages = block.stages
    read = [n for stage in stages for n in stage.all_input_nodes if n not in block.interior or n is block.counts]
    writer = writes.between(block.dispatch, block.combine, read) if writes is not None else None
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
