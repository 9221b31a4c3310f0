"""Overlap: the shared expert of a lowered block on a stream of its own, beside dispatch, grouped MLP and combine.

Before:  routing > dispatch > MLP > combine > shared expert > add            (or the shared expert first)
After:   routing > record(in) > scope_enter > wait(in) > shared expert > record(out) > scope_exit >
         dispatch > MLP > combine > wait(out) > keep_alive(inputs) > add

A shared expert is what is added to the block's y, is read by nothing else, holds a matrix product, and does not depend on
the block. Everything that only it needs goes with it, as one region, before the block's first communication operator.
vllm-ascend does the same with events and a second stream.

Preserved: every value. Order between the streams is by tagged events: inside npugraph_ex's graphs
``npugraph_ex.record`` and ``wait`` do nothing (fx2acl_converter.py rewrites only ``air.record`` and ``air.wait``), and the
events that npugraph_ex adds by itself tie a scope to the beginning and the end of the graph only (graph_pass.py,
apply_event_closure_with_multi_stream). Names of ``_create_event_by_name`` are put into the graph's code, which makes the
events anew in each process, also when it comes from ``cache_compile``. Memory: what the region reads is held until the
main stream has waited (``keep_alive``); what it allocates belongs to the side stream, which starts each region after an
event that the main stream recorded after it had read the previous one's result.
Sources: vllm_ascend_0_13.fused_moe: shared experts on a second stream; wheel.multi_stream.

Refused, with a code, and left in plain order: see ``CODES``. Nothing here fails a compile.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import logging
import operator
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.edit_log import EditLog
from moe_lowering.passes.emitter import COPIED_META, is_emitted
from moe_lowering.passes.memory_effects import writes
from moe_lowering.passes.scopes import is_marker, scope_paths
from moe_lowering.vocabulary import ONE_OPERATOR

log = logging.getLogger(__name__)
aten = torch.ops.aten

LABEL = "moe_lowering_shared_expert"
MAX_ADDS = 3  # the residual may be added before the shared expert's result
CODES = {
    "overlap.no_streams": "plain order: only npugraph_ex's graphs have stream scopes",
    "overlap.no_events": "plain order: the block is one operator, which nothing can stand inside",
    "overlap.no_shared_expert": "nothing that could overlap is added to the block's result",
    "overlap.no_matmul": "plain order: what is added to the block's result has no matrix product",
    "overlap.used_elsewhere": "plain order: the shared expert's result is read by more than the addition",
    "overlap.depends_on_block": "plain order: what is added to the block's result depends on that result",
    "overlap.late_input": "plain order: the shared expert reads what exists only after the block's dispatch",
    "overlap.scope": "plain order: the shared expert or the block is in a scope, or one lies between them",
    "overlap.side_effect": "plain order: the shared expert, or what it would move past, writes or draws random numbers",
    "overlap.communicates": "plain order: the shared expert communicates between ranks",
    "overlap.failed": "plain order: moving the shared expert failed and was undone",
}

_THROUGH = frozenset({
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._to_copy.default, aten.clone.default,
    aten.squeeze.dim, aten.unsqueeze.default, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.alias.default,
    torch.ops.prims.convert_element_type.default,
})  # fmt: skip
_MATMUL = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum", "_scaled_mm", "_int_mm", "_grouped_mm"}
)
_UNSAFE_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_ONE_OPERATOR = "moe_lowering.alltoall_experts"  # AllToAll with exact splits
_PROCESS = uuid.uuid4().hex[:8]  # graphs of other processes come out of compile caches, with events of their own
_number = itertools.count()


@dataclasses.dataclass(frozen=True)
class OverlapTarget:
    """One lowered block: the name of its implementation, the nodes it was rewritten to, and its result among them."""

    comm: str
    nodes: Sequence[Node]
    y: Node


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What to move (``region``, in graph order) to before ``position``; ``result`` of it is read by ``add`` only."""

    region: tuple[Node, ...]
    inputs: tuple[Node, ...]
    result: Node
    add: Node
    position: Node


class _Refused(Exception):
    """A key of ``CODES``, and what to say beside it. Never leaves this module."""

    def __init__(self, code: str, more: str = "") -> None:
        super().__init__(f"[{code}] {CODES[code]}{f': {more}' if more else ''}")


