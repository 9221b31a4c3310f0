"""Edited routers: equal or left, never wrong. ``MOE_LOWERING_ROUTER_EDITS`` sets how many are tried."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from router_edits import base_graphs, differences, edit, run

from moe_lowering import Deployment, MoeLowering, simulator

simulator.enable()
EDITS = int(os.environ.get("MOE_LOWERING_ROUTER_EDITS", "150"))
SEED = int(os.environ.get("MOE_LOWERING_ROUTER_SEED", "0"))


@pytest.fixture(scope="module")
def graphs():
    return base_graphs()


def test_edited_routers_are_equal_or_left(graphs):
    draw, seen = random.Random(SEED), Counter()
    while seen["tried"] < EDITS:
        name = draw.choice([*graphs])
        gm = edit(graphs[name], draw)
        expected = None if gm is None else run(gm)
        if expected is None:
            continue
        before = gm.code
        lowering = MoeLowering(Deployment(soc="A3"), "allgather")
        lowering(gm)
        report = lowering.reports[-1]
        seen["tried"] += 1
        seen["raised" if any(router.became for router in report.routers) else "left"] += 1
        assert all("internal error" not in router.reason for router in report.routers), (name, before)
        result = run(gm)
        assert result is not None and not differences(result, expected), (name, before, report.routers)
    assert seen["raised"] > EDITS // 10 and seen["left"] > EDITS // 10, seen
