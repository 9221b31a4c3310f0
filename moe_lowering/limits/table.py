"""Loading, validating and checking the limit tables."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from moe_lowering.deployment import SOCS
from moe_lowering.limits.expressions import Expression
from moe_lowering.limits.prover import Prover

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

BOUNDS = ("min", "max", "multiple_of", "one_of", "equals")


class LimitsError(ValueError):
    """A limit table is malformed: the file, the row and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """One rule of one operator.

    ``value`` is an expression over the operator's quantities; exactly one of ``min``/``max`` (either or both),
    ``multiple_of``, ``one_of``, ``equals`` bounds it. Bounds may be expressions too. ``when`` restricts the rule to calls
    for which it is true (it may read only quantities that are never symbolic).
    """

    code: str
    operator: str
    value: Expression
    source: str
    soc: tuple[str, ...] = SOCS
    when: Expression | None = None
    min: Expression | None = None
    max: Expression | None = None
    multiple_of: Expression | None = None
    one_of: tuple[Any, ...] = ()
    equals: Expression | None = None
    unit: str = ""
    advice: str = ""

    def accepted(self, quantities: Mapping[str, Any]) -> str:
        """The limit in words, with its value for these quantities."""
        unit = f" {self.unit}" if self.unit else ""
        if self.one_of:
            return "one of " + ", ".join(str(v) for v in self.one_of) + unit
        if self.multiple_of is not None:
            return f"a multiple of {_show(self.multiple_of, quantities)}{unit}"
        if self.equals is not None:
            return f"{_show(self.equals, quantities)}{unit}"
        if self.min is not None and self.max is not None:
            return f"{_show(self.min, quantities)} to {_show(self.max, quantities)}{unit}"
        if self.min is not None:
            return f"at least {_show(self.min, quantities)}{unit}"
        assert self.max is not None
        return f"at most {_show(self.max, quantities)}{unit}"

    def holds(self, value: Any, quantities: Mapping[str, Any], prover: Prover) -> bool:
        """Whether the value satisfies the bound for the whole range of its symbols."""
        if self.one_of:
            return any(type(v) is type(value) and prover.equal(value, v) for v in self.one_of) or (
                not isinstance(value, (str, bool)) and any(prover.equal(value, v) for v in self.one_of)
            )
        if self.multiple_of is not None:
            return prover.equal(value % self.multiple_of(quantities), 0)
        if self.equals is not None:
            return prover.equal(value, self.equals(quantities))
        return (self.min is None or prover.at_least(value, self.min(quantities))) and (
            self.max is None or prover.at_most(value, self.max(quantities))
        )


@dataclasses.dataclass(frozen=True)
class Violation:
    """Why something is not legal: a stable code, the rule, the actual value, and what would be accepted."""

    code: str
    operator: str
    value: str
    limit: str
    source: str
    message: str
    advice: str = ""

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}"


def _show(expression: Expression, quantities: Mapping[str, Any]) -> str:
    value = str(expression(quantities))
    return value if value == expression.text else f"{value} ({expression.text})"


def _row(raw: dict[str, Any], where: str) -> Limit:
    known = {f.name for f in dataclasses.fields(Limit)}
    unknown = raw.keys() - known
    if unknown:
        raise LimitsError(f"{where}: unknown key {sorted(unknown)}; known: {sorted(known)}")
    for key in ("code", "operator", "value", "source"):
        if not raw.get(key):
            raise LimitsError(f"{where}: {key} is missing")
    if not any(raw.get(b) not in (None, []) for b in BOUNDS):
        raise LimitsError(f"{where}: no bound; give one of {', '.join(BOUNDS)}")
    if set(raw.get("soc", ())) - set(SOCS):
        raise LimitsError(f"{where}: soc is {raw['soc']}; accepted: {', '.join(SOCS)}")
    fields: dict[str, Any] = dict(raw)
    for key in ("value", "when", "min", "max", "multiple_of", "equals"):
        if key in fields:
            fields[key] = Expression(str(fields[key]))
    fields["one_of"] = tuple(fields.get("one_of", ()))
    fields["soc"] = tuple(fields.get("soc", SOCS))
    return Limit(**fields)


@functools.lru_cache(maxsize=1)
def load() -> tuple[Limit, ...]:
    """All rows of all tables, validated. Codes are unique within an operator and SoC.

    Raises:
        LimitsError: when a row is malformed or two rows of one operator and SoC share a code.
    """
    rows: list[Limit] = []
    seen: set[tuple[str, str, str]] = set()
    for file in sorted(resources.files("moe_lowering.limits").joinpath("data").iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".toml"):
            continue
        for number, raw in enumerate(tomllib.loads(file.read_text("utf-8")).get("limit", ()), 1):
            row = _row(raw, f"{file.name}, limit {number} ({raw.get('code', '?')})")
            for soc in row.soc:
                if (row.operator, soc, row.code) in seen:
                    raise LimitsError(f"{file.name}: code {row.code} of {row.operator} stands twice for {soc}")
                seen.add((row.operator, soc, row.code))
            rows.append(row)
    return tuple(rows)


@functools.lru_cache(maxsize=256)
def limits_for(operator: str, soc: str) -> tuple[Limit, ...]:
    """The rows of one operator on one SoC."""
    return tuple(row for row in load() if row.operator == operator and soc in row.soc)


def check(operator: str, soc: str, quantities: Mapping[str, Any], prover: Prover | None = None) -> list[Violation]:
    """Every rule of ``operator`` on ``soc`` that these quantities break, in table order.

    Args:
        operator: the operator's name, e.g. ``npu_moe_distribute_dispatch_v2``.
        soc: ``A2``, ``A3``, ``A5`` or ``310P``.
        quantities: values by name; sizes may be SymInts. A rule that reads a quantity which is not given, or is None,
            does not apply.
        prover: proves limits on symbolic sizes; the default knows only what the ShapeEnv knows.
    """
    prover = prover or Prover()
    given = {name for name, value in quantities.items() if value is not None}
    return [v for row in limits_for(operator, soc) if (v := _violation(row, given, quantities, prover))]


def _violation(row: Limit, given: Iterable[str], quantities: Mapping[str, Any], prover: Prover) -> Violation | None:
    if not row.value.names <= set(given):
        return None
    if row.when is not None and not (row.when.names <= set(given) and row.when(quantities)):
        return None
    value = row.value(quantities)
    if row.holds(value, quantities, prover):
        return None
    accepted = row.accepted(quantities)
    shown = str(value) if row.value.text in quantities else f"{value} ({row.value.text})"
    return Violation(
        code=row.code,
        operator=row.operator,
        value=str(value),
        limit=accepted,
        source=row.source,
        message=f"{row.operator}: {row.value.text if row.value.text in quantities else 'value'} is {shown}; "
        f"accepted: {accepted}",
        advice=row.advice,
    )
