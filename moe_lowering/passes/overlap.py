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
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.emission.emitter import COPIED_META
from moe_lowering.passes.graph.communication import communicates
from moe_lowering.passes.graph.edit_log import EditLog
from moe_lowering.passes.graph.operator_names import operator_name
from moe_lowering.passes.graph.scopes import scope_paths
from moe_lowering.passes.overlap_region import THROUGH, Refused, check_between, check_region
from moe_lowering.vocabulary import ONE_OPERATOR

log = logging.getLogger(__name__)
aten = torch.ops.aten

LABEL = "moe_lowering_shared_expert"
MAX_ADDS = 3  # the residual may be added before the shared expert's result

_MATMUL = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum", "_scaled_mm", "_int_mm", "_grouped_mm"}
)
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
                raise Refused("overlap.no_streams")
            if paths is None:  # read before the first edit, as the edits add scopes
                paths = scope_paths(edits.graph)
            plan = _plan(target, paths)
            added: list[Node] = []
            with edits.step(added):
                _edit(edits, plan, added)
            notes.append(f"the shared expert ({_matmuls(plan.region)}) overlaps dispatch to combine on a side stream")
        except Refused as refused:
            notes.append(str(refused))
        except Exception as error:  # a defect of ours must not fail the user's compile
            log.warning("moe_lowering: overlapping a shared expert failed", exc_info=True)
            notes.append(str(Refused("overlap.failed", f"{type(error).__name__}: {error}")))
    return notes


def _is_npugraph_ex(config: Any) -> bool:
    return "npugraph_ex" in type(config).__module__.split(".")


def _plan(target: OverlapTarget, paths: dict[Node, tuple[str, ...]]) -> _Plan:
    """What to move for one block. Reads only.

    Raises:
        Refused: why there is nothing to move: the first reason met that is about an operand with a matrix product.
    """
    position = _position(target)
    reasons: list[Refused] = []
    for operand, add in _walk_additions(target.y):
        if operand.op != "call_function" or _feeds(operand, position):  # the residual
            continue
        try:
            return _plan_for(operand, add, target, position, paths)
        except Refused as refused:
            reasons.append(refused)
    telling = [r for r in reasons if "no_matmul" not in str(r)] or reasons
    raise telling[0] if telling else Refused("overlap.no_shared_expert")


def _position(target: OverlapTarget) -> Node:
    """The block's first communication operator; its first Ascend operator where one rank has all experts."""
    nodes = sorted(node for node in target.nodes if isinstance(node.target, torch._ops.OpOverload))
    if target.comm in ONE_OPERATOR or any(operator_name(node) == _ONE_OPERATOR for node in nodes):
        raise Refused("overlap.no_events")
    for starts in (communicates, lambda node: node.target.namespace == "npu"):
        first = next(filter(starts, nodes), None)
        if first is not None:
            return first
    raise Refused("overlap.failed", "the block has no operator of an NPU")


def _walk_additions(y: Node) -> Iterator[tuple[Node, Node]]:
    """Yield (operand, addition) for each addition to y, while each result has one reader; y itself may have more."""
    node = y
    for number in range(MAX_ADDS):
        reader = _reader(node, number == 0)
        while reader is not None and reader.target in THROUGH and reader.all_input_nodes == [node]:
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
        raise Refused("overlap.no_matmul")
    check_region(region)
    if set(result.users) != {add}:
        raise Refused("overlap.used_elsewhere")
    inputs = tuple(dict.fromkeys(source for node in region for source in node.all_input_nodes if source not in members))
    block = set(target.nodes)
    for late in inputs:
        if not late < position:
            depends = _reads_block(late, block, position)
            raise Refused(
                "overlap.depends_on_block" if depends else "overlap.late_input", "" if depends else operator_name(late)
            )
    if any(node in paths for node in (*region, position, add)):
        raise Refused("overlap.scope")
    check_between(min(region[0], position), add, members)
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


def _matmuls(region: Sequence[Node]) -> str:
    """The matrix products of a region, e.g. ``3 x aten.mm``; empty when it has none."""
    names = [operator_name(n) for n in region if isinstance(n.target, torch._ops.OpOverload) and _is_matmul(n.target)]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


@functools.lru_cache(maxsize=1024)
def _is_matmul(target: torch._ops.OpOverload) -> bool:
    name = target._opname
    return name in _MATMUL or (target.namespace == "npu" and ("matmul" in name or "linear" in name))


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
