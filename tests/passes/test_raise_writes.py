"""A write in place into any value of a layer that others wrote, at any of some places: it is left, or computes the same.

The values are those of the layer, and what it reads: copies of tokens and ids in front of it, masks, views, numbers that stay in
the graph since something else reads them, which the write itself does.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import npu_chain_first as first
import npu_chain_layers as chains
import pytest
import torch
from edit_outcomes import difference, lower_copy, run_all
from edited_forms import OF_ONE
from edited_forms import graph_of as graph_of_chain
from foreign_forms import FORMS
from raise_graphs import graph_of, trace
from torch import Tensor

from moe_lowering import Deployment, simulator, testing

ZERO = torch.ops.aten.zero_.default
ATEN = ("argsort back", "batched_mm, k = 1", "grouped_mm")
CHAINS = ("routing_v1", "permute, prefix sums")
WHERE = Deployment(soc="A3", installed=(), weight_format="nz")


@pytest.fixture(scope="module", autouse=True)
def simulated():
    simulator.enable("A3")
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def written(gm: Any) -> Iterator[tuple[str, Any]]:
    """Copies of a graph in which a value is zeroed behind the next operation, or at the end."""
    names = [node.name for node in gm.graph.nodes]
    first = next(index for index, node in enumerate(gm.graph.nodes) if node.op == "call_function")
    for index, node in enumerate(gm.graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or node.op == "output":
            continue
        for place in {max(first, index + 2), len(names) - 2}:
            if not max(index + 1, first) <= place < len(names):
                continue
            changed = copy.deepcopy(gm)
            by_name = {each.name: each for each in changed.graph.nodes}
            with changed.graph.inserting_before(by_name[names[place]]):
                changed.graph.call_function(ZERO, (by_name[node.name],)).meta.update(val=value)
            changed.recompile()
            yield f"{node.name} zeroed before {names[place]}", changed


def require_left_or_equal(gm: Any, made: dict[str, Tensor]) -> None:
    raised, left = 0, 0
    for name, changed in written(gm):
        lowered, report = lower_copy(changed, WHERE, "allgather")
        if not any(block.comm for block in report.blocks):
            left += 1
            continue
        raised += 1
        before = run_all(changed, made)
        assert not isinstance(before, str), before
        wrong = difference(before, run_all(lowered, made))
        assert not wrong, (name, wrong)
    assert raised >= 2 and left >= 10, (raised, left)


@pytest.mark.parametrize("form", ATEN)
def test_a_write_into_a_layer_of_aten_operators(form):
    require_left_or_equal(*graph_of(FORMS[form]))


@pytest.mark.parametrize("form", CHAINS)
def test_a_write_into_a_chain(form):
    kind, given = OF_ONE[form]
    require_left_or_equal(*graph_of_chain(kind(**given), 0))


class CastTwice(first.Permuted):
    """Ids that the routing and the counts cast, each for itself."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        made = chains.npu().npu_moe_token_permute(x, ids.to(torch.int32), None)
        counts = torch.histc(ids.to(torch.int32).float(), chains.EXPERTS, 0, chains.EXPERTS).to(torch.int64)
        out = self.mlp(made[0], counts, 1)
        return chains.npu().npu_moe_token_unpermute(out, made[1], weights.bfloat16())


def test_a_write_into_ids_that_are_cast_twice():
    require_left_or_equal(*graph_of_chain(CastTwice(), 0, of_ids=torch.int64))


class SentTwice(chains.Mc2):
    """MC2 whose ends cast ids for themselves."""

    def combine(self, rows: Tensor, ids: Tensor, *args: Any, **more: Any) -> Any:
        return super().combine(rows, self.ids.to(torch.int32), *args, **more)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor | None = None) -> Any:
        self.ids = ids
        return super().forward(x, ids.to(torch.int32), weights, mask)


@pytest.mark.parametrize("place", ["", "placeholder", "dispatch", "combine", "output"])
def test_a_write_into_ids_that_both_ends_cast(place):
    """Behind the node that the place says; before both ends or after them it is no matter."""
    with testing.fake_deployment(ep_size=2) as deployment:
        gm, _ = graph_of_chain(SentTwice(deployment.ep_communicator, "none", "swiglu", 0, 2), 0, of_ids=torch.int64)
        cast = next(node for node in gm.graph.nodes if node.kwargs.get("dtype") is torch.int32)
        (ids,) = cast.args
        ends = [node for node in gm.graph.nodes if "npu_moe_distribute" in str(node.target)]
        places = dict(zip(("dispatch", "combine"), ends, strict=True)) | {"placeholder": cast.prev}
        if place:
            where = gm.graph.inserting_before(gm.graph.output_node())
            with gm.graph.inserting_after(places[place]) if place in places else where:
                gm.graph.call_function(ZERO, (ids,)).meta.update(val=ids.meta["val"])
        report = lower_copy(gm, deployment, "allgather")[1]
    assert [block.raised_from for block in report.blocks] == ([] if place == "dispatch" else ["mc2_v2"]), report.foreign
    assert place != "dispatch" or "[raise.written_between]" in str(report.foreign[0])


def test_a_write_into_what_the_ids_were_chosen_by():
    """Ids that a write makes equal are not of one choice any more; the twin, a write before the choice, is no matter."""
    layer = FORMS["batched_mm"]
    made = layer.make()
    router = chains.numbers(1, made["x"].shape[-1], 4)

    def function(x: Tensor, weights: Tensor, ids: Tensor, **more: Tensor) -> Any:
        return layer.function(x, weights, (x.float() @ more.pop("router")).topk(2)[1], **more)

    gm = trace(function, {**made, "router": router})
    for target, raised in (("topk", 0), ("mm", 1)):
        changed = copy.deepcopy(gm)
        node = next(
            each for each in changed.graph.nodes if target in str(each.target) and "bmm" not in str(each.target)
        )
        while target == "topk" and "getitem" not in str(node.target):
            node = next(iter(node.users))
        with changed.graph.inserting_before(node.next):
            changed.graph.call_function(ZERO, (node,)).meta.update(val=node.meta["val"])
        changed.recompile()
        report = lower_copy(changed, WHERE, "allgather")[1]
        assert len(report.blocks) == raised, report.foreign
        if not raised:
            assert "[raise.written_between]" in str(report.foreign[0])
