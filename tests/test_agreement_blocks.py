"""What a graph's record of its blocks holds: nothing that is a rank's own."""

import dataclasses
import json

import pytest
import torch
from edit_faults import CASES, lowering, quiet
from graph_build import build

from moe_lowering.agreement_records import block_key
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
