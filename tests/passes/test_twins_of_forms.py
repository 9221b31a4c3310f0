"""Every form of torch_npu chains, and each change that makes none of it: left node for node, with its code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from edited_forms import graph_of
from raise_graphs import lines
from twin_table import CHANGES, MORE, RANKS, TWINS, Twin, has_ranks, layer_of

from moe_lowering import Deployment, MoeLowering, simulator, testing
from moe_lowering.passes.raise_foreign.npu_forms import NPU_FORMS

FORMS = [form.name for form in NPU_FORMS if form.name != "npu_not_raised"]
CASES = {
    f"{form}, {change}": (form, twin) for form in FORMS for change in CHANGES
    if isinstance(twin := TWINS[form][change], Twin)
} | {f"{form}, {change}": (form, twin) for (form, change), twin in MORE.items()}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def simulated():
    simulator.enable("A3")


@contextlib.contextmanager
def deployment_of(form: str, ranks: int = 0) -> Iterator[Deployment]:
    if not ranks and not has_ranks(form):
        yield Deployment(soc="A3", installed=())
        return
    with testing.fake_deployment(ep_size=ranks or RANKS) as deployment:
        tp = {"tp_size": RANKS, "tp_rank": 0, "tp_group": deployment.ep_group} if form == "reduced_v2" else {}
        yield deployment.replace(**tp)


def lowered(form: str, changes: dict[str, Any], mask: bool = False, ranks: int = 0) -> tuple[Any, list[str]]:
    """The report, and the lines of the graph that the pass changed."""
    more = {"mask": torch.ones(6, dtype=torch.bool)} if mask else {}
    with deployment_of(form, ranks) as deployment:
        gm, _ = graph_of(layer_of(form, deployment, changes), 0, **more)
        before = lines(gm)
        lowering = MoeLowering(deployment, "allgather")
        lowering(gm)
    return lowering.reports[0], [*set(before) ^ set(lines(gm))]


def test_every_form_has_every_change_or_says_why_not():
    assert set(TWINS) == set(FORMS)
    assert all(set(TWINS[form]) == set(CHANGES) for form in FORMS)
    assert all(twin for row in TWINS.values() for twin in row.values())


@pytest.mark.parametrize("form", FORMS)
def test_the_form_itself_is_raised(form):
    report, _ = lowered(form, {})
    assert [block.raised_from for block in report.blocks] == [form], report.foreign


@pytest.mark.parametrize("case", CASES)
def test_a_twin_is_left_node_for_node(case):
    form, twin = CASES[case]
    report, changed = lowered(form, twin.changes, twin.mask, twin.ranks)
    assert report.blocks == () and not changed
    reasons = [layer.not_raised for layer in report.foreign if layer.not_raised is not None]
    assert reasons and reasons[0].code in twin.codes.split(), reasons
