"""Runs a check on many random cases in a process that is set up for it, and makes a case simple where it fails."""

from __future__ import annotations

import collections
import contextlib
import gc
import logging
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch._dynamo.config
from graph_draws import Choices, Strategy, simplest

# Collections are made by hand, so many cases apart: of a million objects that stay, one takes longer than a case.
CASES_PER_COLLECTION = 25
SHRINK_SECONDS = 60.0
# So many failures are one fault that everything has: the rest of the chunk says nothing new.
FAILURES = 20

Check = Callable[[Any], Iterable[str]]
# Outcomes of several cases in order: what is counted of each, or the error that it raised.
CheckAll = Callable[[Sequence[Any]], Iterable["Iterable[str] | Exception"]]


@contextlib.contextmanager
def many_cases() -> Iterator[None]:
    """While graphs are made that are never made again: no cache of fake results, no collector, no log that pytest keeps."""
    enabled, disabled = torch._dynamo.config.fake_tensor_cache_enabled, logging.root.manager.disable
    logging.disable(logging.WARNING)
    torch._dynamo.config.fake_tensor_cache_enabled = False
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()  # what was frozen stays so: conftest.py
        torch._dynamo.config.fake_tensor_cache_enabled = enabled
        logging.disable(disabled)


def one_by_one(check: Check) -> CheckAll:
    """A check of one case, for many."""

    def check_all(cases: Sequence[Any]) -> Iterator[Iterable[str] | Exception]:
        for case in cases:
            try:
                yield check(case)
            except Exception as error:  # whatever is raised is a finding; the other cases are checked all the same
                yield error

    return check_all


def run_cases(strategy: Strategy, seed: str, count: int, check_all: CheckAll) -> dict[str, int]:
    """Check ``count`` cases; how many of them had which outcome.

    Raises:
        AssertionError: the failures, each with the seed of its case, and the first as the simplest case that still fails.
    """
    counts: collections.Counter[str] = collections.Counter()
    failures: list[tuple[str, list[int], Exception]] = []
    with many_cases():
        for start in range(0, count, CASES_PER_COLLECTION):
            names = [f"{seed}/{index}" for index in range(start, min(start + CASES_PER_COLLECTION, count))]
            draws = [Choices(generator=random.Random(name)) for name in names]
            outcomes = check_all([strategy(choices) for choices in draws])
            for name, choices, outcome in zip(names, draws, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    failures.append((name, choices.made, outcome))
                else:
                    counts.update({"cases", *outcome})
            gc.collect()
            if len(failures) >= FAILURES:
                break
        if failures:
            raise AssertionError(_describe(strategy, failures, check_all)) from failures[0][2]
    return dict(counts)


def _describe(strategy: Strategy, failures: list[tuple[str, list[int], Exception]], check_all: CheckAll) -> str:
    """All failures in a line each; of the first the simplest case that fails with the same type of error."""
    _, made, first = failures[0]

    def outcome(case: Any) -> Any:
        return next(iter(check_all([case])))

    best = simplest(strategy, made, lambda case: type(outcome(case)) is type(first), SHRINK_SECONDS)
    case = strategy(Choices(best))
    error = outcome(case)
    if not isinstance(error, Exception):
        error = first  # it does not fail alone, or not again
    lines = [f"{name}: {type(error).__name__}: {str(error)[:300]}" for name, _, error in failures]
    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return "\n".join((f"{len(failures)} cases failed", *lines, f"the first, made simple: {case!r}", shown))