def overlap(edits: EditLog, targets: Sequence[OverlapTarget], deployment: Deployment, config: Any) -> list[str]:
    """Move the shared expert of each lowered block to a side stream where that is possible.

    Args:
        edits: of the graph, edited in place. Every node it gets has the source metadata of the shared expert and ``val``
            None.
        targets: the blocks, in graph order.
        deployment: its mode.
        config: what the backend gave the pass: only npugraph_ex's configuration says that stream scopes mean something.

    Returns:
        One note per target: what overlaps, or ``[code]`` and why nothing does. Never raises.
    """
    streams = deployment.mode == "npugraph_ex" and _is_npugraph_ex(config)
    paths: dict[Node, tuple[str, ...]] | None = None
    notes = []
    for target in targets:
        try:
            if not streams:
                raise _Refused("overlap.no_streams")
            if paths is None:  # read before the first edit, as the edits add scopes
                paths = scope_paths(edits.graph)
            plan = _plan(target, paths)
            added: list[Node] = []
            with edits.step(added):
                _edit(edits, plan, added)
            notes.append(f"the shared expert ({_matmuls(plan.region)}) overlaps dispatch to combine on a side stream")
        except _Refused as refused:
            notes.append(str(refused))
        except Exception as error:  # a defect of ours must not fail the user's compile
            log.warning("moe_lowering: overlapping a shared expert failed", exc_info=True)
            notes.append(str(_Refused("overlap.failed", f"{type(error).__name__}: {error}")))
    return notes


def _is_npugraph_ex(config: Any) -> bool:
    return "npugraph_ex" in type(config).__module__.split(".")


def _plan(target: OverlapTarget, paths: dict[Node, tuple[str, ...]]) -> _Plan:
    """What to move for one block. Reads only.

    Raises:
        _Refused: why there is nothing to move: the first reason met that is about an operand with a matrix product.
    """
    position = _position(target)
    reasons: list[_Refused] = []
    for operand, add in _walk_additions(target.y):
        if operand.op != "call_function" or _feeds(operand, position):  # the residual
            continue
        try:
            return _plan_for(operand, add, target, position, paths)
        except _Refused as refused:
            reasons.append(refused)
    telling = [r for r in reasons if "no_matmul" not in str(r)] or reasons
    raise telling[0] if telling else _Refused("overlap.no_shared_expert")


def _position(target: OverlapTarget) -> Node:
    """The block's first communication operator; its first Ascend operator where one rank has all experts."""
    nodes = sorted(node for node in target.nodes if isinstance(node.target, torch._ops.OpOverload))
    if target.comm in ONE_OPERATOR or any(_name(node) == _ONE_OPERATOR for node in nodes):
        raise _Refused("overlap.no_events")
    for starts in (_communicates, lambda node: node.target.namespace == "npu"):
        first = next(filter(starts, nodes), None)
        if first is not None:
            return first
    raise _Refused("overlap.failed", "the block has no operator of an NPU")


def _walk_additions(y: Node) -> Iterator[tuple[Node, Node]]:
    """Yield (operand, addition) for each addition to y, while each result has one reader; y itself may have more."""
    node = y
    for number in range(MAX_ADDS):
        reader = _reader(node, number == 0)
        while reader is not None and reader.target in _THROUGH and reader.all_input_nodes == [node]:
            node, reader = reader, _reader(reader, number == 0)
        if reader is None or reader.target is not aten.add.Tensor:
            return
        yield from ((other, reader) for other in reader.all_input_nodes if other is not node)
        node = reader


def _reader(node: Node, addition_among_others: bool) -> Node | None:
    readers = [user for user in node.users if user.target is not aten.sym_size.int]
    if len(readers) > 1 and addition_among_others:
        readers = [user for user in readers if user.target is aten.add.Tensor]
    return readers[0] if len(readers) == 1 else None


def _plan_for(
    result: Node, add: Node, target: OverlapTarget, position: Node, paths: dict[Node, tuple[str, ...]]
) -> _Plan:
    members = _only_for(result)
    region = tuple(sorted(members))
    if not _matmuls(region):
        raise _Refused("overlap.no_matmul")
    _check_region(region)
    if set(result.users) != {add}:
        raise _Refused("overlap.used_elsewhere")
    inputs = tuple(dict.fromkeys(source for node in region for source in node.all_input_nodes if source not in members))
    block = set(target.nodes)
    for late in inputs:
        if not late < position:
            depends = _reads_block(late, block, position)
            raise _Refused(
                "overlap.depends_on_block" if depends else "overlap.late_input", "" if depends else _name(late)
            )
    if any(node in paths for node in (*region, position, add)):
        raise _Refused("overlap.scope")
    _check_between(min(region[0], position), add, members)
    return _Plan(region, inputs, result, add, position)


def _only_for(result: Node) -> set[Node]:
    """``result`` and every operator that is read by such nodes only."""
    members, pending = {result}, [result]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source.op == "call_function" and source not in members and members.issuperset(source.users):
                members.add(source)
                pending.append(source)
    return members


def _feeds(node: Node, position: Node) -> bool:
    """Whether ``position`` depends on ``node``: a walk through its readers that stand before."""
    return _reaches(node, lambda n: n is position, lambda n: [user for user in n.users if not position < user])


def _reads_block(node: Node, block: set[Node], position: Node) -> bool:
    """Whether ``node``, which stands after ``position``, reads anything of the block."""
    return _reaches(node, block.__contains__, lambda n: [s for s in n.all_input_nodes if not s < position])


