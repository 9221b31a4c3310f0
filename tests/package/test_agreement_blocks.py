"""What a graph's record of its blocks holds: nothing that is a rank's own."""

import dataclasses
import json

import npu_chain_layers as chains
import pytest
import torch
from edit_faults import CASES, lowering, quiet
from graph_build import build

from moe_lowering import MoeLowering, testing
from moe_lowering.agreement_records import LONGEST_SHOWN, block_differences, block_key, setting_differences
from moe_lowering.passes import operands
from moe_lowering.passes.agreement_check import ASSERT_AGREEMENT, OWN, TOLERATED
from moe_lowering.passes.blocks import BlockSpec

RANKS = {name: case for name, case in CASES.items() if case.deployment.ep_size > 1}


def record(case):
    built = build(case)
    with quiet():
        lowering(case)(built.gm)
    (check,) = built.gm.graph.find_nodes(op="call_function", target=ASSERT_AGREEMENT)
    return json.loads(check.args[-1])


def plain(value):
    """Whether a value was written as data: the text of an object may hold what is a rank's own."""
    if isinstance(value, list):
        return all(map(plain, value))
    return isinstance(value, (bool, int, float)) or (
        isinstance(value, str) and "(device" not in value and "device=" not in value
    )


@pytest.mark.parametrize("case", RANKS.values(), ids=RANKS)
def test_every_field_is_compared_as_data(case):
    for kind in record(case)["kinds"]:
        fields = {field.name for field in dataclasses.fields(BlockSpec)}
        assert fields - OWN - TOLERATED <= kind["strict"].keys() and kind["told"].keys() >= TOLERATED
        assert [name for name, value in kind["strict"].items() if not plain(value)] == []


def test_tensors_of_another_device_are_no_difference(monkeypatch):
    """Each rank has a device of its own, npu:0 to npu:7."""
    case, true = RANKS["allgather, ranks"], operands._operand
    before = record(case)
    other = torch.device("cpu", 1)
    monkeypatch.setattr(operands, "_operand", lambda *fact: true(*fact[:4], other))
    assert block_key(record(case)) == block_key(before)
    assert block_key(record(dataclasses.replace(case, hidden=2048))) != block_key(before)


@pytest.mark.parametrize(("comm", "said"), [("mc2", "none: left as it was written"), ("alltoall", "alltoall (static)")])
def test_a_layer_of_another_hand_that_is_left_is_compared_too(comm, said):
    """Another rank may have lowered its own, and would exchange otherwise. It stands there once, however many there are."""
    with testing.fake_deployment(ep_size=2) as deployment:
        layer = torch.nn.Sequential(*(chains.Mc2(deployment.ep_communicator, "none", "swiglu", 0, 2) for _ in range(2)))
        layer.forward = lambda x, ids, weights: layer[1](layer[0](x, ids, weights), ids, weights)
        lowering = MoeLowering(deployment, comm)
        gm = testing.lower_graph(layer, *chains.inputs(0), deployment=deployment, lowering=lowering).gm
    (check,) = gm.graph.find_nodes(op="call_function", target=ASSERT_AGREEMENT)
    blocks = json.loads(check.args[-1])
    (kind,) = blocks["kinds"]
    assert kind["strict"]["implementation"] == said and ("[raise.already]" in kind["told"]["reason"]) == (comm == "mc2")
    assert blocks["order"] == [[0, 1 if comm == "mc2" else 2]]


SETTINGS = {
    "deployment": {"soc": "A3"}, "misplaced": "", "settings": {"comm": "mc2"}, "torch_npu": True, "libraries": ["a::b"],
    "version": "1", "code": "c", "limits": "l",
}  # fmt: skip


DIFFERENCES = [
    ({"deployment": {"soc": "A2"}}, "Deployment.soc is 'A2', on rank 3 'A3'"),
    ({"deployment": {}}, "Deployment.soc is absent, on rank 3 'A3'"),  # of another version of the package
    ({"settings": {"comm": "auto"}}, "MoeLowering's comm is 'auto', on rank 3 'mc2'"),
    ({"torch_npu": False}, "torch_npu is not loaded, on rank 3 loaded"),
    ({"libraries": []}, "a::b is not loaded, on rank 3 loaded"),
    ({"version": "2"}, "moe_lowering is 2, on rank 3 1"),
    ({"code": "d"}, "moe_lowering's code differs: its digest is 'd', on rank 3 'c'"),
    ({"limits": "m"}, "its limit tables differ: their digest is 'm', on rank 3 'l'"),
]


@pytest.mark.parametrize(("change", "said"), DIFFERENCES, ids=lambda value: next(iter(value), ""))
def test_every_difference_of_settings_says_both_values(change, said):
    assert setting_differences(SETTINGS, {**SETTINGS, **change}, 3) == [said]
    assert setting_differences(SETTINGS, dict(SETTINGS), 3) == []


def test_no_part_of_the_settings_is_left_out():
    assert {name for change, _ in DIFFERENCES for name in change} == SETTINGS.keys() - {"misplaced"}


def test_long_values_of_blocks_are_cut_around_the_place_where_they_differ():
    def blocks(end):
        exchange = [f"all_gather {n}" for n in range(100)] + [end] + ["tail"] * 100
        kind = {"strict": {"exchange": exchange}, "told": {"name": "layers.0"}}
        return {"kinds": [kind], "order": [[0, 1]], "T": None}

    (line,) = block_differences(blocks("mine"), blocks("theirs"), 0)
    assert "theirs, tail" in line.split(", on rank 0 ")[0] and "mine, tail" in line.split(", on rank 0 ")[1]
    assert len(line) < 2 * LONGEST_SHOWN + 100
    assert block_differences(blocks("mine"), blocks("mine"), 0) == []
