"""Graphs of torch_npu chains of one rank with random edits: each is left alone, or lowered and numerically equal.

MOE_LOWERING_EDITS sets how many, over all forms, and MOE_LOWERING_SEED begins their seeds. Those of several ranks are in
test_raise_npu_chains.
"""

from __future__ import annotations

import logging
import os
from collections import Counter

import pytest
from edited_forms import OF_ONE, edited_alone

from moe_lowering import simulator

EDITS = int(os.environ.get("MOE_LOWERING_EDITS", "45"))
SEED = os.environ.get("MOE_LOWERING_SEED", "")


@pytest.fixture(autouse=True)
def simulated():
    simulator.enable("A3")
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("form", OF_ONE)
def test_an_edited_graph_is_left_or_equal(form):
    found = edited_alone(form, [f"{SEED}{form}/{index}" for index in range(EDITS // len(OF_ONE))])
    print(form, Counter(outcome for outcome, _ in found))
    assert [wrong for _, wrong in found if wrong] == []
