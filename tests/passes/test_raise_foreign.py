"""Layers that others wrote are raised and lowered, and compute what they did."""

from __future__ import annotations

import pytest
from foreign_forms import FORMS
from raise_graphs import graph_of, lower, run
from reference import assert_near


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_raised_and_right(name, dynamic):
    layer = FORMS[name]
    gm, made = graph_of(layer, dynamic)
    before = run(gm, made)
    report = lower(gm, strict=True)
    (block,) = report.blocks
    assert block.comm == "allgather" and block.raised_from == layer.form and report.foreign == ()
    assert not any("grouped_mm" in str(node.target) or "bmm" in str(node.target) for node in gm.graph.nodes)
    after = run(gm, made)
    assert_near(after, layer.reference(made), layer.dtype)
    assert_near(after, before.double(), layer.dtype)
