"""Activations that are written with torch's own operators: those of the vocabulary are raised, what is like them is left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foreign_forms import FLOAT, FORMS, NK, UNGATED, Foreign, grouped, nk
from raise_graphs import lower, run, trace

from moe_lowering.vocabulary import ACTIVATIONS


def gated(function):
    return lambda h: function(*h.chunk(2, dim=-1))


def capped(x, cap, times=None):
    return torch.tanh(x / cap) * (times or cap)


OTHER_ACTIVATIONS = {  # and whether the first product has a gate
    "the third power": (lambda h: F.relu(h) ** 3, False),
    "negative ones, too": (torch.square, False),
    "squared before": (lambda h: F.relu(torch.square(h)), False),
    "relu of a half": (gated(lambda gate, up: F.relu(gate)), True),
    "relu of both": (gated(lambda gate, up: F.relu(gate) * F.relu(up)), True),
    "another number behind": (gated(lambda gate, up: capped(gate, 2.5, 2.0) * gate.sigmoid() * capped(up, 0.7)), True),
    "the sigmoid capped": (
        gated(lambda gate, up: capped(gate, 2.5) * capped(gate, 2.5).sigmoid() * capped(up, 0.7)),
        True,
    ),
    "rounded down inside": (
        gated(lambda gate, up: torch.tanh(gate // 2.5) * 2.5 * gate.sigmoid() * capped(up, 0.7)),
        True,
    ),
    "rounded inside": (
        gated(
            lambda gate, up: (
                torch.tanh(torch.div(gate, 2.5, rounding_mode="trunc")) * 2.5 * gate.sigmoid() * capped(up, 0.7)
            )
        ),
        True,
    ),
    "only gate capped": (gated(lambda gate, up: capped(gate, 2.5) * gate.sigmoid() * up), True),
    "the sigmoid of up": (gated(lambda gate, up: capped(gate, 2.5) * up.sigmoid() * capped(up, 0.7)), True),
    "other bounds behind": (gated(lambda gate, up: F.silu(gate).clamp(max=0.5) * up.clamp(-0.4, 0.5)), True),
    "from below as well": (gated(lambda gate, up: F.silu(gate).clamp(-0.5, 0.5) * up.clamp(-0.5, 0.5)), True),
}


@pytest.mark.parametrize("name", OTHER_ACTIVATIONS)
def test_other_activations_are_left(name):
    function, has_gate = OTHER_ACTIVATIONS[name]
    tensors = NK if has_gate else UNGATED
    layer = Foreign("grouped_mm", grouped(function), tensors, nk(), FLOAT)
    made = layer.make()
    gm = trace(layer.function, made)
    expected = run(gm, made)
    report = lower(gm)
    assert not report.blocks
    assert {found.not_raised.code for found in report.foreign} <= {"raise.activation", "raise.gate", "raise.operation"}
    torch.testing.assert_close(run(gm, made), expected, rtol=0, atol=0)


def test_each_activation_is_raised():
    raised = {layer.expected(layer.make()).get("activation", "swiglu") for layer in FORMS.values()}
    assert raised == ACTIVATIONS.keys()
