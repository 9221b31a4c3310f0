"""Lower a small model through the real npugraph_ex, run it on CPU, on one or several ranks, and compare."""

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
from moe_lowering.cli import beforehand, capture, compare, model_check, models
from moe_lowering.cli.arguments import HCCL_BUFFER_MB, REPLAYS, WEIGHT_FORMAT, Request, UsageError
from moe_lowering.cli.outcome import Outcome
from moe_lowering.deployment import Deployment
from moe_lowering.layers import shard_experts
from moe_lowering.passes.pipeline import MoeLowering
from moe_lowering.quantisation import quantise_experts, require_quantisable
from moe_lowering.report.records import LoweringReport
from moe_lowering.testing.ranks import Ranks

Progress = Callable[[str], None]

COLLECTIVE_TIMEOUT = 300.0  # seconds that a rank waits for one that is still compiling
RANK_TIMEOUT = 1800.0


@dataclasses.dataclass(frozen=True)
class RankResult:
    """What one rank reports. ``refused``: why nothing could be captured, and so nothing was compared."""

    reports: list[LoweringReport]
    errors: compare.Errors | None
    seconds: dict[str, float]
    captured: capture.Captured | None = None
    refused: str = ""


def enable_simulator(soc: str, device: bool = False) -> None:
    """The simulator, and with ``device`` its device, or ``UsageError``: without it nothing can be compiled or run here."""
    try:
        (simulator.enable_device if device else simulator.enable)(soc)
    except simulator.SimulatorError as error:
        raise UsageError(f"the simulator cannot be used: {error}") from error


def deployment_for(request: Request, **place: Any) -> Deployment:
    """The deployment of a command; ``place`` are this rank's index and its groups."""
    return Deployment(
        soc=request.soc,
        ep_size=request.ep,
        tp_size=request.tp,
        fused_mode=request.fused_mode,
        max_tokens=request.max_tokens,
        equal_tokens=True,
        hccl_buffer_mb=HCCL_BUFFER_MB,
        weight_format=WEIGHT_FORMAT,
        providers=request.providers,
        **place,
    )


def assumptions(request: Request) -> str:
    """What ``deployment_for`` takes for granted, for the report."""
    providers = (
        ", ".join(f"{name} {version}" for name, version in request.providers) or "no provider of fused operators"
    )
    return (
        f"at most {request.max_tokens} tokens per rank, equal on all ranks; HCCL_BUFFSIZE {HCCL_BUFFER_MB} MB; expert "
        f"weights in {WEIGHT_FORMAT} format; {providers} installed"
    )


def lower_and_compare(request: Request, progress: Progress) -> Outcome:
    """Carry out a command without ``--fake``."""
    progress(f"enabling the simulator ({request.soc})")
    enable_simulator(request.soc, request.capture)
    register_transformers(request)
    made = models.plan(request)
    skeleton = models.skeleton(made)
    unsupported = unsupported_modules(skeleton)
    if outcome := known_beforehand(request, made, skeleton, unsupported):
        return outcome
    require_memory(made, skeleton, request, models.available_memory())
    if request.ep == 1:
        results = [run_rank(request, made, deployment_for(request), progress)]
    else:
        progress(f"starting {request.ep} ranks")
        setup = functools.partial(enable_simulator, request.soc, request.capture)
        with Ranks(request.ep, setup=setup, collective_timeout=COLLECTIVE_TIMEOUT) as ranks:
            results = ranks.run(_rank_job, request, timeout=RANK_TIMEOUT)
        require_same_choices([result.reports for result in results])
    found = [result.errors for result in results if result.errors is not None]
    errors = functools.reduce(compare.Errors.merge, found) if len(found) == len(results) else None
    captured = [result.captured for result in results if result.captured is not None]
    facts = _facts(request, made, results[0])
    refused = next((result.refused for result in results if result.refused), "")
    return Outcome(request, made.name, results[0].reports, unsupported, errors, facts, captured, refused)


