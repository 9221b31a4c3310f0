"""What lowered graphs give to who reads them: outputs under any index, and programs that can be saved."""

from __future__ import annotations

import dataclasses
import io
import operator
from typing import Any

import edit_faults
import pytest
import torch
from edit_faults import (
    CASES,
    ONE,
    ROUTED,
    M,
    check_numbers,
    lowering,
    quiet,
)
from graph_build import build
from graph_snapshot import differences, snapshot
from torch.fx import Graph

from moe_lowering import MoE, MoeLowering
from moe_lowering.passes import verifier
from moe_lowering.passes.run import block_reports

# Which output a getitem takes


def negative(graph: Graph, target: Any, index: Any, again: bool) -> None:
    """Rewrite or repeat one getitem of an operator."""
    item = next(n for n in graph.nodes if n.target is operator.getitem and n.args[0].target is target)
    if not again:
        item.args = (item.args[0], index)
        return
    with graph.inserting_after(item):
        twin = graph.call_function(operator.getitem, (item.args[0], index))
    twin.meta = {**item.meta}
    (output,) = graph.find_nodes(op="output")
    output.args = ((*output.args[0], twin),)


@pytest.mark.parametrize(("target", "index", "again", "lowered"), [
    (M.route.default, -2, False, True), (M.dispatch.default, -4, False, True), (M.route.default, True, False, False),
    (M.dispatch.default, -4, True, False), (M.dispatch.default, 4, False, False), (M.dispatch.default, -5, True, False),
    (M.dispatch.default, slice(0, 1), True, False), (M.route.default, -2, True, False), (M.route.default, 2, True, False),
    (M.route.default, slice(None), True, False),
])  # fmt: skip
def test_getitems_by_any_index(target, index, again, lowered):
    """The same output under two indices, one that there is none for, a slice: left as it was, with the reason."""
    case = dataclasses.replace(CASES["allgather, one rank"], blocks=(dataclasses.replace(ROUTED, odd=()),))
    built = build(case)
    graph = built.gm.graph
    negative(graph, target, index, again)
    low, before = lowering(case), snapshot(graph)
    with quiet():
        low(built.gm)
    report = low.reports[0]
    said = [why for _, why in report.unrecognised] + [b.reason for b in report.blocks if b.comm is None]
    assert not any("undone" in why or "internal" in why for why in said), said
    if lowered:
        assert report.fully_lowered and not verifier.generic_nodes(graph.nodes)
        check_numbers(case, built)
    else:
        assert any("[raise.whole_result]" in why for why in said), said
        if target is M.dispatch.default:
            assert not (changed := differences(before, snapshot(graph))), changed


# Exported programs


class Exported(torch.nn.Module):
    """Results of two layers, counts and a buffer that is written: all that a signature may name."""

    def __init__(self, *, functional: bool = True) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(MoE(32, 16, 8, 2) for _ in range(2))
        self.register_buffer("seen", torch.zeros(8, dtype=torch.int64))
        self.w13, self.w2 = torch.nn.Parameter(torch.randn(8, 32, 32)), torch.nn.Parameter(torch.randn(8, 16, 32))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = self.layers[0](x)
        weights, ids = M.route(x[:, :8], None, 2, "softmax", True, 1, 1, "max", 1.0)
        rows, scale, counts, handle = M.dispatch(x, None, ids, None, 8, "", 1, "", 1, 0, 0)
        rows = M.grouped_mlp(rows, scale, counts, [self.w13], [self.w2], [], [], "swiglu", 0.0, 1.702, False)
        y = M.combine(rows, weights, ids, handle, None, 8, "", 1, "", 1, 0)
        self.seen.copy_(counts)  # the signature names the node of the buffer's new value
        scratch.copy_(y)
        return first, self.layers[1](first), counts, y, weights


def test_an_exported_program_can_be_saved_and_loaded_and_runs_right():
    torch.manual_seed(0)
    module, x = Exported(), torch.randn(5, 32)
    expected = [value.clone() for value in module(x, torch.zeros(5, 32))]
    seen = module.seen.clone()
    module.seen.zero_()
    program = torch.export.export(module, (x, torch.zeros(5, 32)))
    low = MoeLowering(ONE, strict=True)
    low(program.graph_module)
    assert [b.comm for b in low.reports[0].blocks] == ["allgather"] * 3
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded, scratch = torch.export.load(file).module(), torch.zeros(5, 32)
    for a, b in zip(loaded(x, scratch), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scratch, expected[3], rtol=1e-4, atol=1e-5)
    assert torch.equal(dict(loaded.named_buffers())["seen"], seen)


@pytest.mark.parametrize("fails", [False, True])
def test_the_range_of_tokens_is_enforced_by_the_block_that_is_left(fails, monkeypatch):
    """The first block brings ``assert_tokens`` for all of its T; where reporting it fails, both are gone again."""
    case = edit_faults.one(edit_faults.MANY.replace(max_tokens=64), "allgather", count=2, sizes="dynamic")
    built, low, true, calls = build(case), edit_faults.lowering(case), block_reports.BlockReport, []

    def report(*args, **kwargs):
        calls.append(args)
        if fails and len(calls) == 1:
            raise ZeroDivisionError("planted")
        return true(*args, **kwargs)

    monkeypatch.setattr(block_reports, "BlockReport", report)
    with edit_faults.quiet():
        low(built.gm)
    assert [b.comm for b in low.reports[0].blocks] == [None if fails else "allgather", "allgather"]
    assert len(built.gm.graph.find_nodes(op="call_function", target=edit_faults.ASSERT)) == 1
