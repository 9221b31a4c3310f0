"""A law from measured rows: least squares of relative errors, no figure negative.

Of the figures (fixed_us, slowdown, growth) as many are fitted as rows can tell apart, by trying every choice of them; where the
rows tell less than the law has, its form is kept and scaled.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from moe_lowering.prices.laws import Law, doublings
from moe_lowering.prices.machines import ideal_of
from moe_lowering.prices.rows import Row

LEAST_ERROR = 0.05  # rows that a law goes through say nothing of the next one


def fit_law(rows: Sequence[Row], known: Law, origin: str, least_us: float = 0.0) -> Law:
    """The law of rows that are all of one kind and SoC.

    Args:
        known: the law before: its form where rows cannot tell.
        least_us: what starting costs at least, however large the rows are that say nothing of it.
    """
    points = [(ideal_of(row), doublings(row.ranks), row.us) for row in rows]
    factors = _solve([[known.us(ideal_of(row), row.ranks) / row.us] for row in rows], [1.0] * len(rows))
    assert factors is not None  # what a row took is above 0, and so is the price that the law before gives it
    best = [known.fixed_us * factors[0], known.slowdown * factors[0], known.growth * factors[0]]
    distinct = len({(ideal, steps) for ideal, steps, _ in points})
    if distinct > 1:
        best = _best(points, distinct, least_us) or best
    fixed, slowdown, growth = (round(figure, 6) for figure in best)
    law = Law(fixed, slowdown, growth, LEAST_ERROR, origin, least=0.0)
    return dataclasses.replace(law, error=round(max(LEAST_ERROR, largest_error(law, rows)), 4))


def errors(law: Law, rows: Sequence[Row]) -> list[float]:
    """Of each row: (price - measured) / measured."""
    return [law.us(ideal_of(row), row.ranks) / row.us - 1 for row in rows]


def largest_error(law: Law, rows: Sequence[Row]) -> float:
    """The largest magnitude of ``errors``."""
    return max(abs(error) for error in errors(law, rows))


def _best(points: list[tuple[float, int, float]], distinct: int, least_us: float) -> list[float] | None:
    """The figures with the least squared relative errors, none below its least; as many as rows tell apart."""
    least = [least_us, 0.0, 0.0]
    lines = [[1 / us, ideal / us, ideal * steps / us] for ideal, steps, us in points]
    rest = [1 - least_us / us for *_, us in points]
    best: tuple[float, list[float]] | None = None
    for count in range(1, min(3, distinct) + 1):
        for chosen in itertools.combinations(range(3), count):
            solved = _solve([[line[at] for at in chosen] for line in lines], rest)
            if solved is None or min(solved) < 0:
                continue
            figures = [least[at] + (solved[chosen.index(at)] if at in chosen else 0.0) for at in range(3)]
            squares = sum((sum(a * b for a, b in zip(line, figures, strict=True)) - 1) ** 2 for line in lines)
            if best is None or squares < best[0] - 1e-12:
                best = squares, figures
    return None if best is None else best[1]


def _solve(lines: list[list[float]], right: list[float]) -> list[float] | None:
    """Least squares of ``lines @ x - right``, by normal equations; None where the lines do not determine x."""
    size = len(lines[0])
    matrix = [[sum(line[i] * line[j] for line in lines) for j in range(size)] for i in range(size)]
    whole = [matrix[i][i] for i in range(size)]
    sides = [sum(line[i] * value for line, value in zip(lines, right, strict=True)) for i in range(size)]
    for i in range(size):
        if matrix[i][i] <= 1e-9 * whole[i]:
            return None
        for other in range(size):
            if other != i:
                factor = matrix[other][i] / matrix[i][i]
                matrix[other] = [a - factor * b for a, b in zip(matrix[other], matrix[i], strict=True)]
                sides[other] -= factor * sides[i]
    return [sides[i] / matrix[i][i] for i in range(size)]
