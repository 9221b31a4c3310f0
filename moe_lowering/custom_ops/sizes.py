"""Sizes that may be symbolic: comparisons that add no guard, one that may, and arithmetic on them.

Fake kernels see ``torch.SymInt`` where a leading dimension is dynamic. A mistake is reported when it is certain, for
every value of the symbols; a size that merely might be wrong is left to the CPU kernel. A guard would tie the graph to
the size that it was traced with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether ``condition`` holds for every value of its symbols. Adds no guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def are_certainly_different(left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether two shapes are certain to be different."""
    return len(left) != len(right) or any(is_known(a != b) for a, b in zip(left, right, strict=True))


def unify(left: Sequence[int], right: Sequence[int]) -> None:
    """Require two shapes to be equal, as ``x + y`` does: a guard where sizes have different symbols.

    Without it the token counts of x, ids and weights stay different symbols when a user marks each as dynamic, and
    nothing about one of them can be proven from another.
    """
    for a, b in zip(left, right, strict=True):
        if not is_known(a == b):
            torch._check(a == b, lambda a=a, b=b: f"sizes {a} and {b} must be equal")


def show(shape: Sequence[int]) -> str:
    """A shape as ``[2, 3]``."""
    return "[" + ", ".join(str(size) for size in shape) + "]"


def token_count(shape: Sequence[int]) -> int:
    """T: the product of all dimensions but the last; 1 when there is only one."""
    leading = shape[:-1]
    return leading[0] if len(leading) == 1 else math.prod(leading)  # a product of one symbolic size takes 10 us


def ceil_div(value: int, divisor: int) -> int:
    """``ceil(value / divisor)``; ``value`` may be symbolic."""
    return value if divisor == 1 else (value + divisor - 1) // divisor


def smaller(left: int, right: int) -> int:
    """``min``, without a guard where a size is symbolic."""
    if isinstance(left, int) and isinstance(right, int):
        return min(left, right)
    return torch.sym_min(left, right)
