"""A small model of one family, lowered in each way, with each dtype and kind of shapes, run on the CPU and compared.

Compared are the MoE layers, each with the same module of the untouched model for the very inputs that it had, so that no
other layer hides an error or causes one; in float32 the model's result too. The untouched model computes its experts as
transformers' own loops do (eager) in float32, and in 16 bits with ``grouped_mm``, which rounds as often as we do.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_lowering.backends.aot import lowering_backend
from moe_lowering.backends.npugraph_ex import npugraph_ex_options
from moe_lowering.deployment import Deployment
from moe_lowering.families.listing import model_type
from moe_lowering.families.records import FAILED, LEFT, RIGHT, WRONG, Attempt, Kind, Row
from moe_lowering.families.small_models import TINY, build, randomise, result
from moe_lowering.integrations.replaced_experts import replace_experts
from moe_lowering.integrations.transformers import capabilities
from moe_lowering.layers.expert_modules import EXPERTS_IMPLEMENTATION, is_experts_module
from moe_lowering.model_configs.read import read_text_config
from moe_lowering.model_configs.small import shrink
from moe_lowering.passes.pipeline import MoeLowering
from moe_lowering.report.records import LoweringReport

LAYERS = 1
BATCH, LENGTHS = 2, (8, 12)  # of tokens; static shapes have the first only
# Largest accepted error of an MoE layer. Measured: at most 1e-6 and 2e-2.
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2}
MODEL_TOLERANCE = 1e-3  # of the model's result in float32, where attention and norms spread what layers differ by
_REASON = 300  # characters


def attempt_family(family: str, kinds: Sequence[Kind]) -> Row:
    """Attempts of a family, in this process. An error of the model's own code is a state, not an exception."""
    started = time.perf_counter()
    attempts = []
    for way, dtype, shapes in kinds:
        with _quiet():
            try:
                attempts.append(_attempt(family, way, dtype, shapes))
            except Exception as error:  # whatever a model's code, dynamo or a kernel raises
                attempts.append(Attempt(way, dtype, shapes, FAILED, reason=_first_line(error)))
    return Row(family, tuple(attempts), round(time.perf_counter() - started, 1))


def _attempt(family: str, way: str, dtype: str, shapes: str) -> Attempt:
    torch._dynamo.reset()
    config = shrink(read_text_config(model_type(family)), TINY, LAYERS)
    # eager loops compute in float32 what is to be compared; grouped_mm rounds 16 bits as rarely as the lowered experts
    own = build(config, getattr(torch, dtype), None)
    randomise(own)
    model = copy.deepcopy(own)
    _use(own, "eager" if dtype == "float32" else "grouped_mm")
    names = [name for name, _ in _routed(own)]
    unsupported = ""
    if way == "hook":
        replaced = replace_experts(model)
        _use(model, EXPERTS_IMPLEMENTATION)
        names = replaced or names
        unsupported = next((reason for _, supported, reason in capabilities(model) if not supported), "")
    overlapped = None
    if (way, dtype, shapes) == ("hook", "bfloat16", "static") and not unsupported:
        overlapped = _overlapped(model, config)
    ran = _Calls(model, names)
    no_graph = ""
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        try:
            reports, outputs = _run(model, config.vocab_size, ran, shapes == "dynamic", whole=True)
        except Exception as raised:
            if unsupported:  # what is not lowered cannot be compiled whole
                return Attempt(way, dtype, shapes, LEFT, layers=len(names), reason=_cut(unsupported))
            if not isinstance(raised, torch._dynamo.exc.TorchDynamoException):
                raise
            no_graph = _no_graph(raised)
            reports, outputs = _run(model, config.vocab_size, ran, shapes == "dynamic", whole=False)
        error, off = _errors(own, ran.taken, outputs if dtype == "float32" else [])
    layers = sum(bool(calls) for calls in ran.taken.values())  # a model for images has experts that no text comes to
    why = f"{no_graph}, and of its parts: {_why(reports) or 'nothing'}" if no_graph else unsupported
    attempt = _judged((way, dtype, shapes), reports, layers, error, off, why)
    return dataclasses.replace(attempt, overlapped=overlapped)


def _run(
    model: nn.Module, vocabulary: int, calls: _Calls, dynamic: bool, whole: bool
) -> tuple[list[LoweringReport], list[tuple[Tensor, Tensor]]]:
    """The reports of the graphs of a model, or of its parts where it need not be one, and (ids, result) of each length."""
    torch._dynamo.reset()
    calls.forget()
    lowering = MoeLowering(Deployment())
    compiled: Any = torch.compile(model, backend=lowering_backend(lowering), fullgraph=whole, dynamic=dynamic)
    outputs = []
    for length in LENGTHS if dynamic else LENGTHS[:1]:
        ids = torch.randint(3, vocabulary, (BATCH, length), generator=torch.Generator().manual_seed(length))
        outputs.append((ids, result(compiled, ids)))
        calls.take()
    return lowering.reports, outputs


def _overlapped(model: nn.Module, config: Any) -> int | None:
    """Shared experts that run beside a layer under npugraph_ex, whose graphs have streams; None where it cannot compile.

    A graph of its own: what is compared afterwards reads the results of layers, and nothing can overlap what is read.
    """
    lowering = MoeLowering(Deployment(), overlap=True)
    options = npugraph_ex_options(lowering.deployment, lowering=lowering, force_eager=True)
    compiled: Any = torch.compile(model, backend="npugraph_ex", fullgraph=True, options=options)
    try:
        with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
            result(compiled, torch.randint(3, config.vocab_size, (BATCH, LENGTHS[0])))
    except Exception:  # what the model's own code, dynamo or npugraph_ex raises; the attempt itself says it
        return None
    finally:
        torch._dynamo.reset()
    notes = [note for report in lowering.reports for block in report.blocks for note in block.notes]
    return sum("overlaps dispatch" in note for note in notes)


