"""Layers whose rows other ranks send, after transformers' ``AllToAllEP``: left, with a reason that says so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foreign_forms import EXPERTS, HIDDEN
from foreign_styles import IndexAdd, Style, Weighed
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from moe_lowering import testing

RANKS = 2


class Exchanged(Style):
    """A rank's own experts on the rows that all ranks send; as many from each, whatever the ids are."""

    group = ""

    def exchange(self, rows: Tensor) -> Tensor:
        half = [len(rows) // RANKS] * RANKS
        return collectives.wait_tensor(collectives.all_to_all_single(rows, half, half, self.group))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        flat = ids.reshape(-1)
        order = torch.argsort(flat)
        counts = torch.zeros(EXPERTS, dtype=torch.long).scatter_add_(0, flat, torch.ones_like(flat))
        received, counts = self.exchange(x[order // self.top_k]), self.exchange(counts)
        own = torch.arange(EXPERTS // RANKS).repeat(RANKS).repeat_interleave(counts, output_size=len(received))
        by_expert = torch.argsort(own, stable=True)
        ends = torch.histc(own.float(), EXPERTS // RANKS, 0, EXPERTS // RANKS - 1).cumsum(0).int()
        rows = self.own_experts(received[by_expert], ends)
        rows = self.exchange(torch.zeros_like(rows).index_copy(0, by_expert, rows))
        back = torch.zeros_like(rows).index_copy(0, order, rows).view(*ids.shape, HIDDEN)
        return (back * weights.unsqueeze(-1).to(x.dtype)).sum(1)

    def own_experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        w1, w3, w2 = (w[: EXPERTS // RANKS] for w in (self.w1, self.w3, self.w2))
        gate, up = (F.grouped_mm(rows, w, offs=ends) for w in (w1, w3))
        return F.grouped_mm(F.silu(gate) * up, w2, offs=ends)


class AtHome(Exchanged):
    """The same rows, which stay on their rank."""

    def exchange(self, rows: Tensor) -> Tensor:
        return rows


class SentBack(Exchanged):
    """What torch.compile leaves of the form behind its first exchange: rows and ids of experts are inputs."""

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, 0] > 0).long()
        order = torch.argsort(ids)
        ends = torch.histc(ids.float(), EXPERTS // RANKS, 0, EXPERTS // RANKS - 1).cumsum(0).int()
        rows = self.own_experts(x[order], ends).masked_fill((ids[order] > 1).unsqueeze(1), 0.0)
        return self.exchange(torch.zeros_like(rows).index_copy(0, order, rows))


class KeptBack(SentBack):
    def exchange(self, rows: Tensor) -> Tensor:
        return rows


def before(layer: Style, x: Tensor) -> Tensor:
    """Tokens that an exchange brought and products changed, as what is in front of a layer does."""
    half = [len(x) // RANKS] * RANKS
    received = collectives.wait_tensor(collectives.all_to_all_single(x, half, half, layer.group))
    return received @ layer.gating @ layer.gating.t()


class Behind(IndexAdd):
    group = ""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(before(self, x))


class LeftBehind(Weighed):
    """Left for a reason of its own."""

    group = ""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(before(self, x))


CASES = [
    (Exchanged, "raise.exchanged"),
    (AtHome, "raise.offsets"),
    (SentBack, "raise.exchanged"),
    (KeptBack, "raise.offsets"),
    (LeftBehind, "raise.weigh_input"),
    (Behind, ""),
]


@pytest.mark.parametrize(("make", "code"), CASES)
def test_rows_of_other_ranks_are_told_and_left(make, code):
    with testing.fake_deployment(ep_size=RANKS) as deployment:
        layer = make()
        layer.group = deployment.ep_group
        lowered = testing.lower_graph(layer, torch.zeros(6, HIDDEN, dtype=torch.bfloat16), deployment=deployment)
    report = lowered.report
    if not code:
        assert [block.raised_from for block in report.blocks] == ["grouped_mm"] and report.foreign == ()
        return
    assert report.blocks == () and report.nodes_before == report.nodes_after
    assert {each.not_raised.code for each in report.foreign if each.not_raised} == {code}, report.foreign
