"""transformers' expert parallelism with one thing changed is left, by its code; as it is it is raised.

No ranks run here: what the twins compute is compared in test_raise_expert_parallel.
"""

from __future__ import annotations

import expert_parallel_jobs as jobs
import pytest
import torch
from foreign_twins import TWINS as OF_LAYERS
from twin_table import CHANGES

from moe_lowering import simulator, testing

PARALLEL = "raise.expert_parallel"
OWN = "the layer that each rank has, which is one of the form: "
TWINS: dict[str, str] = {
    "the other rank's place": PARALLEL,
    "an expert for those of others": PARALLEL,
    "fewer experts on a rank": PARALLEL,
    "the condition inverted": "raise.ids_range",
    "weights of others": PARALLEL,
    "another mask at one end": PARALLEL,
    "the mask inverted": PARALLEL,
    "a maximum": PARALLEL,
    "the mean": PARALLEL,
    "another group": PARALLEL,
    "a range off by one": PARALLEL,
    "relu before the sum": PARALLEL,
    "a part by another library's add": PARALLEL,
    "a part added twice": PARALLEL,
}
# Of each change of the issue: its twin of a layer of one rank in ``foreign_twins``, one of those above, or why there is none.
NO_COUNTS, NO_INDEX = "it has no counts", "its rows are in the order of the slots: no way back by an index"
CELLS: dict[str, dict[str, str]] = {
    "grouped_mm": {
        "a relu between the matmuls": "grouped, relu between",
        "weights applied twice": "grouped, weights twice",
        "another index at the way back": "grouped, way back by the permutation",
        "another group": "another group",
        "an interior value returned": "grouped, rows returned",
        "gate and up exchanged": "grouped, up and gate",
        "another k": "grouped, another k",
        "counts for prefix sums": "grouped, no running sum",
        "another mask at one end": "another mask at one end",
        "abs on a partial range": "none: its rows are those of all slots, of which none has an index -1",
        "a range off by one": "a range off by one",
    },
    "gathered_weights": {
        "a relu between the matmuls": "batched, relu between",
        "weights applied twice": "batched, weights twice",
        "another index at the way back": "batched, over tokens",
        "another group": "another group",
        "an interior value returned": "batched, interior returned",
        "gate and up exchanged": "batched, up and gate",
        "another k": "batched, tokens in turn",
        "counts for prefix sums": "none: " + NO_COUNTS,
        "another mask at one end": "another mask at one end",
        "abs on a partial range": "none: " + NO_INDEX,
        "a range off by one": "a range off by one",
    },
}


@pytest.mark.parametrize("form", CELLS)
def test_every_change_has_a_twin_or_a_reason(form):
    assert set(CELLS[form]) == set(CHANGES)
    for cell in CELLS[form].values():
        assert cell in OF_LAYERS or cell in TWINS or cell.startswith("none: "), cell


def lower(implementation: str, change: str):
    simulator.enable("A3")
    with testing.fake_deployment(ep_size=2) as fake, torch._dynamo.config.patch(specialize_float=True):
        where = fake.replace(tp_size=2, tp_rank=0, tp_group=fake.ep_group)
        block = jobs.block_of("qwen3_moe", torch.float32)
        jobs.shard(block, 0, implementation, change)
        x = torch.randn(1, 6, jobs.HIDDEN, generator=torch.Generator().manual_seed(6))
        return testing.lower_graph(block, x, deployment=where, comm="allgather")


CASES = [
    *((change, "grouped_mm") for change in TWINS),
    ("another group", "batched_mm"),
    ("a range off by one", "batched_mm"),
]
CASES += [("another mask at one end", "batched_mm")]


@pytest.mark.parametrize(("change", "implementation"), CASES)
def test_a_twin_is_left_node_for_node(change, implementation):
    lowered = lower(implementation, change)
    assert lowered.report.blocks == () and [n for n in lowered.ops_before if "gating" not in n] == [
        n for n in lowered.ops_after if "gating" not in n
    ]
    assert lowered.report.foreign[0].not_raised.code in TWINS[change].split(), lowered.report.foreign[0].not_raised


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_form_is_raised(implementation):
    (block,) = lower(implementation, "nothing").report.blocks
    assert block.comm == "allgather"
