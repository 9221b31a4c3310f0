"""Sums of symbols and numbers have the ends that torch's interval arithmetic gives them, with and without declared bounds."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest
import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_lowering.limits import Prover, prover
from moe_lowering.limits.bounds import value_range
from moe_lowering.limits.expressions import ceil_div

pytestmark = pytest.mark.fast


def sizes(*ranges: tuple[int, int | None]) -> list[Any]:
    """Symbolic sizes of one ShapeEnv, each known to lie in a range."""
    env, made = ShapeEnv(), []
    for number, bounds in enumerate(ranges):
        symbol, source = sympy.Symbol(f"s{number}", integer=True), ConstantSource(f"s{number}")
        env.var_to_range[symbol], env.var_to_sources[symbol] = value_range(*bounds), [source]
        made.append(env.create_symintnode(symbol, hint=bounds[0] + 1, source=source))
    return made


def answers(size: Any, declared: dict[sympy.Expr, tuple[int, int | None]]) -> list[Any]:
    """All that a prover says of a size: its ends, and whether limits on either side of each hold."""
    known = Prover(declared)
    low, high = known.bounds(size)
    limits = sorted({n + more for n in (low, high, 0) if n is not None for more in (-1, 0, 1)})
    said = [(known.at_least(size, n), known.at_most(size, n)) for n in limits]
    return [low, high, *said, known.used_declared]


@pytest.mark.parametrize("seed", range(20))
def test_ends_of_sums_are_those_of_interval_arithmetic(seed: int) -> None:
    draw = random.Random(seed)
    ranges = [(draw.randrange(9), draw.choice((None, draw.randrange(9, 99), 2**63 - 2))) for _ in range(2)]
    a, b = sizes(*ranges)
    size = draw.choice((1, 1, -3, 7168)) * a + draw.choice((0, 0, 1, -2)) * b + draw.choice((0, 1, -5, 2**40))
    known: list[dict[Any, tuple[int, int | None]]]
    known = [{}, {a.node.expr: (2, 6)}, {a.node.expr: (2, None), b.node.expr: (1, 4)}]
    declared = draw.choice(known)
    with mock.patch.object(prover, "bound_sympy", side_effect=AssertionError):
        quick = answers(size, declared)
    with mock.patch.object(prover, "_linear_form", return_value=None):
        assert quick == answers(size, declared)


@pytest.mark.parametrize(
    "name", ["a product", "a share", "the smaller one", "a product is declared", "twice a size is declared"]
)
def test_other_sizes_are_left_to_interval_arithmetic(name: str) -> None:
    a, b = sizes((2, 8), (3, 5))
    others = {
        "a product": (a * b, {}, (6, 40)),
        "a share": (ceil_div(a, 2), {}, (1, 4)),
        "the smaller one": (torch.sym_min(a, b), {}, (2, 5)),  # type: ignore[no-untyped-call]
        "a product is declared": (a * b + 1, {(a * b).node.expr: (7, 9)}, (8, 10)),
        "twice a size is declared": (2 * a + 1, {(2 * a).node.expr: (5, 7)}, (6, 8)),
    }
    size, declared, ends = others[name]
    assert Prover(declared).bounds(size) == ends