def _routed(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if is_experts_module(module)]


def _use(model: nn.Module, implementation: str) -> None:
    for _, module in _routed(model):
        known: Any = module
        if hasattr(known, "config"):
            known.config._experts_implementation = implementation


Taken = dict[str, list[tuple[Any, ...]]]


class _Calls:
    """Each call of some modules, by name: (inputs..., output).

    What a hook writes into is emptied by ``take`` after each run: dynamo guards how long it is, and would compile a graph
    for every run, so that none with dynamic shapes ever ran with another length.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.taken: Taken = {name: [] for name in names}
        self._fresh: Taken = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(self._keep(name), with_kwargs=True)

    def _keep(self, name: str) -> Any:
        fresh = self._fresh[name]

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            fresh.append((*args, *kwargs.values(), _tensor(output)))

        return hook

    def take(self) -> None:
        for name, calls in self._fresh.items():
            self.taken[name] += calls
            calls.clear()

    def forget(self) -> None:
        for calls in (*self._fresh.values(), *self.taken.values()):
            calls.clear()


def _tensor(output: Any) -> Tensor:
    """The hidden states that a module returns, alone or before router logits."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _errors(own: nn.Module, taken: Taken, outputs: list[tuple[Tensor, Tensor]]) -> tuple[float | None, float]:
    """The largest error of a module, None where none ran; and of the model's results."""
    largest = None
    for name, calls in taken.items():
        module = own.get_submodule(name)
        for *inputs, output in calls:
            error = difference(output, _tensor(module(*inputs)))
            largest = error if largest is None else max(largest, error)
    return largest, max((difference(actual, result(own, ids)) for ids, actual in outputs), default=0.0)


def difference(actual: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b| in float64; infinity for another shape or what is not finite."""
    if actual.shape != expected.shape:
        return float("inf")
    a, b = actual.double(), expected.double()
    error, largest = float((a - b).abs().max()), float(b.abs().max())
    if not (error < float("inf") and largest > 0):
        return float("inf")
    return error / largest


def _judged(
    kind: Kind, reports: list[LoweringReport], layers: int, error: float | None, whole: float, unsupported: str
) -> Attempt:
    """``unsupported``: why it cannot be lowered in whole, known beforehand; "" where nothing is known against it."""
    blocks = [block for report in reports for block in report.blocks]
    comms = [block.comm for block in blocks if block.comm is not None]
    lowered = len(comms) // max(1, len(reports))
    facts: dict[str, Any] = {
        "layers": layers,
        "lowered": lowered,
        "comms": tuple(dict.fromkeys(comms)),
        "error": error,
        "routers": _routers(reports),
    }
    dtype = kind[1]
    is_left = not layers or lowered < layers or len(comms) < len(blocks) or bool(unsupported)
    if (error is None and not is_left) or (error or 0.0) > TOLERANCE[dtype] or whole > MODEL_TOLERANCE:
        why = f"[models.wrong] error {error or 0:.1e} of a layer, {whole:.1e} of the model; accepted: {TOLERANCE[dtype]:.0e}"
        return Attempt(*kind, WRONG, **facts, reason=f"{why}, {MODEL_TOLERANCE:.0e}")
    if is_left:
        reason = unsupported or _why(reports) or "[models.nothing_found] no MoE layer was found in the graph"
        return Attempt(*kind, LEFT, **facts, reason=_cut(reason))
    return Attempt(*kind, RIGHT, **facts)


def _routers(reports: list[LoweringReport]) -> int | None:
    """Routers of a graph that became one operator of the device, where reports have them."""
    per_graph = [getattr(report, "routers", None) for report in reports]
    if not per_graph or any(routers is None for routers in per_graph):
        return None
    became = [router for routers in per_graph for router in routers or () if router.became not in (None, "aten")]
    return len(became) // len(per_graph)


def _why(reports: list[LoweringReport]) -> str:
    """The first reason that a report gives for what was not lowered."""
    for report in reports:
        for block in report.blocks:
            if block.comm is None:
                return block.reason
        for where, reason in report.unrecognised:
            return f"{where}: {reason}"
        for layer in report.foreign:
            why = getattr(layer, "not_raised", None)
            return str(why) if why is not None else f"[{layer.code}] {layer.reason}"
    return ""


def _no_graph(error: Exception) -> str:
    """Why dynamo makes no whole graph of a model: the line of the model that it cannot trace."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)\n\s*(.*)', str(error))
    of_model = [frame for frame in frames if "/transformers/models/" in frame[0]] or frames
    where = "at {}:{} in {}: {}".format(*of_model[-1]) if of_model else f"as {_first_line(error)}"
    return f"[models.no_graph] torch.compile makes no whole graph of the model, {where}"


def _cut(text: str) -> str:
    """In one line, of a bounded length, and with files of packages as every machine has them: a page is made of it."""
    text = re.sub(r"\S*/site-packages/", "", " ".join(text.split()))
    return text if len(text) <= _REASON else text[: _REASON - 3] + "..."


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    telling = [line for line in lines if re.search(r"Error\b|raised exception", line)] or lines
    return _cut(f"[models.failed] {type(error).__name__}: {telling[0]}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of models' own code, of which there are many in each."""
    kept = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(kept)
