"""Which smaller T would make a refused implementation legal, and for which T below it that is shown.

Rules need not be monotone in T: one may want a multiple of something, or a least number. So the largest T is looked for by
trying (1, then powers of two, then between the last that is legal and the next that is not), and what is said of the T
below it is proven by the rules on a T of which only the range is known (``limits.prover``).
"""

from __future__ import annotations

from collections.abc import Callable


def most_tokens(is_legal: Callable[[int], bool], least: int, before: int) -> int | None:
    """A T below ``before`` that is legal where T + 1 is not; ``least`` where ``before`` is no more; None where no T that is
    tried is legal."""
    tried = [least]
    while max(2 * tried[-1], tried[-1] + 1) < before:
        tried.append(max(2 * tried[-1], tried[-1] + 1))
    at = next((at for at in reversed(range(len(tried))) if is_legal(tried[at])), None)
    if at is None:
        return None
    low, high = tried[at], tried[at + 1] if at + 1 < len(tried) else before
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_legal(middle) else (low, middle)
    return low


def first_proven(is_proven: Callable[[int, int], bool], least: int, most: int) -> int:
    """The first T from which on all are proven legal up to ``most``, which was tried. A proof for a range is one for each
    range within it."""
    if least >= most or is_proven(least, most):
        return least
    unproven, first = least, most
    while first - unproven > 1:
        middle = (unproven + first) // 2
        unproven, first = (unproven, middle) if is_proven(middle, most) else (middle, first)
    return first


def describe_tokens(first: int, least: int, most: int) -> str:
    """The T that were shown to be legal, in words."""
    if first <= least:
        return f"at most {most}"
    return f"from {first} to {most}" if first < most else f"{most}"
