"""The simulator knows its own wrappers by a mark: what somebody else wrapped is wrapped too, and its own is not wrapped twice."""

from __future__ import annotations

import functools
import importlib

import pytest

from moe_lowering import simulator
from moe_lowering.simulator.device import graphs, stale_outputs


def methods(part):
    """(class, name) of what a part wraps."""
    if part is stale_outputs:
        owner = importlib.import_module(stale_outputs._MODULE).AclGraph
        return [(owner, name) for name in stale_outputs._WINDOWS]
    from torch_npu.npu import ExternalEvent, NPUGraph, graph

    names = [(NPUGraph, "capture_begin"), (NPUGraph, "capture_end"), (NPUGraph, "replay")]
    return [*names, (graph, "__enter__"), (graph, "__exit__"), (ExternalEvent, "record")]


def wrapped_by_somebody():
    def original(self):
        return 1

    @functools.wraps(original)
    def theirs(self):
        return original(self)

    return theirs


@pytest.mark.parametrize("part", [graphs, stale_outputs], ids=["graphs", "stale_outputs"])
def test_what_somebody_else_wrapped_is_wrapped_too_and_ours_is_not_twice(monkeypatch, part):
    simulator.enable()
    owned = methods(part)
    theirs = [wrapped_by_somebody() for _ in owned]
    for (owner, name), method in zip(owned, theirs, strict=True):
        monkeypatch.setattr(owner, name, method)
    part.install()
    ours = [getattr(owner, name) for owner, name in owned]
    assert all(now is not then and now.__wrapped__ is then for now, then in zip(ours, theirs, strict=True))
    part.install()
    assert [getattr(owner, name) for owner, name in owned] == ours
