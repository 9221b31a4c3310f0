"""For tests: fake deployments, ``lower_graph``, which lowers a graph and runs nothing, and assertions on the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from moe_lowering import simulator
from moe_lowering.argument_checks import (
    refuse,
    require_callable,
    require_choice,
    require_flag,
    require_instance,
    require_integer,
)
from moe_lowering.backends.aot import lowering_backend
from moe_lowering.deployment import Deployment
from moe_lowering.limits.table import load
from moe_lowering.lookup import did_you_mean
from moe_lowering.passes.agreement_check import ASSERT_AGREEMENT
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.pipeline import MoeLowering
from moe_lowering.report.records import LoweringReport


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A lowered graph with the report of its lowering.

    Attributes:
        gm: the graph module after the pass.
        report: what the pass did and why.
        ops_before, ops_after: names of the operators of the graph in order, e.g. ``npu.npu_swiglu``; those of graphs
            inside of it follow, each once. Without ``assert_agreement``, which is host code that every graph with an exchange
            has, whatever became of it.
    """

    gm: GraphModule
    report: LoweringReport
    ops_before: tuple[str, ...]
    ops_after: tuple[str, ...]


@contextmanager
def fake_deployment(**fields: Any) -> Iterator[Deployment]:
    """A deployment of any size over a fake process group: collectives have shapes and names, and move nothing.

    Args:
        fields: fields of ``Deployment``. Groups are made and named here: ``ep_group``, ``mc2_group`` (a second group over
            the same ranks), ``ep_communicator`` and ``tp_group`` cannot be given. ``soc`` defaults to A3, versions to
            ones that go together, ``providers`` to vllm_ascend, ``weight_format`` to nz, ``hccl_buffer_mb`` to 1024 and
            ``installed`` to nothing, so that every implementation can be legal; reports have a line with them. ``ep_rank``
            defaults to 0, ``tp_rank`` to the place of neighbours.

    Raises:
        RuntimeError: when a process group exists already.
        TypeError: a name that is no field.
        ValueError: a group; and as ``Deployment`` does.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _check_names(fields.keys())
    # torch_npu is the one that this vllm_ascend asks for
    current = {"providers": (("vllm_ascend", "0.23.0"),), "cann": "9.1.0", "torch_npu": "2.10.0.post4"}
    fields = {**current, "weight_format": "nz", "hccl_buffer_mb": 1024, **fields}
    fields.setdefault("ep_rank", 0)  # a fake group has no rank to read
    fields.setdefault("installed", ())  # and a fake deployment does not depend on libraries of this machine
    size, tp_size = fields.get("ep_size", 1), fields.get("tp_size", 1)
    _check_ranks(size, fields["ep_rank"], tp_size)
    if size == 1:
        yield Deployment(**fields)
        return
    if dist.is_initialized():
        raise RuntimeError("fake_deployment: a process group exists already; destroy it first")
    rank = fields["ep_rank"]
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        world = dist.distributed_c10d._get_default_group()
        groups: dict[str, Any] = {"ep_group": world.group_name, "ep_communicator": world.group_name}
        groups["mc2_group"] = dist.new_group(range(size)).group_name
        if tp_size > 1:
            first = rank - rank % tp_size
            groups["tp_group"] = dist.new_group(range(first, first + tp_size)).group_name
            fields.setdefault("tp_rank", rank % tp_size)
        yield Deployment(**fields, **groups)
    finally:
        dist.destroy_process_group()


def _check_names(given: Set[str]) -> None:
    groups = {"ep_group", "mc2_group", "ep_communicator", "tp_group"}
    accepted = [field.name for field in dataclasses.fields(Deployment) if field.init and field.name not in groups]
    for name in sorted(given - set(accepted)):
        if name in groups:
            raise ValueError(f"fake_deployment: {name} cannot be given; groups are made here")
        hint = did_you_mean(name, accepted, most=2, cutoff=0.4)
        raise TypeError(f"fake_deployment: {name} is no field of Deployment{hint}; accepted: {', '.join(accepted)}")


def _check_ranks(size: Any, rank: Any, tp_size: Any) -> None:
    """What the groups are made of, before they are: torch would say it with an assertion of its own."""
    require_integer("fake_deployment", "ep_size", size, 1)
    require_integer("fake_deployment", "ep_rank", rank, 0, size - 1)
    require_integer("fake_deployment", "tp_size", tp_size, 1, size)
    if size % tp_size:
        raise refuse("fake_deployment", "tp_size", tp_size, f"a divisor of ep_size, {size}")


def fake_tensors() -> FakeTensorMode:
    """A mode under which tensors and modules have shapes and no data: models of any size on a laptop."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class _Captured(Exception):
    """Ends a compile once the graph is lowered: nothing is run."""


