"""Twins of a limit row, made from the tables: two assignments that differ in one value, one legal, one that breaks the row.

The illegal twin breaks that row and no other of its operator, the legal one breaks none. Only the quantities that the row
reads are given. A search: candidates for each quantity come from the constants of the tables, quantities are assigned one
by one, and what no later choice can mend is cut off; the last one is the value that differs. Where it is a number, the two
are moved together until the legal twin stands at the bound.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from moe_lowering.limits import Limit, Prover, limits_for, load
from moe_lowering.vocabulary import SOCS

SIZES = (8, 1, 2, 4, 16, 64, 512, 1024, 4096, 0, 3, -1)
LARGE = tuple(s * 2**k for k in range(13, 45) for s in (1, -1))
LEAVES = 300  # assignments of the other quantities that are tried for each one that may differ
PROVER = Prover()


@dataclasses.dataclass(frozen=True)
class Twins:
    """Two assignments for one row, on one SoC each; ``differs`` names what distinguishes them."""

    differs: str
    side: str
    legal: dict[str, Any]
    illegal: dict[str, Any]
    legal_soc: str
    illegal_soc: str
    versions: dict[str, str]


def sides(row: Limit) -> tuple[str, ...]:
    """The ways to break a row: below its minimum, above its maximum, or just otherwise."""
    found = tuple(side for side, bound in (("below", row.min), ("above", row.max)) if bound is not None)
    return found or ("other",)


def find(row: Limit, soc: str, side: str) -> Twins | None:
    """Twins of a row on one SoC that break it on one side; None when the search finds none."""
    for versions in inside(row, soc):
        if "soc" in row.value.names:
            found = _across_socs(row, soc, versions)
        elif not row.names:
            found = Twins("version", side, {}, {}, soc, soc, versions)  # the row forbids a version as such
        else:
            found = _Search(row, soc, side, versions).run()
        if found is not None:
            return found
    return None


# -------------------------------------------------------------------------------------------------------------- versions


def inside(row: Limit, soc: str) -> Iterator[dict[str, str]]:
    """Versions to which the row applies, those first to which few other rows for certain versions apply."""
    names = {c.name for s in SOCS for other in limits_for(row.operator, s) for c in other.versions}
    numbers = {name: _numbers(row.operator, name) for name in sorted(names)}
    choices = [dict(zip(numbers, values, strict=True)) for values in itertools.product(*numbers.values())]
    fitting = [c for c in choices if row in limits_for(row.operator, soc, c)]
    return iter(sorted(fitting, key=lambda c: sum(len(limits_for(row.operator, s, c)) for s in SOCS)))


def outside(row: Limit, versions: dict[str, str]) -> Iterator[dict[str, str]]:
    """The same versions but for one, which the row excludes."""
    for constraint in row.versions:
        for number in (*_around(constraint.number), "9999"):
            if constraint.excludes(number):
                yield {**versions, constraint.name: number}
                break


@functools.lru_cache(maxsize=1024)
def _numbers(operator: str, name: str) -> tuple[str, ...]:
    constraints = [c for soc in SOCS for row in limits_for(operator, soc) for c in row.versions if c.name == name]
    return ("9999", *dict.fromkeys(number for c in constraints for number in _around(c.number)))


def _around(number: tuple[int, ...]) -> tuple[str, str]:
    """A version just below a number, and the number."""
    last = max(i for i, part in enumerate(number) if part)
    below = (*number[:last], number[last] - 1)
    return ".".join(map(str, below)), ".".join(map(str, number))


# ------------------------------------------------------------------------------------------------------------ candidates


@functools.cache
def candidates(operator: str, soc: str, name: str) -> tuple[Any, ...]:
    """Values of one quantity that the rows of an operator tell apart."""
    rows = [row for row in limits_for(operator, soc) if name in row.names]
    found = dict.fromkeys((type(v), v) for row in rows for v in _constants(row, name))  # True is not 1
    values = [v for _, v in found]
    if any(isinstance(v, bool) for v in values) or name.startswith("has_"):
        return (True, False)
    if any(isinstance(v, str) for v in values):
        return (*values, "something else")
    near = (n + d for n in values for d in (0, 1, -1))
    return tuple(dict.fromkeys((*SIZES, *near)))


def _constants(row: Limit, name: str) -> Iterator[Any]:
    """Constants that a row compares a quantity with."""
    if row.value.text == name:
        yield from row.one_of
        for bound in (row.min, row.max, row.equals, row.multiple_of):
            if bound is not None and not bound.names:
                yield bound({})
        for same in row.equals.names if row.equals is not None else ():
            if same != name:
                yield from (
                    v
                    for other in limits_for(row.operator, row.soc[0])
                    if other.value.text == same
                    for v in other.one_of
                )
    for expression in (row.value, row.when):
        if expression is not None:
            yield from _compared(ast.parse(expression.text, mode="eval"), name)
    if row.when is not None and row.when.text == name:
        yield True


def _compared(tree: ast.AST, name: str) -> Iterator[Any]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node)):
            yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
        elif isinstance(node, (ast.BoolOp, ast.UnaryOp)):
            operands = node.values if isinstance(node, ast.BoolOp) else [node.operand]
            yield from (True for n in operands if isinstance(n, ast.Name) and n.id == name)


# ---------------------------------------------------------------------------------------------------------------- search


class _Search:
    """The search for the twins of one row on one SoC and one side."""

    def __init__(self, row: Limit, soc: str, side: str, versions: dict[str, str]) -> None:
        self.row, self.soc, self.side, self.versions = row, soc, side, versions
        self.names = sorted(row.names - {"soc"})
        given = {*self.names, "soc"}
        self.rows = [r for r in limits_for(row.operator, soc, versions) if r.names <= given]

    def run(self) -> Twins | None:
        for differs in self._order():
            others = [n for n in self.names if n != differs]
            for base in itertools.islice(self._assignments(others, {"soc": self.soc}), LEAVES):
                pair = self._pair(differs, base)
                if pair is not None:
                    legal, illegal = ({**base, differs: value} for value in pair)
                    return Twins(differs, self.side, legal, illegal, self.soc, self.soc, self.versions)
        return None

    def _order(self) -> list[str]:
        """What may differ: first what the rule is about, last its condition."""
        row = self.row
        about = [row.value, row.max, row.min, row.equals, row.multiple_of, row.when]
        return sorted(
            self.names, key=lambda n: next((i for i, e in enumerate(about) if e is not None and n in e.names), 9)
        )

    def _assignments(self, names: list[str], done: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Assignments of ``names`` that no row is broken by, as far as rows can be told without the one that differs."""
        if not names:
            yield done
            return
        name, rest = names[0], names[1:]
        for value in candidates(self.row.operator, self.soc, name):
            chosen = {**done, name: value}
            if self._possible(chosen, name):
                yield from self._assignments(rest, chosen)

    def _possible(self, values: dict[str, Any], last: str) -> bool:
        known = values.keys()
        if any(last in r.names and r.names <= known and broken(r, values) for r in self.rows):
            return False
        when = self.row.when
        return when is None or last not in when.names or not when.names <= known or bool(when(values))

    def _pair(self, differs: str, base: dict[str, Any]) -> tuple[Any, Any] | None:
        """(legal, illegal) value of the quantity that differs."""
        choices = candidates(self.row.operator, self.soc, differs)
        number = all(type(v) is int for v in choices)
        legal, illegal = None, None
        for value in (*choices, *(LARGE if number else ())):
            verdict = self._verdict({**base, differs: value})
            legal = value if legal is None and verdict == "legal" else legal
            illegal = value if illegal is None and verdict == "illegal" else illegal
            if legal is not None and illegal is not None:
                return self._closer(differs, base, legal, illegal) if number else (legal, illegal)
        return None

    def _closer(self, differs: str, base: dict[str, Any], legal: int, illegal: int) -> tuple[int, int]:
        while abs(legal - illegal) > 1:
            middle = (legal + illegal) // 2
            verdict = self._verdict({**base, differs: middle})
            if verdict == "legal":
                legal = middle
            elif verdict == "illegal":
                illegal = middle
            else:
                break
        return legal, illegal

    def _verdict(self, values: dict[str, Any]) -> str:
        """``legal``: no row is broken; ``illegal``: this one is, on the wanted side, and no other; else ``neither``."""
        found = [r for r in self.rows if broken(r, values)]
        if not found:
            return "legal"
        if self.row not in found or {r.code for r in found} != {self.row.code}:
            return "neither"
        return "illegal" if self.side in ("other", _side(self.row, values)) else "neither"


def broken(row: Limit, values: dict[str, Any]) -> bool:
    """Whether an assignment breaks a row; False where a value is of a kind that the row cannot compare."""
    try:
        if row.when is not None and not row.when(values):
            return False
        return not row.holds(row.value(values), values, PROVER)
    except (TypeError, ZeroDivisionError):
        return False


def _side(row: Limit, values: dict[str, Any]) -> str:
    value = row.value(values)
    return "below" if row.min is not None and value < row.min(values) else "above"


def _across_socs(row: Limit, soc: str, versions: dict[str, str]) -> Twins | None:
    """Twins of a row about the SoC itself: the same call on another one."""
    here = not broken(row, {"soc": soc})
    for other in row.soc:
        if broken(row, {"soc": other}) == here:
            legal_soc, illegal_soc = (soc, other) if here else (other, soc)
            return Twins("soc", "other", {}, {}, legal_soc, illegal_soc, versions)
    return None


def rows() -> list[tuple[Limit, str]]:
    """Every row of every table, once for each SoC that it names."""
    return [(row, soc) for row in load() for soc in row.soc]
