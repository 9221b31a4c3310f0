"""Graphs of foreign layers with random edits: each is left alone, or lowered and numerically equal; nothing is raised.

MOE_LOWERING_EDITS sets how many, over all forms of the table, and MOE_LOWERING_SEED the first seed of each form.
"""

from __future__ import annotations

import copy
import logging
import os
import random
from collections import Counter

import pytest
import torch
from foreign_forms import FORMS, Foreign
from graph_edits import edit, values
from raise_graphs import graph_of, lower, run
from reference import BOUNDS, relative_error
from torch.utils import deterministic

EDITS = int(os.environ.get("MOE_LOWERING_EDITS", "150"))
SEED = int(os.environ.get("MOE_LOWERING_SEED", "0"))


@pytest.fixture(autouse=True)
def memory_that_nobody_wrote(monkeypatch):
    """It is filled alike, so that a graph that reads it does not pass for another one by chance."""
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    logging.disable()  # torch and the pass say a lot of what is wrong with edited graphs
    yield
    logging.disable(logging.NOTSET)
    torch.use_deterministic_algorithms(False)


def outcome(layer: Foreign, seed: int, graph) -> str:
    """What became of one edited graph; raises where it is wrong."""
    gm, made = graph
    gm, draw = copy.deepcopy(gm), random.Random(seed)
    done = [text for _ in range(draw.choice([1, 1, 1, 2, 3])) if (text := edit(gm, draw))]
    try:
        gm.graph.lint()
        values(gm)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        before = run(gm, made)
    except Exception:  # the edit made no graph that runs
        return "no graph"
    before = before if isinstance(before, (tuple, list)) else (before,)
    if not all(torch.isfinite(each.double()).all() for each in before):
        return "not finite"
    report = lower(gm)
    after = run(gm, made)
    after = after if isinstance(after, (tuple, list)) else (after,)
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        error = relative_error(new, old) if old.double().abs().max() else float(new.double().abs().max())
        assert new.dtype == old.dtype and error <= 2 * BOUNDS[layer.dtype], (seed, done, error, str(report.blocks))
    lowered = [block for block in report.blocks if block.comm]
    assert lowered or not any("internal error" in block.reason or "undone" in block.reason for block in report.blocks)
    return "lowered" if lowered else "left" if report.unlowered or report.blocks else "unseen"


@pytest.mark.parametrize("name", FORMS)
def test_an_edited_graph_is_refused_or_equal(name):
    layer = FORMS[name]
    graph = graph_of(layer)
    each = -(-EDITS // len(FORMS))
    seen = Counter(outcome(layer, seed, graph) for seed in range(SEED, SEED + each))
    print(name, dict(seen))


def test_edits_are_of_all_kinds():
    layer = FORMS["grouped_mm, float32"]
    graph = graph_of(layer)
    seen = Counter(outcome(layer, seed, graph) for seed in range(1000, 1060))
    assert seen["lowered"] >= 3 and seen["left"] >= 10, seen
