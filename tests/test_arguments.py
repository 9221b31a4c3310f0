"""Public functions refuse what they do not accept: one ValueError that names the argument, the value, what is accepted."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import moe_lowering
from moe_lowering import Deployment, MoeLowering, serving, testing
from moe_lowering.backends.aot import lowering_backend
from moe_lowering.simulator import SimulatorError, enable
from moe_lowering.vocabulary import COMMS, POLICIES, SOCS

HERE = Deployment()


def options(**given):
    return moe_lowering.npugraph_ex_options(HERE, **given)


def config(**given):
    return moe_lowering.torchair_config(HERE, **given)


def lowered():
    return testing.lower_graph(lambda x: x, torch.ones(2, 2), deployment=HERE)


REFUSED = {
    "MoeLowering, no deployment": (lambda: MoeLowering(None), "MoeLowering: deployment is None"),
    "MoeLowering, deployment as text": (lambda: MoeLowering("A3"), "MoeLowering: deployment is 'A3'"),
    "MoeLowering, strict": (lambda: MoeLowering(HERE, strict="no"), "strict is 'no'; accepted: True or False"),
    "MoeLowering, overlap": (lambda: MoeLowering(HERE, overlap=1), "overlap is 1; accepted: True or False"),
    "MoeLowering, cost": (lambda: MoeLowering(HERE, cost=5), "cost is 5; accepted: a function"),
    "MoeLowering, no cost": (lambda: MoeLowering(HERE, cost=None), "cost is None; accepted: a function"),
    "MoeLowering, comm": (lambda: MoeLowering(HERE, comm=None), f"comm is None; accepted: {', '.join(COMMS)}"),
    "MoeLowering, comms": (lambda: MoeLowering(HERE, comm=["mc2"]), r"comm is \['mc2'\]; accepted: "),
    "MoeLowering, policy": (lambda: MoeLowering(HERE, policy=0), f"policy is 0; accepted: {', '.join(POLICIES)}"),
    "options, deployment": (lambda: moe_lowering.npugraph_ex_options(None), "npugraph_ex_options: deployment is None"),
    "options, lowering": (lambda: options(lowering=3), "npugraph_ex_options: lowering is 3; accepted: a moe"),
    "options, strict": (lambda: options(strict="yes"), "strict is 'yes'"),
    "options, NaN": (lambda: options(agreement_timeout=float("nan")), "agreement_timeout is nan; accepted: seconds"),
    "options, infinite": (lambda: options(agreement_timeout=float("inf")), "agreement_timeout is inf"),
    "options, no time": (lambda: options(agreement_timeout=0), "agreement_timeout is 0; accepted: seconds"),
    "options, time in the past": (lambda: options(agreement_timeout=-1.0), "agreement_timeout is -1.0"),
    "options, a flag": (lambda: options(agreement_timeout=True), "agreement_timeout is True"),
    "options, a word": (lambda: options(agreement_timeout="never"), "'never'; accepted: .*, or 'auto', or None"),
    "options, unknown": (lambda: options(force_eagre=True), "unknown option 'force_eagre'; accepted: .*force_eager"),
    "options, value": (lambda: options(force_eager="x"), "npugraph_ex_options: option force_eager is 'x'"),
    "config, deployment": (lambda: moe_lowering.torchair_config(None), "torchair_config: deployment is None"),
    "config, config": (lambda: config(config={}), "torchair_config: config is {}; accepted: a torchair.CompilerConfig"),
    "config, NaN": (lambda: config(agreement_timeout=float("nan")), "torchair_config: agreement_timeout is nan"),
    "config, lowering": (lambda: config(lowering="x"), "torchair_config: lowering is 'x'"),
    "backend": (lambda: lowering_backend(None), r"lowering_backend: passes\[0\] is None; accepted: a callable"),
    "lower_graph, function": (lambda: testing.lower_graph(None, deployment=HERE), "lower_graph: function is None"),
    "lower_graph, deployment": (lambda: testing.lower_graph(len, deployment=None), "lower_graph: deployment is None"),
    "lower_graph, lowering": (
        lambda: testing.lower_graph(len, deployment=HERE, lowering=1),
        "lower_graph: lowering is 1",
    ),
    "lower_graph, dynamic": (
        lambda: testing.lower_graph(len, deployment=HERE, dynamic=None),
        "lower_graph: dynamic is None",
    ),
    "assert_lowered": (lambda: testing.assert_lowered(None), "assert_lowered: lowered is None"),
    "assert_lowered, comm": (
        lambda: testing.assert_lowered(lowered(), comm="mc3"),
        "comm is 'mc3'; accepted: allgather",
    ),
    "assert_refused": (lambda: testing.assert_refused(None, code="x"), "assert_refused: lowered is None"),
    "assert_refused, code": (lambda: testing.assert_refused(lowered(), code=None), "assert_refused: code is None"),
    "assert_refused, comm": (lambda: testing.assert_refused(lowered(), code="x", comm="mc3"), "comm is 'mc3'"),
    "Server, model": (lambda: serving.Server(None), "Server: model is None; accepted: a causal language model"),
    "Server, plain module": (lambda: serving.Server(torch.nn.Linear(1, 1)), "Server: model is Linear"),
    "Ranks, size": (lambda: testing.Ranks(0), "Ranks: size is 0; accepted: an int, 1 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_twins_are_accepted():
    lowering = MoeLowering(HERE, strict=False, overlap=True, cost=lambda implementation, load: 1.0)
    assert options(agreement_timeout=0.5, force_eager=True)["force_eager"] is True
    assert options(lowering=lowering, agreement_timeout=None)["inplace_pass"] is False
    assert lowering_backend(lowering)
    assert lowered().report.fully_lowered


def test_an_unknown_soc_is_not_simulated():
    for wrong in (None, "X", 3):
        with pytest.raises(SimulatorError, match=re.escape(f"unknown SoC {wrong!r}; accepted: {', '.join(SOCS)}")):
            enable(wrong)


# --- every public callable, None for each argument that has no default ----------------------------------------------


def public() -> dict[str, object]:
    """By name: what the package, its serving and its testing give to users."""
    homes = (moe_lowering, serving, testing)
    found = {f"{home.__name__}.{name}": getattr(home, name) for home in homes for name in home.__all__}
    return {name: call for name, call in found.items() if callable(call) and not _is_result(call)}


def _is_result(call: object) -> bool:
    """Exceptions, and records that users read and do not make."""
    made_here = (serving.Result, serving.Statistics, testing.Lowered)
    return isinstance(call, type) and (issubclass(call, BaseException) or call in made_here)


def required(call) -> list[inspect.Parameter]:
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(call).parameters.values()
    return [p for p in parameters if p.default is p.empty and p.kind in plain]


@pytest.mark.parametrize("name", [name for name, call in public().items() if required(call)])
def test_none_is_an_error_of_ours(name):
    """With None everywhere: an error that begins with who refuses it, not one from inside."""
    call = public()[name]
    nothing = {p.name: None for p in required(call) if p.kind is p.KEYWORD_ONLY}
    positional = [None for p in required(call) if p.kind is not p.KEYWORD_ONLY]
    with pytest.raises((ValueError, TypeError)) as caught:
        call(*positional, **nothing)
    message = str(caught.value)
    assert "None" in message and "accepted: " in message, message
    assert any(f" {p.name} is None" in message or f" {p.name}" in message for p in required(call)), message