def _reaches(start: Node, goal: Callable[[Node], bool], onward: Callable[[Node], list[Node]]) -> bool:
    visited, pending = {start}, [start]
    while pending:
        node = pending.pop()
        if goal(node):
            return True
        fresh = [n for n in onward(node) if n not in visited]
        visited.update(fresh)
        pending += fresh
    return False


def _check_region(region: Sequence[Node]) -> None:
    for node in region:
        if is_marker(node):
            raise _Refused("overlap.scope")
        if _communicates(node):
            raise _Refused("overlap.communicates", _name(node))
        if not _is_pure(node):
            raise _Refused("overlap.side_effect", _name(node))


def _check_between(first: Node, last: Node, members: set[Node]) -> None:
    """Nothing that the region would be moved past is a wall: a scope, an event, or something that writes."""
    node = first
    while node is not last:
        if node not in members:
            if is_marker(node) or getattr(node.target, "namespace", "") == "npugraph_ex":
                raise _Refused("overlap.scope")
            # what a lowered block writes is memory that it has made: no shared expert reads it
            if isinstance(node.target, torch._ops.HigherOrderOperator) or (writes(node) and not is_emitted(node)):
                raise _Refused("overlap.side_effect", _name(node))
        node = node.next


def _is_pure(node: Node) -> bool:
    """An operator whose result depends on its arguments only, that writes nothing, and that the host need not wait for."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _is_safe(target) and not node.is_impure()
    return target is operator.getitem or isinstance(node.meta.get("val"), (int, torch.SymInt))


@functools.lru_cache(maxsize=1024)
def _is_safe(target: torch._ops.OpOverload) -> bool:
    return not (target._schema.is_mutable or any(tag in target.tags for tag in _UNSAFE_TAGS))


def _communicates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and _takes_group(node.target)


@functools.lru_cache(maxsize=1024)
def _takes_group(target: torch._ops.OpOverload) -> bool:
    """A collective, an operator that takes a group, or one of this package's: a block inside of the shared expert."""
    if target.namespace in ("_c10d_functional", "c10d", "npu_define"):
        return True
    if target.namespace == "moe_lowering":
        return target._opname not in ("assert_agreement", "assert_tokens", "keep_alive")
    return any(_is_group(argument) for argument in target._schema.arguments)


def _is_group(argument: Any) -> bool:
    """``group``, ``group_ep``, ``hcom`` and the like are strings; ``group_list`` of a grouped matmul is not."""
    return str(argument.type) in ("str", "Optional[str]") and argument.name.startswith(("group", "hcom", "comm"))


def _matmuls(region: Sequence[Node]) -> str:
    """The matrix products of a region, e.g. ``3 x aten.mm``; empty when it has none."""
    names = [_name(n) for n in region if isinstance(n.target, torch._ops.OpOverload) and _is_matmul(n.target)]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


@functools.lru_cache(maxsize=1024)
def _is_matmul(target: torch._ops.OpOverload) -> bool:
    name = target._opname
    return name in _MATMUL or (target.namespace == "npu" and ("matmul" in name or "linear" in name))


def _name(node: Node) -> str:
    return _name_of(node.target)


@functools.lru_cache(maxsize=1024)
def _name_of(target: Any) -> str:
    return target._schema.name.replace("::", ".") if isinstance(target, torch._ops.OpOverload) else str(target)


def _edit(edits: EditLog, plan: _Plan, added: list[Node]) -> None:
    """Move the region and order the streams."""
    graph = edits.graph
    create_event = _events()
    ops = torch.ops.npugraph_ex
    record, wait = ops.tagged_event_record.default, ops.tagged_event_wait.default
    begin, end = (f"moe_lowering_{_PROCESS}_{next(_number)}" for _ in range(2))
    create_event(begin)
    create_event(end)
    meta = {key: plan.result.meta[key] for key in COPIED_META if key in plan.result.meta}

    def call(target: Any, *args: Any) -> None:
        node = graph.call_function(target, args)
        node.meta.update(meta, val=None)
        added.append(node)

    with graph.inserting_before(plan.position):
        call(record, begin, True)
        call(ops.scope_enter.default, ["_user_stream_label"], [LABEL])
        call(wait, begin, True)
        for node in plan.region:
            edits.move(node, plan.position)
        call(record, end, True)
        call(ops.scope_exit.default)
    with graph.inserting_before(plan.add):
        call(wait, end, True)
        tensors = _tensors(plan.inputs)
        if tensors:
            call(torch.ops.moe_lowering.keep_alive.default, tensors)


def _tensors(nodes: Sequence[Node]) -> list[Node]:
    return [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]


def _events() -> Callable[[str], None]:
    """What makes an event that the graph under way knows by its name; the operators on events are defined by then."""
    for module in ("scope._scope", "ops._tagged_event"):
        importlib.import_module(f"npugraph_ex.{module}")
    passes = importlib.import_module("npugraph_ex._acl_concrete_graph.graph_pass")
    create: Callable[[str], None] = passes._create_event_by_name
    return create
