"""Lower a model at full size without its weights: fake tensors, a fake process group, and the pass alone.

Graphs are traced by dynamo and AOTAutograd as npugraph_ex would get them, with the plain backend of ``backends.aot``: of each
kind of layer one (``layerwise``), or of the whole model with ``--whole``.
The lowered graph is not run: the backend stops the trace when the pass is done (``_Done``).
"""

from __future__ import annotations

import contextlib
import functools
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lowering import _bootstrap
from moe_lowering.backends.aot import lowering_backend
from moe_lowering.cli import collection
from moe_lowering.cli.deployments import make_deployment
from moe_lowering.cli.lower import fake_weights, layerwise, models, trace_progress
from moe_lowering.cli.lower.outcome import LowerOutcome
from moe_lowering.cli.lower.prepare import (
    deployment_facts,
    early_outcome,
    register_transformers,
    tensor_parallel_place,
    unsupported_modules,
)
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.cli.simulation import enable_simulator
from moe_lowering.deployment import Deployment
from moe_lowering.layers.sharding import shard_experts
from moe_lowering.number_words import count_of, megabytes
from moe_lowering.passes.pipeline import MoeLowering
from moe_lowering.quantisation import quantise_experts
from moe_lowering.report.records import LoweringReport


class _Done(Exception):
    """Ends the trace when the pass has run: the rest of the compile is not needed."""


def lower_fake(request: LowerRequest, progress: Callable[[str], None]) -> LowerOutcome:
    """Carry out a command with ``--fake``."""
    with collection.paused():
        if not _bootstrap.cann_is_installed():
            progress(f"enabling the simulator ({request.soc})")
            enable_simulator(request.soc)
        register_transformers(request)
        plan = models.plan_model(request)
        model = models.skeleton(plan, getattr(torch, request.dtype), fake=True)
    unsupported = unsupported_modules(model)
    if outcome := early_outcome(request, plan, model, unsupported):
        return outcome
    facts = deployment_facts(request)
    with _fake_groups(request) as deployment:
        lowering = MoeLowering(deployment, request.comm, policy=request.policy, overlap=request.overlap)
        progress(f"building {plan.name} ({count_of(plan.layers, 'layer')}, {request.dtype}) without weights")
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        is_fake = fake_weights.make_fake(model, mode)
        with mode:
            if not is_fake:
                model = models.build(plan, getattr(torch, request.dtype), fake=True)
            if request.ep > 1:
                shard_experts(model, deployment)
            if request.quantised:
                quantise_experts(model, request.quant)
            reports, seconds, what = _lower_layers(model, plan, request, lowering, progress)
    in_pass = sum(report.pass_ms for report in reports)
    facts += [
        (
            "traced",
            f"{count_of(request.tokens, 'token')} per rank, rank 0 of {request.ep}; {count_of(plan.layers, 'layer')}",
        ),
        ("lowered", what),
        ("took", f"tracing {seconds - in_pass / 1e3:.1f} s, pass {in_pass:.1f} ms"),
        ("peak memory", megabytes(_peak_bytes())),
    ]
    return LowerOutcome(request, plan.name, reports, unsupported, None, facts)


def _lower_layers(
    model: nn.Module,
    plan: models.ModelPlan,
    request: LowerRequest,
    lowering: MoeLowering,
    progress: Callable[[str], None],
) -> tuple[list[LoweringReport], float, str]:
    """(reports, seconds of tracing, what was traced): each kind of layer once, or the whole model."""
    started = time.perf_counter()
    ids = torch.zeros((request.batch, request.lengths[0]), dtype=torch.int64)

    def run(model: Any) -> Any:
        return models.logits(model, ids)

    why = "--whole" if request.whole else ""
    if not why:
        kinds = layerwise.unit_kinds(model)
        progress(
            f"running {count_of(request.tokens, 'token')} under fake tensors up to a layer of each kind (of {len(kinds)})"
        )
        calls, why = _calls_of(kinds, functools.partial(run, model))
    if not why:
        for at, kind in enumerate(kinds, 1):
            tell = _after(progress, f"kind {at} of {len(kinds)}, {layerwise.describe_kind(kind)}")
            _trace(layerwise.Alone(kind.module), request, lowering, calls[kind.names[0]].of, tell)
        if len(lowering.reports) == len(kinds):
            report = layerwise.spread(kinds, lowering.reports)
            return [report], time.perf_counter() - started, layerwise.describe_kinds(kinds)
        why = "a layer by itself gave no graph"
        lowering.reports.clear()
    _trace(
        model, request, lowering, run, _after(progress, f"the whole model, {count_of(plan.layers, 'layer')} ({why})")
    )
    return lowering.reports, time.perf_counter() - started, f"the graph of the whole model: {why}"


def _calls_of(kinds: list[layerwise.UnitKind], run: Callable[[], Any]) -> tuple[dict[str, layerwise.UnitCall], str]:
    """The call of the first of each kind of layer, or why layers cannot be lowered by themselves."""
    if not kinds:
        return {}, "an MoE module is in no list of layers"
    try:
        calls = layerwise.calls_of(kinds, run)
    except Exception as error:  # a model that does not run under fake tensors by itself may well be traced
        return {}, f"it does not run by itself under fake tensors ({type(error).__name__})"
    missing = [kind.names[0] for kind in kinds if kind.names[0] not in calls]
    return calls, f"{', '.join(missing)} is not called" if missing else ""


def _after(progress: Callable[[str], None], what: str) -> Callable[[str], None]:
    """A progress of which each message is about one thing."""
    return lambda message: progress(f"{what}: {message}")


def _trace(
    module: nn.Module,
    request: LowerRequest,
    lowering: MoeLowering,
    call: Callable[[Any], Any],
    progress: Callable[[str], None],
) -> None:
    """Trace a module up to the end of the pass."""

    def stop(gm: Any, example_inputs: Any, config: Any) -> None:
        raise _Done

    lower = lowering_backend(lowering, stop)

    def lower_and_tell(gm: Any, example_inputs: Any) -> Any:
        progress(f"dynamo made {len(gm.graph.nodes)} nodes; AOTAutograd reads them twice, then the pass")
        return lower(gm, example_inputs)

    progress("tracing with dynamo")
    compiled: Any = torch.compile(module, backend=lower_and_tell, fullgraph=True, dynamic=request.dynamic)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True), trace_progress.told(progress):
        try:
            call(compiled)
        except Exception as error:
            if not _stopped_by_us(error):
                raise


def _stopped_by_us(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, _Done):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _fake_groups(request: LowerRequest) -> Iterator[Deployment]:
    """The deployment of rank 0, with fake process groups of the right size: no other rank exists."""
    if request.ep == 1:
        yield make_deployment(request)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=request.ep, store=FakeStore())
    try:
        ep_group, mc2_group = dist.group.WORLD, dist.new_group(range(request.ep))
        assert ep_group is not None and mc2_group is not None
        yield make_deployment(
            request,
            ep_rank=0,
            ep_group=ep_group.group_name,
            mc2_group=mc2_group.group_name,
            **tensor_parallel_place(request, 0),
        )
    finally:
        dist.destroy_process_group()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