def lower_graph(
    function: Callable[..., Any],
    *args: Any,
    deployment: Deployment,
    comm: str = "auto",
    strict: bool = False,
    policy: str = "auto",
    lowering: MoeLowering | None = None,
    dynamic: bool = False,
) -> Lowered:
    """Trace ``function(*args)`` as torch.compile does, run the pass on its graph, and run nothing.

    Args:
        function: a function or module, for inference. Its tensors may be real, or fake (``fake_tensors``).
        deployment, comm, strict, policy: as for ``MoeLowering``.
        lowering: a pass object of yours, in place of one made from these.
        dynamic: make sizes symbolic.

    Raises:
        LoweringError: in strict mode, when a block is left unlowered.
        ValueError: an argument that is not accepted.
    """
    require_callable("lower_graph", "function", function, "a function or a module")
    require_instance("lower_graph", "deployment", deployment, Deployment, "a moe_lowering.Deployment")
    require_instance(
        "lower_graph", "lowering", lowering, (MoeLowering, type(None)), "a moe_lowering.MoeLowering, or None"
    )
    require_flag("lower_graph", "dynamic", dynamic)
    simulator.enable(soc=simulator.soc() if simulator.is_enabled() else deployment.soc)
    lowering = lowering or MoeLowering(deployment, comm, strict, policy)
    record: dict[str, Any] = {}

    def note_before(gm: GraphModule, *_: Any) -> None:
        record["before"] = _operators(gm)

    def note_after(gm: GraphModule, *_: Any) -> None:
        record["after"] = _operators(gm)
        record["gm"] = gm
        raise _Captured

    torch._dynamo.reset()
    compiled = torch.compile(
        function, backend=lowering_backend(note_before, lowering, note_after), fullgraph=True, dynamic=dynamic
    )
    try:
        with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
            compiled(*args)
    except Exception as error:
        if not isinstance(_root(error), _Captured):
            raise _root(error) from error
    return Lowered(record["gm"], lowering.reports[-1], record["before"], record["after"])


def _root(error: BaseException) -> BaseException:
    inner = getattr(error, "inner_exception", None)
    return inner if inner is not None else error


def _operators(gm: GraphModule) -> tuple[str, ...]:
    return tuple(
        node.target._schema.name.replace("::", ".")
        for each in gm.modules()
        if isinstance(each, GraphModule)
        for node in each.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target is not ASSERT_AGREEMENT
    )


def assert_lowered(
    lowered: Lowered, *, comm: str | None = None, ops: Sequence[str] = (), blocks: int | None = None
) -> None:
    """Every block was lowered.

    Args:
        comm: every block was lowered to this implementation.
        ops: operators that must be in the graph, in this order (others may stand between).
        blocks: the number of blocks.

    Raises:
        AssertionError: naming what differs, with the reasons the pass gave.
        ValueError: an argument that is not accepted: an implementation that does not exist was never chosen.
    """
    require_instance("assert_lowered", "lowered", lowered, Lowered, "what lower_graph returns")
    if comm is not None:
        require_choice("assert_lowered", "comm", comm, tuple(IMPLEMENTATIONS))
    report = lowered.report
    why = "; ".join([f"{b.name}: {b.reason}" for b in report.blocks] + [f"{w}: {r}" for w, r in report.unlowered])
    _require(report.fully_lowered, f"not every block was lowered: {why}")
    _require(report.blocks, "no MoE block was found in the graph")
    _require(blocks in (None, len(report.blocks)), f"{len(report.blocks)} blocks, expected {blocks}: {why}")
    comms = {b.comm for b in report.blocks}
    _require(comm is None or comms == {comm}, f"lowered to {sorted(map(str, comms))}, expected {comm}: {why}")
    remaining = iter(lowered.ops_after)
    for name in ops:
        there = name in remaining
        _require(there, f"{name} is not in the lowered graph in this order; it has {list(lowered.ops_after)}")


def _require(holds: object, why: str) -> None:
    """An ``assert`` that is there under ``python -O``, too: pytest brings back those of test files alone."""
    if not holds:
        raise AssertionError(why)


def assert_refused(lowered: Lowered, *, code: str, comm: str | None = None) -> None:
    """Something was refused with ``code``: a block, by an implementation's verdict, or a graph that is no block.

    Args:
        code: of a violation, or (``raise.*``) of what keeps generic operators from being a block, or (``capture.*``)
            of what keeps the graph from being captured.
        comm: the implementation whose verdict must hold the violation; any when None.

    Raises:
        AssertionError: naming the codes that were found.
        ValueError: an argument that is not accepted.
    """
    require_instance("assert_refused", "lowered", lowered, Lowered, "what lower_graph returns")
    require_instance("assert_refused", "code", code, str, "the code of a rule, e.g. 'mc2.hidden'")
    if comm is not None:
        require_choice("assert_refused", "comm", comm, tuple(IMPLEMENTATIONS))
    report = lowered.report
    _require(report.blocks or report.unlowered or report.not_capturable, "no MoE block was found in the graph")
    codes = {
        (name, violation.code)
        for block in report.blocks
        for name, verdict in block.verdicts.items()
        for violation in verdict.violations
    }
    codes |= {("", why[1 : why.index("]")]) for _, why in report.unlowered if why.startswith("[")}
    codes |= {("", finding.code) for finding in report.not_capturable}
    hits = [name for name, found_code in codes if found_code == code and comm in (None, name)]
    beside = _beside(report, code, comm)
    _require(hits, f"no {comm or 'implementation'} was refused with {code}; found {sorted(codes)}{beside}")


def _beside(report: LoweringReport, code: str, comm: str | None) -> str:
    """What explains that a code was not found: the implementation is legal, or the code is misspelled."""
    parts = [
        f"{block.name}: {name} was legal{' and taken' if name == block.comm else ''}"
        for block in report.blocks
        for name, verdict in block.verdicts.items()
        if verdict.legal and comm in (None, name)
    ]
    known = {row.code for row in load()}
    if code not in known and code.partition(".")[0] in {other.partition(".")[0] for other in known}:
        parts.append(f"{code} is no code of the limit tables{did_you_mean(code, known)}")
    return "".join(f"; {part}" for part in parts)
