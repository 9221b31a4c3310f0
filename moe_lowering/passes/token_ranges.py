"""Ranges of T, the token count of one rank: reading them from a graph, searching in them, and requesting guards on them.

A guard is a request to dynamo to recompile outside of a range. It may be made only where T is equal on all ranks (two
ranks that guard on their own T take different branches and hang) and outside of a strict range (``mark_dynamic`` with
min and max, an export ``Dim``), where it would fail the compile.
Sources: torch.symbolic_shapes: ShapeEnv.tracked_fakes, ConstraintViolationError; here.test_token_ranges: tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from moe_lowering.limits import Prover, TokenRange
from moe_lowering.passes.blocks import size_key

Choice = TypeVar("Choice")

# Set by a caller that runs the graph without dynamo's guards, for every T of its range: no decision may rest on a part of it.
RUNS_WITHOUT_GUARDS: ContextVar[bool] = ContextVar("RUNS_WITHOUT_GUARDS", default=False)

# Where a search without an upper bound stops looking for a change: more tokens than any rank holds.
SEARCH_LIMIT = 2**24


def known_range(tokens: Any) -> TokenRange:
    """What the graph's own ShapeEnv says of T."""
    low, high = Prover().bounds(tokens)
    return TokenRange(low or 0, high)


def size_hint(tokens: torch.SymInt) -> int | None:
    """The size that this compile was started with; None when the ShapeEnv has none."""
    return int(tokens.node.hint) if tokens.node.has_hint() else None


def is_strict(tokens: torch.SymInt) -> bool:
    """Whether some symbol of T was declared with a range that must not be narrowed."""
    from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint  # slow to import

    return any(isinstance(constraint, StrictMinMaxConstraint) for constraint in _constraints(tokens))


def must_vary(tokens: torch.SymInt) -> bool:
    """Whether some symbol of T was marked dynamic: guards may narrow it, but a single value fails the compile."""
    from torch.fx.experimental.symbolic_shapes import RelaxedUnspecConstraint  # slow to import

    return any(
        isinstance(constraint, RelaxedUnspecConstraint) and not constraint.warn_only
        for constraint in _constraints(tokens)
    )


def _constraints(tokens: torch.SymInt) -> Iterator[Any]:
    """The constraints that the user gave dynamo for the symbols of T."""
    symbols = tokens.node.expr.free_symbols
    return (
        constraint
        for tracked in tokens.node.shape_env.tracked_fakes or ()
        for size, constraint in zip(
            getattr(tracked.fake, "shape", ()),
            getattr(tracked.symbolic_context, "constraint_sizes", None) or (),
            strict=False,
        )
        if isinstance(size, torch.SymInt) and size.node.expr.free_symbols & symbols
    )


def prover_for(tokens: torch.SymInt, interval: TokenRange) -> Prover:
    """A prover that knows T to lie in ``interval``."""
    return Prover({size_key(tokens): (interval.low, interval.high)})


def request_guard(tokens: torch.SymInt, interval: TokenRange) -> None:
    """Make dynamo recompile outside of ``interval``; without a hint in it nothing is asked for.

    With a hint outside of it torch would guard on the opposite, and keep the graph for just those T that it refuses.
    """
    known, started_at = known_range(tokens), size_hint(tokens)
    if started_at is None or started_at not in interval:
        return
    holds = True  # to ask is to guard: not within an assert, which ``python -O`` leaves out
    if interval.low > known.low:
        holds = bool(tokens >= interval.low)
    if interval.high is not None and interval.high != known.high:
        holds = bool(tokens <= interval.high) and holds
    if not holds:
        raise RuntimeError(f"T was compiled for as {started_at}, and is not in {interval.low} to {interval.high}")


def widest(choice: Callable[[int], Choice], at: int, within: TokenRange) -> TokenRange:
    """The largest range around ``at`` that ``choice`` is found to be constant on.

    Steps outward in doubling strides and bisects to the first change seen. A change and a change back within one stride
    would be missed; the caller proves legality for the whole range afterwards, so that could cost a better choice and
    never a right one.
    """
    own_choice = choice(at)

    def edge(end: int) -> int:
        sign, stride, reached = (1 if end >= at else -1), 1, at
        while reached != end:
            step = end if abs(end - at) <= stride else at + sign * stride
            if choice(step) != own_choice:
                return _bisect(lambda t: choice(t) == own_choice, reached, step)
            reached, stride = step, 2 * stride
        return end

    limit = max(SEARCH_LIMIT, at)
    high = edge(limit if within.high is None else within.high)
    return TokenRange(edge(within.low), None if within.high is None and high == limit else high)


def _bisect(holds: Callable[[int], bool], good: int, bad: int) -> int:
    """The value nearest to ``bad`` for which ``holds`` is true, between a good and a bad value."""
    while abs(good - bad) > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good