def known_beforehand(
    request: Request, made: models.Plan, skeleton: nn.Module, unsupported: list[tuple[str, str]]
) -> Outcome | None:
    """The outcome of a command that cannot succeed, whatever the graph is; None when the graph has to be seen."""
    facts = [("assumed", assumptions(request))]
    if unsupported:
        stops = request.ep > 1 or request.capture
        return Outcome(request, made.name, [], unsupported, None, facts) if stops else None
    if request.quant != "none":
        try:
            require_quantisable(skeleton, request.quant)
        except (ValueError, TypeError) as error:
            raise UsageError(f"argument --quant: is {request.quant}, and {error}") from error
    # groups by any name: a decision does not depend on it
    names = {"ep_group": "ep", "mc2_group": "mc2"} if request.ep > 1 else {}
    names |= {"tp_group": "tp"} if request.tp > 1 else {}
    report = beforehand.refused(request, made, skeleton, deployment_for(request, **names))
    return None if report is None else Outcome(request, made.name, [report], [], None, facts)


def register_transformers(request: Request) -> None:
    """Make ``moe_lowering`` known to transformers, when the command needs it."""
    if request.model == model_check.OWN:
        return
    from moe_lowering.integrations.transformers import register

    try:
        register()
    except ImportError as error:
        raise UsageError(f"argument MODEL: {request.model} needs transformers: {error}") from error


def unsupported_modules(model: nn.Module) -> list[tuple[str, str]]:
    """MoE modules of the model that never reach the generic operators."""
    from moe_lowering.integrations.transformers import capabilities

    found = capabilities(model)
    if not found:
        raise UsageError(f"argument MODEL: {type(model).__name__} has no MoE layers; accepted: {model_check.ACCEPTED}")
    return [(name, reason) for name, supported, reason in found if not supported]


def require_memory(made: models.Plan, skeleton: nn.Module, request: Request, available: int | None) -> None:
    """Refuse weights that this machine cannot hold: with a config.json they may have any size.

    Raises:
        UsageError: they need more than ``available`` bytes (None when that is not known).
    """
    size = sum(p.numel() for p in skeleton.parameters()) * getattr(torch, request.dtype).itemsize
    # each of several ranks holds the whole model, to compare with, and its share; so does the simulated device
    needed = size if request.ep == 1 and not request.capture else size * (2 * request.ep + 1)
    if available is not None and needed > available:
        raise UsageError(
            f"argument MODEL: the weights of {made.name} with {made.layers} layers on {request.ep} rank(s) need "
            f"{needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free; accepted: --fake, or fewer --layers"
        )


def require_same_choices(by_rank: list[list[LoweringReport]]) -> None:
    """Every rank must have lowered every block to the same implementation: ranks that differ hang on a real machine."""
    choices = [[[block.comm for block in report.blocks] for report in reports] for reports in by_rank]
    for rank, choice in enumerate(choices):
        if choice != choices[0]:
            raise RuntimeError(f"rank {rank} lowered to {choice}, rank 0 to {choices[0]}")


def _rank_job(rank: int, request: Request) -> RankResult:
    """One rank of several, in its own process."""
    import torch.distributed as dist

    register_transformers(request)
    backend = "hccl" if request.capture else None
    ep_group: Any = dist.new_group(range(request.ep), backend=backend) if backend else dist.group.WORLD
    mc2_group: Any = dist.new_group(range(request.ep), backend=backend)
    deployment = deployment_for(
        request, ep_rank=rank, ep_group=ep_group.group_name,
        mc2_group=capture.communicator(mc2_group, rank) if backend else mc2_group.group_name,
        **tensor_parallel_place(request, rank, backend),
    )  # fmt: skip
    progress = _rank_progress if rank == 0 else _silent
    return run_rank(request, models.plan(request), deployment, progress)


