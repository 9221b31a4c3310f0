"""Layers in the style of other code bases: a block that is right, or left with the reason and as they were."""

from __future__ import annotations

import pytest
import torch
from foreign_other_styles import OTHER_STYLES, Counted, Gathered, by_map
from foreign_styles import STYLES
from raise_graphs import lower, run
from reference import relative_error
from trace_ways import trace_by

from moe_lowering import Deployment, MoeLowering, testing
from moe_lowering.backends.aot import lowering_backend

ALL = STYLES | OTHER_STYLES


@pytest.mark.parametrize("style", ALL)
def test_a_style_is_right_or_left(style):
    make, reason = ALL[style]
    layer, x = make(), torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    lowering = MoeLowering(Deployment(soc="A3", installed=()))
    torch._dynamo.reset()
    if style == "npu, sums as counts":  # which no kernel computes
        report = testing.lower_graph(layer, x, deployment=lowering.deployment).report
        assert report.blocks == () and reason in str(report.foreign[0].not_raised)
        return
    with torch.no_grad():
        lowered = torch.compile(layer, backend=lowering_backend(lowering), fullgraph=True)(x)
        report = lowering.reports[0]
        if reason:
            assert report.blocks == () and any(reason in f"{each.code} {each.not_raised}" for each in report.foreign), (
                report
            )
            assert torch.equal(lowered[layer.defined], layer(x)[layer.defined])
            return
        blocks = [block.comm for block in report.blocks]
        assert blocks == ["allgather"] * (2 if style == "two layers" else 1) and report.foreign == ()
        expected, written = layer.expected(x), layer(x)
    assert relative_error(lowered, expected) < 2e-2 and relative_error(written, expected) < 2e-2


def test_what_is_counted_of_ids_beside_a_layer_keeps_it_from_nothing():
    """Its twins are the padded ids among the styles: there the layer reads what is tested."""
    layer, x = Counted(), torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    lowering = MoeLowering(Deployment(soc="A3", installed=()))
    torch._dynamo.reset()
    with torch.no_grad():
        lowered, counted = torch.compile(layer, backend=lowering_backend(lowering), fullgraph=True)(x)
        assert [block.comm for block in lowering.reports[0].blocks] == ["allgather"] and counted == 12
        assert relative_error(lowered, layer(x)[0]) < 2e-2


@pytest.mark.parametrize(("numbers", "code"), [((2, 0, 3, 1), ""), ((2, -1, 0, 1), "raise.expert_map")])
def test_a_table_that_is_no_input_of_the_graph_is_read(numbers, code):
    """As make_fx has buffers; AOTAutograd makes inputs of them, of which it is taken for granted that they place experts."""
    layer = Gathered(by_map, experts=4)
    layer.own, table = (lambda _, weights, ids: (weights, table[ids])), torch.tensor(numbers)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    gm = trace_by("make_fx", layer, {"x": x})
    report = lower(gm, deployment=Deployment(soc="A3", installed=()))
    assert [block.comm for block in report.blocks] == ([] if code else ["allgather"])
    assert [each.not_raised.code for each in report.foreign] == ([code] if code else [])
    assert relative_error(run(gm, {"x": x}), layer(x)) < 2e-2
