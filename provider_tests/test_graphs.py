"""Graphs through npugraph_ex in which the real operator is called: by our wrapper in a lowered MoE layer, and directly.

The recorder says that the call was reached: with ``force_eager`` at every run, in a captured graph at its capture, as what is
replayed on this machine is a tape of the operators that the simulator computes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import recorder
import torch
from entries import documented, is_there
from forms import DECODE, FFN, Form, call_of

from moe_lowering import MoE, MoeLowering, npugraph_ex_options, quantise_experts, shard_experts, simulator
from moe_lowering.testing.graphs import fake_deployment

HIDDEN, INNER, EXPERTS, TOP_K, RANKS = 1024, 512, 8, 2, 2
FORMS = [
    Form(operator, quantisation)
    for operator, quantisations in ((FFN, ("none", "w8a8", "w4a8")), (DECODE, ("none", "w8a8")))
    for quantisation in quantisations
    if is_there(operator)
]
CASES = [
    pytest.param(
        form, dynamic, eager, id=f"{form}-{'dynamic' if dynamic else 'static'}-{'eager' if eager else 'captured'}"
    )
    for form, dynamic, eager in itertools.product(FORMS, (False, True), (True, False))
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def expect_reached(form: Form, eager: bool, runs: int, shapes: int) -> None:
    calls = recorder.taken()
    assert [call.entry for call in calls] == [documented(form.operator, form.quantisation)["entry"]] * len(calls)
    assert all(call.launched for call in calls)
    assert len(calls) == (runs if eager else shapes)


@pytest.mark.parametrize(("form", "dynamic", "eager"), CASES)
def test_lowered_layer(form: Form, dynamic: bool, eager: bool) -> None:
    """Two token counts, each run twice; one graph for both when sizes are symbolic."""
    counts = (8, 12) if dynamic else (8,)
    mode = 1 if form.operator == FFN else 2
    with fake_deployment(ep_size=RANKS, max_tokens=64, fused_mode=mode) as where:
        model = MoE(HIDDEN, INNER, EXPERTS, TOP_K, dtype=torch.bfloat16).eval().requires_grad_(False)
        shard_experts(model, where)
        if form.quantisation != "none":
            quantise_experts(model, form.quantisation)
        lowering = MoeLowering(where, "fused_mc2", strict=True)
        options = npugraph_ex_options(where, lowering=lowering, agreement_timeout=None, force_eager=eager)
        fast = torch.compile(model.npu(), backend="npugraph_ex", fullgraph=True, dynamic=dynamic, options=options)
        captured = simulator.device.counts()
        for tokens in (*counts, *counts):
            y = fast(torch.randn(tokens, HIDDEN, dtype=torch.bfloat16).npu())
            assert (y.shape, y.dtype, y.device.type) == ((tokens, HIDDEN), torch.bfloat16, "npu")
        made = (simulator.device.counts() - captured).captured
    assert len(lowering.reports) == 1
    assert [block.comm for block in lowering.reports[0].blocks] == ["fused_mc2"]
    assert made == (0 if eager else len(counts))
    expect_reached(form, eager, 2 * len(counts), len(counts))


@pytest.mark.parametrize(("form", "dynamic", "eager"), CASES)
def test_operator_itself(form: Form, dynamic: bool, eager: bool) -> None:
    """A function that calls ``torch.ops._C_ascend`` and gives ``out`` back."""
    counts = (7, 13) if dynamic else (7,)  # no size of the weights: dynamo takes equal sizes for one symbol
    arguments = [call_of(dataclasses.replace(form, tokens=tokens)) for tokens in counts]
    fast = torch.compile(
        {FFN: call_ffn, DECODE: call_decode}[form.operator], backend="npugraph_ex", fullgraph=True, dynamic=dynamic,
        options={"force_eager": eager, "inplace_pass": False},
    )  # fmt: skip
    for given in (*arguments, *arguments):
        y = fast(
            *([given[name] for name in ("x", "ids", "weights", "w13", "w2")]),
            given.get("w13_scale"),
            given.get("w2_scale"),
        )
        assert (y.shape, y.dtype) == (given["x"].shape, given["x"].dtype)
    expect_reached(form, eager, 2 * len(counts), len(counts))


def call_ffn(x: Any, ids: Any, weights: Any, w13: Any, w2: Any, scale1: Any, scale2: Any) -> Any:
    out, counts = torch.empty_like(x), torch.empty(3, dtype=torch.int32, device=x.device)
    none = [x.new_empty((0,))]
    torch.ops._C_ascend.dispatch_ffn_combine(
        x, w13, w2, ids, scale1 or none, scale2 or none, none, none, weights, "mc2", 77, out, counts
    )
    return out


def call_decode(x: Any, ids: Any, weights: Any, w13: Any, w2: Any, scale1: Any, scale2: Any) -> Any:
    none = [x.new_ones((1,))]
    y, _ = torch.ops._C_ascend.dispatch_gmm_combine_decode(
        x, ids, w13, scale1 or none, w2, scale2 or none, weights, group_ep="mc2", ep_rank_size=2, moe_expert_num=6
    )
    return y
