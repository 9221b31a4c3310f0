"""Random graphs and deployments: judged legal means rewritten right, illegal means untouched, on all ranks alike.

``MOE_LOWERING_CASES`` is the number of cases in all (200): nine in twenty are judged only, a quarter is run on one rank
and three in ten on two. Each chunk of 250 prints its ``MOE_LOWERING_SEED``, which pytest shows where the chunk fails;
given, it repeats the chunk. A chunk checks all its cases and fails with all that it found (``graph_runs``). What came of
the cases is counted, and printed at the end (``conftest.py``).
"""

from __future__ import annotations

import functools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import graph_data
import pytest
import torch
from graph_build import build
from graph_cases import GraphCase, PairCase
from graph_checks import Lowered, check_judged, check_refused, lower
from graph_data import Data, Result, refuses
from graph_draws import Strategy
from graph_runs import CheckAll, one_by_one, run_cases
from graph_strategies import judged_cases, local_cases, pair_cases
from rank_pools import Ranks

from moe_lowering import simulator
from moe_lowering.passes.legality import outside_declared_range
from moe_lowering.testing.ranks import RankError

CASES = int(os.environ.get("MOE_LOWERING_CASES", "200"))
SEED = int(os.environ.get("MOE_LOWERING_SEED") or random.SystemRandom().getrandbits(32))
CHUNK = 250
MOST_OF_A_POOL = 1000  # cases, then its processes are made anew: graphs and their guards stay in a process, 2 MB a case
# The SoC of one seed or chunk after the other: only A3 has all implementations.
PAIR_SOCS = (*["A3"] * 5, "A2", *["A3"] * 5, "A5")


def chunks(cases: int) -> list[Any]:
    """(number of the chunk, cases in it)."""
    sizes = [CHUNK] * (cases // CHUNK) + ([cases % CHUNK] if cases % CHUNK else [])
    return [pytest.param(number, size, id=f"{number * CHUNK}") for number, size in enumerate(sizes)]


def for_all(strategy: Strategy, number: int, cases: int, check_all: CheckAll, record_property: Any) -> None:
    """Check ``cases`` cases of a strategy; the chunk's seed is printed first, and what came of the cases last."""
    print(f"MOE_LOWERING_SEED={SEED} MOE_LOWERING_CASES={CASES}, chunk {number}: {cases} cases")
    counts = run_cases(strategy, f"{SEED}/{number}", cases, check_all)
    record_property("outcomes", counts)
    print(counts)


def ran(comms: Iterable[str | None]) -> set[str]:
    """What is counted of a case whose numbers were checked."""
    return {f"{comm} run" if comm else "illegal, run as it was" for comm in comms}


# --- judging and rewriting, nothing run ------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "cases"), chunks(CASES * 9 // 20))
def test_legal_or_untouched(number: int, cases: int, record_property: Any) -> None:
    for_all(judged_cases(), number, cases, one_by_one(check_judged), record_property)


# --- numbers, one rank -----------------------------------------------------------------------------------------------


def check_local(case: GraphCase) -> set[str]:
    built, data = build(case), Data(case)
    inputs = data.inputs(built)
    with torch.no_grad():
        assert not (wrong := data.wrong(built, built.gm(*inputs))), f"before the pass: {wrong}"
        lowered = lower(case, built)
        check_refused(lowered)
        if any(outside_declared_range(spec.tokens, case.deployment) for spec in lowered.specs.values()):
            return {"T not as declared"}
        assert not (wrong := data.wrong(built, built.gm(*inputs))), wrong
        if case.sizes != "static":
            check_other_size(lowered)
    return ran(lowered.comms.values())


def check_other_size(lowered: Lowered) -> None:
    """A graph of symbolic sizes is right with others too, unless it refuses them."""
    case, built = lowered.case, lowered.built
    other = Data(case, tuple(n + 3 if symbolic else n for n, symbolic in zip(case.lead, case.symbolic, strict=True)))
    most = case.deployment.max_tokens
    if (most and torch.Size(other.lead).numel() > most) or refuses(built, other.lead):
        return
    assert not (wrong := other.wrong(built, built.gm(*other.inputs(built)))), wrong


@pytest.mark.parametrize(("number", "cases"), chunks(CASES // 4))
def test_legal_is_right_on_one_rank(number: int, cases: int, record_property: Any) -> None:
    for_all(local_cases(), number, cases, one_by_one(check_local), record_property)


# --- numbers, two ranks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_pair() -> Iterator[Callable[[str, Sequence[PairCase]], list[list[Result]]]]:
    """Runs cases on two processes that simulate a SoC, made when they are first asked for; by rank, then by case."""
    pools: dict[str, Ranks] = {}
    run_by = Counter[str]()

    def run(soc: str, pairs: Sequence[PairCase]) -> list[list[Result]]:
        if soc in pools and run_by[soc] >= MOST_OF_A_POOL:
            pools.pop(soc).close()
        if soc not in pools:
            run_by[soc] = 0
            setup = functools.partial(graph_data.setup_rank, soc)
            start = "forkserver" if soc == simulator.soc() else "spawn"
            pools[soc] = Ranks(2, setup=setup, collective_timeout=60, start_method=start)
        run_by[soc] += len(pairs)
        try:
            return pools[soc].run(graph_data.lower_and_run_all, pairs)
        except RankError:  # the pool is closed; the next cases are for another one
            del pools[soc]
            raise

    yield run
    for pool in pools.values():
        pool.close()


def check_pair(first: Result, second: Result, tp_size: int) -> set[str]:
    for result in (first, second):
        assert not result.wrong, result.wrong
        assert result.untouched, "nothing was lowered, and a graph changed"
        assert not any("internal error" in reason or "undone" in reason for reason in result.reasons), result
    assert second.comms == first.comms, "the ranks chose differently"
    assert second.refused == first.refused, "one rank refuses to run"
    if tp_size > 1:
        assert second.results == first.results, "the ranks of a TP group have different results"
    return {"T outside of the proven range"} if first.refused else ran(first.comms)


@pytest.mark.parametrize(("number", "cases"), chunks(CASES * 3 // 10))
def test_legal_is_right_on_two_ranks(number: int, cases: int, on_pair: Any, record_property: Any) -> None:
    soc = PAIR_SOCS[(SEED + number) % len(PAIR_SOCS)]

    def check(pair: PairCase) -> set[str]:
        ((first,), (second,)) = on_pair(soc, [pair])
        return check_pair(first, second, pair.case.deployment.tp_size)

    def check_all(pairs: Sequence[PairCase]) -> Iterator[Iterable[str] | Exception]:
        try:
            results = on_pair(soc, pairs)
        except RankError as error:  # of which case, the ranks cannot say: each by itself
            outcomes = list(one_by_one(check)(pairs)) if len(pairs) > 1 else [error]
            if not any(isinstance(outcome, Exception) for outcome in outcomes):
                outcomes[-1] = error  # only one after the other they fail
            return iter(outcomes)
        together = list(zip(pairs, *results, strict=True))
        return one_by_one(lambda three: check_pair(*three[1:], three[0].case.deployment.tp_size))(together)

    for_all(pair_cases(soc), number, cases, check_all, record_property)
