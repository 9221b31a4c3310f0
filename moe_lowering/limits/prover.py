"""Proofs about sizes: a limit on a symbolic size holds for the whole range of its symbols, or it does not hold.

Never checked on a hint, and never by adding a guard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from moe_lowering.limits.bounds import read_bound, value_range

Ends = tuple[int | None, int | None]  # of a range, None where it has none


class Prover:
    """Decides comparisons of sizes that may be symbolic.

    Args:
        declared: (low, high or None) by sympy expression, e.g. of a token count ``s0*s1``: narrower bounds than the ShapeEnv
            knows, which the caller promises to enforce (the pass puts ``assert_tokens`` in a graph whose proofs used one).

    Attributes:
        used_declared: whether some proof so far needed a declared bound.
    """

    def __init__(self, declared: Mapping[sympy.Expr, tuple[int, int | None]] | None = None) -> None:
        self.declared = dict(declared or {})
        self.used_declared = False
        self._stand_ins = {
            expr: (sympy.Dummy("bounded", integer=True, nonnegative=True), value_range(*bounds))
            for expr, bounds in self.declared.items()
        }
        # Every implementation's rules ask the same questions, and a proof takes 0.3 to 1 ms.
        self._proofs: dict[tuple[int, sympy.Expr], str] = {}  # by ShapeEnv's id and slack

    def at_most(self, value: Any, limit: Any) -> bool:
        """value <= limit for every value of the symbols."""
        if _concrete(value) and _concrete(limit):
            return bool(value <= limit)
        return self._never_negative(limit - value, lambda: value <= limit)

    def at_least(self, value: Any, limit: Any) -> bool:
        """value >= limit for every value of the symbols."""
        if _concrete(value) and _concrete(limit):
            return bool(value >= limit)
        return self._never_negative(value - limit, lambda: value >= limit)

    def equal(self, value: Any, other: Any) -> bool:
        """value == other for every value of the symbols."""
        if _concrete(value) and _concrete(other):
            return bool(value == other)
        return bool(statically_known_true(value == other))

    def bounds(self, value: Any) -> Ends:
        """Lower and upper bound of a size, None where there is none, with the declared bounds applied."""
        if _concrete(value):
            return int(value), int(value)
        ends = self._linear_ends(value, declared=True)
        if ends is None:
            ranges = self._ranges(value, declared=True)
            return read_bound(ranges.lower), read_bound(ranges.upper)
        low, high = ends
        return _read_end(low), _read_end(high)

    def _never_negative(self, slack: Any, claim: Callable[[], Any]) -> bool:
        """slack >= 0, or the claim that says the same: each is proven where the other is not."""
        if _concrete(slack):
            return bool(slack >= 0)
        key = id(slack.node.shape_env), slack.node.expr
        if key not in self._proofs:
            self._proofs[key] = self._prove(slack, claim)
        proof = self._proofs[key]
        self.used_declared = self.used_declared or proof == "declared"
        return proof != "none"

    def _prove(self, slack: torch.SymInt, claim: Callable[[], Any]) -> str:
        if self._is_never_negative(slack, declared=False) or statically_known_true(claim()):
            return "known"
        if self.declared and self._is_never_negative(slack, declared=True):
            return "declared"
        return "none"

    def _is_never_negative(self, slack: torch.SymInt, declared: bool) -> bool:
        ends = self._linear_ends(slack, declared)
        if ends is None:
            return bool(self._ranges(slack, declared).lower >= 0)
        return ends[0] is not None and ends[0] >= 0

    def _linear_ends(self, value: torch.SymInt, declared: bool) -> Ends | None:
        """What ``_ranges`` says of a sum of symbols and numbers, without what it takes in sympy: 0.5 ms, and most sizes are
        such sums. None where the size is something else."""
        form = _linear_form(value.node.expr)
        if form is None or (declared and not all(isinstance(known, sympy.Symbol) for known in self._stand_ins)):
            return None
        low: int | None
        high: int | None
        low = high = form[0]
        for symbol, factor in form[1]:
            least, most = self._ends_of(symbol, value.node.shape_env, declared)
            if factor < 0:
                least, most = most, least
            low = None if low is None or least is None else low + factor * least
            high = None if high is None or most is None else high + factor * most
        return low, high

    def _ends_of(self, symbol: sympy.Symbol, env: Any, declared: bool) -> Ends:
        if declared and symbol in self._stand_ins:
            _, known = self._stand_ins[symbol]
        else:
            known = env.var_to_range.get(symbol, _NATURAL)
        return _end(known.lower), _end(known.upper)

    def _ranges(self, value: torch.SymInt, declared: bool) -> ValueRanges[sympy.Expr]:
        env, expr = value.node.shape_env, value.node.expr
        ranges: dict[sympy.Symbol, ValueRanges[sympy.Expr]] = {}
        if declared:
            for known_expr, (stand_in, bounds) in self._stand_ins.items():
                expr = expr.subs(known_expr, stand_in)
                ranges[stand_in] = bounds
        for symbol in expr.free_symbols - ranges.keys():
            ranges[symbol] = env.var_to_range.get(symbol, _NATURAL)
        if expr.is_Symbol:
            return ranges[expr]
        return bound_sympy(expr, {s: r for s, r in ranges.items() if s in expr.free_symbols})


_NATURAL = value_range(0, None)  # of a symbol of which nothing is known: sizes are never negative


def _concrete(value: Any) -> bool:
    return not isinstance(value, torch.SymInt)


def _end(bound: Any) -> int | None:
    return int(bound) if isinstance(bound, sympy.Integer) else None


def _read_end(end: int | None) -> int | None:
    return None if end is None else read_bound(sympy.Integer(end))


@functools.lru_cache(maxsize=1024)
def _linear_form(expr: sympy.Expr) -> tuple[int, tuple[tuple[sympy.Symbol, int], ...]] | None:
    """A number and the symbols that are added to it, each with its whole factor; None of another expression."""
    number, terms = 0, []
    for term in sympy.Add.make_args(expr):
        factor, symbol = term.as_coeff_Mul()
        if not isinstance(factor, sympy.Integer):
            return None
        if symbol is sympy.S.One:
            number += int(factor)
        elif isinstance(symbol, sympy.Symbol):
            terms.append((symbol, int(factor)))
        else:
            return None
    return number, tuple(terms)
