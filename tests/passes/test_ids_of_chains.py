"""Chains of torch_npu operators whose ids are no experts for some tokens, which their own operators drop, are left."""

from __future__ import annotations

from collections.abc import Callable

import npu_chain_first as first
import npu_chain_layers as chains
import npu_chain_variants as variants
import pytest
import torch
from torch import Tensor, nn

from moe_lowering import simulator, testing

NUMBER = chains.EXPERTS
FILLS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {  # and whether an id is no expert then
    "the number of experts": (lambda ids, off: ids.masked_fill(off, NUMBER), True),
    "a negative one": (lambda ids, off: ids.masked_fill(off, -1), True),
    "chosen by where": (lambda ids, off: torch.where(off, NUMBER, ids), True),
    "chosen by where, turned": (lambda ids, off: torch.where(~off, ids, torch.full_like(ids, NUMBER + 2)), True),
    "before a cast": (lambda ids, off: ids.long().masked_fill(off, NUMBER).int().view(ids.shape), True),
    "the last expert": (lambda ids, off: ids.masked_fill(off, NUMBER - 1), False),
    "the first expert, by where": (lambda ids, off: torch.where(off, 0, ids), False),
    "as they are": (lambda ids, off: ids, False),
}
LAYERS: dict[str, tuple[int, Callable[[str], nn.Module]]] = {
    "mc2_v2": (2, lambda group: chains.Mc2(group, "none", "swiglu", 0, 2)),
    "mc2_v1": (2, lambda group: variants.First(group, "none", "swiglu", 0, 2)),
    "routing_v2": (1, lambda _: chains.Routed("none", "swiglu", back="finalize")),
    "routing_v1": (1, lambda _: first.FirstRouting()),
    "permute": (1, lambda _: first.Permuted()),
}


class Filled(nn.Module):
    def __init__(self, layer: nn.Module, fill: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.fill = layer, fill

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.layer(x, self.fill(ids, x[:, :1] > 0), weights)


@pytest.fixture(scope="module", autouse=True)
def simulated():
    simulator.enable("A3")


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("form", LAYERS)
def test_ids_that_are_no_experts_are_seen(form, fill):
    ranks, make = LAYERS[form]
    change, outside = FILLS[fill]
    with testing.fake_deployment(ep_size=ranks) as deployment:
        layer = Filled(make(deployment.ep_communicator), change)
        lowered = testing.lower_graph(layer, *chains.inputs(0), deployment=deployment)
    report = lowered.report
    if outside:
        assert report.blocks == () and lowered.ops_before == lowered.ops_after
        assert "[raise.ids_range]" in str(report.foreign[0].not_raised)
    else:
        assert [block.raised_from for block in report.blocks] == [form], report.foreign