def tensor_parallel_place(request: Request, rank: int, backend: str | None = None) -> dict[str, Any]:
    """The TP group of a rank, of neighbours; every rank makes every group, as ``new_group`` wants it."""
    import torch.distributed as dist

    if request.tp == 1:
        return {}
    firsts = range(0, request.ep, request.tp)
    groups = [dist.new_group(range(first, first + request.tp), backend=backend) for first in firsts]
    mine: Any = groups[rank // request.tp]
    return {"tp_rank": rank % request.tp, "tp_group": mine.group_name}


def run_rank(request: Request, made: models.Plan, deployment: Deployment, progress: Progress) -> RankResult:
    """Build, lower, run and compare on one rank."""
    seconds: dict[str, float] = {}
    progress(f"building {made.name} ({made.layers} layers, {request.dtype})")
    model = _timed(seconds, "build", _built, made, request)
    reference = model
    if deployment.ep_size > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch_npu's own deepcopy of a tensor uses a deprecated torch call
            reference = copy.deepcopy(model)
        shard_experts(model, deployment)
    elif request.quant != "none" or request.capture:
        reference = copy.deepcopy(model)
    if request.quant != "none":
        quantise_experts(model, request.quant)
        compare.use_quantised_weights(reference, request.quant)
    lowering = MoeLowering(deployment, request.comm)
    taken = compare.record(model)
    if request.capture:
        return _run_captured(request, made, lowering, model, reference, taken, seconds, progress)
    compiled = compile_model(model, request, lowering)
    inputs = [
        models.input_ids(made, request, length, deployment.own_rank("ep") // request.tp) for length in request.lengths
    ]
    outputs: list[tuple[Tensor, compare.Taken]] = []
    for input_ids in inputs:
        progress(f"compiling and running {input_ids.numel()} tokens")
        taken.clear()
        actual = _timed(seconds, "compile and run", _run, compiled, input_ids)
        outputs.append((actual, list(taken)))
    progress("running the model's own experts, and comparing")
    compare.use_reference(reference)
    errors = compare.Errors()
    with torch.no_grad():
        for input_ids, (actual, recorded) in zip(inputs, outputs, strict=True):
            errors = errors.merge(compare.compare(reference, input_ids, actual, recorded))
    return RankResult(lowering.reports, errors, seconds)


def _run_captured(
    request: Request, made: models.Plan, lowering: MoeLowering, model: nn.Module, reference: nn.Module,
    taken: compare.Taken, seconds: dict[str, float], progress: Progress,
) -> RankResult:  # fmt: skip
    """Compile for the simulated device, capture, replay and compare; ``reference`` shares nothing with ``model``."""
    sources, rank = capture.Sources(), lowering.deployment.own_rank("ep") // request.tp
    compiled = compile_model(model.to(capture.DEVICE), request, lowering, sources)
    compare.use_reference(reference)
    replays = request.replays or REPLAYS
    batches = [
        capture.inputs(made, request, length, rank, step) for step in range(replays) for length in request.lengths
    ]
    progress(f"capturing and replaying {len(request.lengths)} token counts, {replays} times each, and comparing")
    try:
        captured, errors = _timed(
            seconds, "capture, replay and compare", capture.replay, functools.partial(_run, compiled), reference, taken,
            batches, sources,
        )  # fmt: skip
    except simulator.device.CaptureError as error:
        if all(report.fully_lowered for report in lowering.reports):
            raise
        return RankResult(
            lowering.reports, None, seconds, refused=str(error)
        )  # no device has the operators that stayed
    return RankResult(lowering.reports, errors, seconds, captured)


def compile_model(
    model: nn.Module, request: Request, lowering: MoeLowering, before: capture.Sources | None = None
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


def _built(made: models.Plan, request: Request) -> nn.Module:
    model = models.build(made, getattr(torch, request.dtype))
    models.randomise(model)
    return model


@torch.no_grad()
def _run(compiled: nn.Module, input_ids: Tensor) -> Tensor:
    # Float attributes of the model (a scaling factor, an epsilon) are constants, not inputs of the graph.
    # Without duck shapes equal sizes have different symbols, and other sizes no second graph for the same token count.
    shapes: Any = _config  # its functions are added when it is imported
    with torch._dynamo.config.patch(specialize_float=True), shapes.patch(use_duck_shape=False):
        return models.logits(compiled, input_ids)


def _timed(seconds: dict[str, float], what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    result = call(*arguments)
    seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - started
    return result


def _facts(request: Request, made: models.Plan, result: RankResult) -> list[tuple[str, str]]:
    counts = ", ".join(str(request.batch * length) for length in request.lengths)
    graphs = len(result.reports)
    return [
        ("assumed", assumptions(request)),
        ("ran", f"{counts} tokens per rank on {request.ep} rank{'s' if request.ep > 1 else ''}; {made.layers} layers"),
        ("graphs", f"{graphs} ({'dynamic' if request.dynamic else 'static'} shapes)"),
        ("took", ", ".join(f"{what} {value:.1f} s" for what, value in result.seconds.items())),
    ]


_rank_started = time.perf_counter()


def _rank_progress(message: str) -> None:
    import sys

    print(f"[rank 0 {time.perf_counter() - _rank_started:6.1f} s] {message}", file=sys.stderr, flush=True)


def _silent(message: str) -> None:
    pass
