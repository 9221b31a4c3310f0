"""Graphs of torch_npu chains of one rank with random edits: each is left alone, or lowered and numerically equal.

MOE_LOWERING_EDITS sets how many, over all forms and those that are spelled otherwise, and MOE_LOWERING_SEED begins their
seeds. Those of several ranks are in test_raise_npu_chains.
"""

from __future__ import annotations

import logging
import os
from collections import Counter

import pytest
from edited_forms import OF_ONE, SPELLED, edited_alone

from moe_lowering import simulator

EDITS = int(os.environ.get("MOE_LOWERING_EDITS", "36"))
FORMS = [*OF_ONE, *(SPELLED if "MOE_LOWERING_EDITS" in os.environ else ())]
SEED = os.environ.get("MOE_LOWERING_SEED", "")


@pytest.fixture(autouse=True)
def simulated():
    simulator.enable("A3")
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("form", FORMS)
def test_an_edited_graph_is_left_or_equal(form):
    found = edited_alone(form, [f"{SEED}{form}/{index}" for index in range(EDITS // len(FORMS))])
    print(form, Counter(outcome for outcome, _ in found))
    assert [wrong for _, wrong in found if wrong] == []
