"""``TokenRange`` and other bounds of sizes, and their conversion. "No bound" is None throughout the package.

A ``ShapeEnv`` has infinity or a number near ``sys.maxsize`` for it, an operator's int argument ``sys.maxsize``, JSON null. The 0
of a user's argument (``Deployment.max_tokens``, ``max_rows``) is another thing: it says that nothing was declared.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import sympy
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges


@dataclasses.dataclass(frozen=True)
class TokenRange:
    """``low <= T <= high``; ``high`` is None when there is no bound."""

    low: int
    high: int | None

    def __contains__(self, tokens: int) -> bool:
        return self.low <= tokens and (self.high is None or tokens <= self.high)

    def at_most(self, high: int | None) -> TokenRange:
        """The part up to ``high``, which may be empty (low > high)."""
        return TokenRange(self.low, least(self.high, high))

    @property
    def empty(self) -> bool:
        return self.high is not None and self.low > self.high

    def __str__(self) -> str:
        return f"T >= {self.low}" if self.high is None else f"{self.low} <= T <= {self.high}"


def least(a: int | None, b: int | None) -> int | None:
    """The smaller of two upper bounds."""
    return b if a is None else a if b is None else min(a, b)


def read_bound(bound: Any) -> int | None:
    """A bound of a ShapeEnv."""
    return int(bound) if isinstance(bound, sympy.Integer) and abs(int(bound)) < sys.maxsize // 2 else None


def value_range(low: int, high: int | None) -> ValueRanges[sympy.Expr]:
    """A range as a ShapeEnv has it."""
    return ValueRanges(sympy.Integer(low), int_oo if high is None else sympy.Integer(high))


def as_argument(high: int | None) -> int:
    """An upper bound as an operator's int argument."""
    return sys.maxsize if high is None else high
