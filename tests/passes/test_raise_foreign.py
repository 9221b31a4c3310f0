"""Layers that others wrote are raised and lowered, and compute what they did; what differs in one thing is left alone."""

from __future__ import annotations

import re

import pytest
import torch
from foreign_forms import EXPERTS, FLOAT, FORMS, NK, Foreign, nk
from foreign_twins import TWINS, batched, grouped, scores
from raise_graphs import graph_of, lines, lower, run
from reference import assert_near

from moe_lowering import Deployment, MoeLowering
from moe_lowering.passes.pipeline import LoweringError
from moe_lowering.report.text import render


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


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_left_alone(name):
    """With the reason; node for node as it was."""
    layer, codes = TWINS[name]
    gm, _ = graph_of(layer)
    before = lines(gm)
    report = lower(gm)
    assert not report.blocks and not report.fully_lowered and lines(gm) == before
    (found,) = report.foreign
    assert found.not_raised is not None and found.not_raised.code in codes.split(), str(found.not_raised)
    assert found.not_raised.node in {node.name for node in gm.graph.nodes}
    assert found.not_raised.seen and found.not_raised.expected
    with pytest.raises(LoweringError, match=re.escape(found.not_raised.code)):
        lower(gm, strict=True)


@pytest.mark.parametrize(
    ("twin", "seen"),
    [
        ("grouped, relu between", r"split cuts relu \(relu\), which is no product of the experts"),
        ("batched, relu between", r"split cuts relu \(relu\), which is no product of the experts"),
        ("grouped, weights twice", r"weighted twice, by arg1_1 and by arg1_1"),
        ("batched, weights twice", r"weighted twice, by arg1_1 and by arg1_1"),
    ],
)
def test_the_reason_names_what_is_to_be_changed(twin, seen):
    (found,) = lower(graph_of(TWINS[twin][0])[0]).foreign
    assert re.search(seen, found.not_raised.seen), found.not_raised


def test_the_twins_are_forms_but_for_the_change():
    for layer in (Foreign("grouped_mm", grouped(), NK, nk()), Foreign("gathered_weights", batched(), NK, nk())):
        gm, made = graph_of(layer)
        (block,) = lower(gm, strict=True).blocks
        assert block.raised_from == layer.form
        assert_near(run(gm, made), layer.reference(made), layer.dtype)


def more_experts(forward, weighs_them=False):
    """Ids are chosen among twice as many experts as there are weights; the others give nothing, as zero experts do."""

    def chosen(x, weights, ids, **t):
        weights, ids = torch.cat([scores(ids), 0.5 + scores(ids).flip(-1)], -1).topk(ids.shape[1])
        return forward(x, weights if weighs_them else torch.where(ids < EXPERTS, weights, 0.0), ids, **t)

    return chosen


@pytest.mark.parametrize("weighs_them", [False, True])
@pytest.mark.parametrize("way", ["grouped", "gathered"])
def test_rows_that_are_not_counted_are_not_those_of_other_ranks(way, weighs_them):
    """The twin, matrices gathered by such ids, is what experts that were cut apart trace to: alone it does not run."""
    layer = Foreign("", more_experts({"grouped": grouped(), "gathered": batched()}[way], weighs_them), NK, nk(), FLOAT)
    gm, made = graph_of(layer)
    report = lower(gm, deployment=Deployment(ep_size=2, ep_rank=0, ep_group="0"))
    if way == "gathered":
        assert [block.comm for block in report.blocks] == ["allgather"]
        return
    (found,) = report.foreign
    assert not report.blocks and found.not_raised.code == "raise.ids_range", found
    assert torch.equal(run(gm, made), layer.function(**made))


def test_two_gathers_by_other_ids_are_no_layer():
    gm, _ = graph_of(Foreign("", batched("other ids"), NK, nk()))
    before = lines(gm)
    assert lower(gm).blocks == () and lines(gm) == before


def test_report_names_a_layer_and_leaves_it():
    gm, _ = graph_of(FORMS["grouped_mm"])
    before = lines(gm)
    report = lower(gm, raise_foreign="report")
    (block,) = report.blocks
    assert block.comm is None and block.raised_from == "grouped_mm" and "[raise.report]" in block.reason
    assert block.ops_before.count("aten._grouped_mm") == 2 and report.foreign == () and lines(gm) == before
    assert report.to_json()["blocks"][0]["raised_from"] == "grouped_mm" and "raised from" in render(report)
    with pytest.raises(LoweringError, match=r"\[raise.report\]"):
        lower(gm, raise_foreign="report", strict=True)


def test_off_does_not_look():
    gm, _ = graph_of(FORMS["grouped_mm"])
    report = lower(gm, raise_foreign="off")
    assert report.blocks == () and report.foreign[0].not_raised is None


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="raise_foreign is 'on'; accepted: auto, report, off"):
        MoeLowering(Deployment(), raise_foreign="on")


@pytest.mark.parametrize("name", FORMS)
def test_what_is_not_lowered_stays_node_for_node(name):
    """No implementation is legal: the generic operators that were put in are taken out again."""
    gm, _ = graph_of(FORMS[name])
    before = lines(gm)
    report = lower(gm, comm="mc2")
    (block,) = report.blocks
    assert block.comm is None and block.raised_from == FORMS[name].form and "mc2.ep_size" in str(block.verdicts)
    assert block.ops_after == block.ops_before and report.foreign == () and lines(gm) == before


def test_two_projections_are_put_together_with_a_note():
    gm, _ = graph_of(FORMS["titan, scatter"])
    (block,) = lower(gm).blocks
    assert any("in every forward" in note and "join_projections" in note for note in block.notes)


def test_the_pass_twice_changes_nothing():
    gm, _ = graph_of(FORMS["grouped_mm"])
    lower(gm)
    before = lines(gm)
    report = lower(gm, strict=True)
    assert report.blocks == () and report.foreign == () and lines(gm) == before
