"""``lower`` without ``--fake``: compile a model with the real npugraph_ex, run it on one or several ranks, and compare."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config

from moe_lowering import simulator
from moe_lowering.backends.npugraph_ex import npugraph_ex_options
from moe_lowering.cli import progress as shown_progress
from moe_lowering.cli.deployments import make_deployment
from moe_lowering.cli.lower import compare, graph_replay, models
from moe_lowering.cli.lower.configs import is_small
from moe_lowering.cli.lower.outcome import LowerOutcome
from moe_lowering.cli.lower.prepare import (
    deployment_facts,
    early_outcome,
    register_transformers,
    tensor_parallel_place,
    unsupported_modules,
)
from moe_lowering.cli.lower.request import REPLAYS, LowerRequest
from moe_lowering.cli.simulation import enable_simulator
from moe_lowering.cli.usage import UsageError
from moe_lowering.deployment import Deployment
from moe_lowering.layers.sharding import shard_experts
from moe_lowering.number_words import count_of, gigabytes
from moe_lowering.passes.pipeline import MoeLowering
from moe_lowering.quantisation import quantise_experts
from moe_lowering.report.records import LoweringReport
from moe_lowering.testing.forking import fork_from_imports
from moe_lowering.testing.ranks import Ranks

Progress = Callable[[str], None]

COLLECTIVE_TIMEOUT = 300.0  # seconds that a rank waits for one that is still compiling
RANK_TIMEOUT = 1800.0
# What a rank imports late, when it compiles
COMPILED_WITH = ("torch_npu.dynamo.npugraph_ex.npu_fx_compiler",)


@dataclasses.dataclass(frozen=True)
class RankResult:
    """What one rank reports. ``refused``: why nothing could be captured, and so nothing was compared."""

    reports: list[LoweringReport]
    errors: compare.Errors | None
    seconds: dict[str, float]
    captured: graph_replay.Captured | None = None
    refused: str = ""


def lower_and_compare(request: LowerRequest, progress: Progress) -> LowerOutcome:
    """Carry out a command without ``--fake``."""
    progress(f"enabling the simulator ({request.soc})")
    enable_simulator(request.soc, request.capture)
    register_transformers(request)
    plan = models.plan_model(request)
    skeleton = models.skeleton(plan)
    unsupported = unsupported_modules(skeleton)
    if outcome := early_outcome(request, plan, skeleton, unsupported):
        return outcome
    require_memory(plan, skeleton, request, models.available_memory())
    if request.ep == 1:
        results = [run_rank(request, plan, make_deployment(request), progress)]
    else:
        progress(f"running on {count_of(request.ep, 'rank')}; each starts with imports")
        fork_from_imports(*COMPILED_WITH)
        setup = functools.partial(enable_simulator, request.soc, request.capture)
        with Ranks(request.ep, setup=setup, collective_timeout=COLLECTIVE_TIMEOUT, start_method="forkserver") as ranks:
            results = ranks.run(_rank_job, request, timeout=RANK_TIMEOUT)
        require_same_choices([result.reports for result in results])
    measured = [result.errors for result in results if result.errors is not None]
    errors = functools.reduce(compare.Errors.merge, measured) if len(measured) == len(results) else None
    captured = [result.captured for result in results if result.captured is not None]
    facts = _model_facts(request, plan, results[0])
    refused = next((result.refused for result in results if result.refused), "")
    return LowerOutcome(request, plan.name, results[0].reports, unsupported, errors, facts, captured, refused)


def require_memory(plan: models.ModelPlan, skeleton: nn.Module, request: LowerRequest, available: int | None) -> None:
    """Refuse weights that this machine cannot hold: with a config.json they may have any size.

    Raises:
        UsageError: they need more than ``available`` bytes (None when that is not known).
    """
    size = sum(p.numel() for p in skeleton.parameters()) * getattr(torch, request.dtype).itemsize
    # each of several ranks holds the whole model, to compare with, and its share; so does the simulated device
    needed = size if request.ep == 1 and not request.capture else size * (2 * request.ep + 1)
    if available is not None and needed > available:
        raise UsageError(
            f"argument MODEL: the weights of {plan.name} with {count_of(plan.layers, 'layer')} on "
            f"{count_of(request.ep, 'rank')} need {gigabytes(needed)} and "
            f"{gigabytes(available)} are free; accepted: --fake, or fewer --layers"
        )


def require_same_choices(by_rank: list[list[LoweringReport]]) -> None:
    """Every rank must have lowered every block to the same implementation: ranks that differ hang on a real machine."""
    choices = [[[block.comm for block in report.blocks] for report in reports] for reports in by_rank]
    for rank, choice in enumerate(choices):
        if choice != choices[0]:
            raise RuntimeError(f"rank {rank} lowered to {choice}, rank 0 to {choices[0]}")


def _rank_job(rank: int, request: LowerRequest) -> RankResult:
    """One rank of several, in its own process."""
    import torch.distributed as dist

    register_transformers(request)
    backend = "hccl" if request.capture else None
    ep_group: Any = dist.new_group(range(request.ep), backend=backend) if backend else dist.group.WORLD
    mc2_group: Any = dist.new_group(range(request.ep), backend=backend)
    deployment = make_deployment(
        request,
        ep_rank=rank,
        ep_group=ep_group.group_name,
        mc2_group=graph_replay.communicator(mc2_group, rank) if backend else mc2_group.group_name,
        **tensor_parallel_place(request, rank, backend),
    )
    progress: Progress = shown_progress.Progress("rank 0") if rank == 0 else _report_nothing
    return run_rank(request, models.plan_model(request), deployment, progress)


def run_rank(request: LowerRequest, plan: models.ModelPlan, deployment: Deployment, progress: Progress) -> RankResult:
    """Build, lower, run and compare on one rank."""
    seconds: dict[str, float] = {}
    progress(f"building {plan.name} ({count_of(plan.layers, 'layer')}, {request.dtype})")
    model = _measure_seconds(seconds, "build", _build_model, plan, request)
    reference = model
    if deployment.ep_size > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch_npu's own deepcopy of a tensor uses a deprecated torch call
            reference = copy.deepcopy(model)
        shard_experts(model, deployment)
    elif request.quantised or request.capture:
        reference = copy.deepcopy(model)
    if request.quantised:
        quantise_experts(model, request.quant)
        compare.use_quantised_weights(reference, request.quant)
    lowering = MoeLowering(deployment, request.comm, policy=request.policy, overlap=request.overlap)
    routings = compare.record(model)
    if request.capture:
        return _run_captured(request, plan, lowering, model, reference, routings, seconds, progress)
    compiled = compile_model(model, request, lowering)
    inputs = [
        models.input_ids(plan, request, length, deployment.own_rank("ep") // request.tp) for length in request.lengths
    ]
    outputs: list[tuple[Tensor, compare.Taken]] = []
    for input_ids in inputs:
        progress(f"compiling and running {count_of(input_ids.numel(), 'token')}")
        routings.clear()
        actual = _measure_seconds(seconds, "compile and run", _run, compiled, input_ids)
        outputs.append((actual, list(routings)))
    progress("running the model's own experts, and comparing")
    compare.use_reference(reference)
    errors = compare.Errors()
    with torch.no_grad():
        for input_ids, (actual, recorded) in zip(inputs, outputs, strict=True):
            errors = errors.merge(compare.compare(reference, input_ids, actual, recorded))
    return RankResult(lowering.reports, errors, seconds)


def _run_captured(
    request: LowerRequest,
    plan: models.ModelPlan,
    lowering: MoeLowering,
    model: nn.Module,
    reference: nn.Module,
    routings: compare.Taken,
    seconds: dict[str, float],
    progress: Progress,
) -> RankResult:
    """Compile for the simulated device, capture, replay and compare; ``reference`` shares nothing with ``model``."""
    sources, rank = graph_replay.Sources(), lowering.deployment.own_rank("ep") // request.tp
    compiled = compile_model(model.to(graph_replay.DEVICE), request, lowering, sources)
    compare.use_reference(reference)
    replays = request.replays or REPLAYS
    batches = [
        graph_replay.inputs(plan, request, length, rank, step) for step in range(replays) for length in request.lengths
    ]
    sizes = count_of(len(request.lengths), "token count")
    progress(f"capturing and replaying {sizes}, {count_of(replays, 'time')} each, and comparing")
    try:
        captured, errors = _measure_seconds(
            seconds,
            "capture, replay and compare",
            graph_replay.replay,
            functools.partial(_run, compiled),
            reference,
            routings,
            batches,
            sources,
        )
    except simulator.device.CaptureError as error:
        if all(report.fully_lowered for report in lowering.reports):
            raise
        # No device has the operators that stayed
        return RankResult(lowering.reports, None, seconds, refused=str(error))
    return RankResult(lowering.reports, errors, seconds, captured)


def compile_model(
    model: nn.Module, request: LowerRequest, lowering: MoeLowering, before: graph_replay.Sources | None = None
) -> nn.Module:
    """The model under npugraph_ex; it compiles at its first call, and runs eagerly unless it is to be captured.

    ``before`` is called with the graph before it is lowered.
    """
    ranks = lowering.deployment.ep_size
    more: dict[str, Any] = {} if before is None else {"post_grad_custom_pre_pass": before}
    if not request.capture:
        more["force_eager"] = True
    timeout = COLLECTIVE_TIMEOUT if ranks > 1 else None
    options = npugraph_ex_options(lowering.deployment, lowering=lowering, agreement_timeout=timeout, **more)
    compiled: Any = torch.compile(
        model, backend="npugraph_ex", fullgraph=True, dynamic=request.dynamic, options=options
    )
    return compiled


def _build_model(plan: models.ModelPlan, request: LowerRequest) -> nn.Module:
    model = models.build(plan, getattr(torch, request.dtype))
    models.randomise(model)
    return model


@torch.no_grad()
def _run(compiled: nn.Module, input_ids: Tensor) -> Tensor:
    # Float attributes of the model (a scaling factor, an epsilon) are constants, not inputs of the graph.
    # Without duck shapes equal sizes have different symbols, and other sizes no second graph for the same token count.
    shapes: Any = _config  # its functions are added when it is imported
    with torch._dynamo.config.patch(specialize_float=True), shapes.patch(use_duck_shape=False):
        return models.logits(compiled, input_ids)


def _measure_seconds(seconds: dict[str, float], what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    result = call(*arguments)
    seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - started
    return result


def _model_facts(request: LowerRequest, plan: models.ModelPlan, result: RankResult) -> list[tuple[str, str]]:
    counts = ", ".join(str(request.batch * length) for length in request.lengths)
    graphs = len(result.reports)
    small = (
        f" of a small {request.model} with random weights (--fake lowers the full size)" if is_small(request) else ""
    )
    return [
        *deployment_facts(request),
        (
            "ran",
            f"{count_of(counts, 'token')} per rank on {count_of(request.ep, 'rank')}; {count_of(plan.layers, 'layer')}{small}",
        ),
        ("graphs", f"{graphs} ({'dynamic' if request.dynamic else 'static'} shapes)"),
        ("took", ", ".join(f"{what} {value:.1f} s" for what, value in result.seconds.items())),
    ]


def _report_nothing(message: str) -> None:
    pass
