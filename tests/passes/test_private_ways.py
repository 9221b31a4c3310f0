"""The ways past torch's own functions that rest on private parts of it: which torch has them, and what a graph is without.

``make versions`` runs this with each torch of docs/versions.md, so that a version on which a way is not in use is seen.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import ExitStack
from unittest import mock

import pytest
from situations import case_of
from test_tapes import result

from moe_lowering import simulator
from moe_lowering.passes.emission import fake_values, new_nodes
from moe_lowering.passes.graph import erased_nodes

simulator.enable()

# Of each way the question whether this torch has it, and the functions that take the place of torch's own.
WAYS = {
    "values": (fake_values, "_copies_are_whole", ("_copy_state", "_alias")),
    "new nodes": (new_nodes, "_is_whole", ("_insert", "_repeated")),
    "erased nodes": (erased_nodes, "_is_whole", ("_erase",)),
}
CASES = {
    "static": ("alltoall_static", "w8a8", "static"),
    "symbolic": ("allgather", "none", "symbolic"),
    "of a range, symbolic": ("mc2", "none", "declared range, symbolic"),
    "TP": ("allgather", "none", "TP"),
    "mask": ("alltoall_static", "none", "mask"),
}


@functools.cache
def lowered(case: str, *without: str) -> tuple[str, frozenset[str]]:
    """A graph after the pass on a torch that has not some of the ways, and the functions that took the place of torch's."""
    used = set()
    with ExitStack() as patches:
        for way, (module, question, functions) in WAYS.items():
            if way in without:
                patches.enter_context(mock.patch.object(module, question, lambda: False))
            for name in functions:
                patches.enter_context(mock.patch.object(module, name, noting(used, name, getattr(module, name))))
        graph, comm = case_of(*CASES[case])
        return result(graph, comm, []), frozenset(used)


def noting(used, name, function):
    def noted(*args, **kwargs):
        used.add(name)
        return function(*args, **kwargs)

    return noted


@pytest.mark.parametrize("way", WAYS)
def test_this_torch_has_it(way):
    module, question, _ = WAYS[way]
    getattr(module, question).cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(module, question)()


def test_each_way_is_taken():
    used = frozenset().union(*(lowered(case)[1] for case in CASES))
    assert used == {name for _, _, functions in WAYS.values() for name in functions}


@pytest.mark.parametrize("without", [*WAYS, "all"])
@pytest.mark.parametrize("case", CASES)
def test_a_graph_is_the_same_without_it(case, without):
    ways = tuple(WAYS) if without == "all" else (without,)
    graph, used = lowered(case, *ways)
    assert not used & {name for way in ways for name in WAYS[way][2]}
    assert graph == lowered(case)[0]
