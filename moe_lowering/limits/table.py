"""Loading, validating and checking the limit tables."""

from __future__ import annotations

import dataclasses
import functools
import string
import sys
from bisect import bisect_left
from collections.abc import Mapping
from importlib import resources
from typing import Any

from moe_lowering.deployment import SOCS
from moe_lowering.limits.coverage import Absent, gaps, read_absent
from moe_lowering.limits.expressions import Expression
from moe_lowering.limits.prover import Prover
from moe_lowering.limits.versions import Constraint, applies, in_words, subject

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

BOUNDS = ("min", "max", "multiple_of", "one_of", "equals")
EXPRESSIONS = ("value", "when", "min", "max", "multiple_of", "equals")
# What texts may show beside the quantities: the value; of rules for certain versions, what has them (``versions.subject``);
# for bounds on the HCCL window, HCCL_BUFFSIZE and what is enough.
SHOWN = frozenset({"value", "version", "buffer_mb", "needed_mb"})
MOST_BUFFER_MB = 65535  # HCCL_BUFFSIZE must fit 16 bits (vllm-ascend 182b75ea, tiling of dispatch_ffn_combine)
UNBOUNDED, TOO_MANY = (
    "unboundedly many",
    f"more than {MOST_BUFFER_MB}",
)  # what needed_mb shows where no setting is enough
# What a bound on the HCCL window advises instead of its own advice, which names a setting.
NO_SETTING = {
    UNBOUNDED: "T has no upper bound, so no HCCL_BUFFSIZE is enough: declare Deployment.max_tokens, or the range of T "
    "with mark_dynamic(..., min=..., max=...)",
    TOO_MANY: f"HCCL_BUFFSIZE is {MOST_BUFFER_MB} MB at most: lower T (Deployment.max_tokens, or max of mark_dynamic)",
}


class LimitsError(ValueError):
    """A limit table is malformed: the file, the row and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """One rule of one operator.

    ``value`` is an expression over the operator's quantities; exactly one of ``min``/``max`` (either or both),
    ``multiple_of``, ``one_of``, ``equals`` bounds it. Bounds may be expressions too. ``when`` restricts the rule to
    calls for which it is true (it may read only quantities that are never symbolic), ``versions`` to versions of CANN,
    torch_npu or a provider (``["cann<8.5"]``, all of them; a version that is not known does not restrict). ``says`` puts
    a broken rule in words, ``advice`` what the user could change; both may hold quantities in braces, and those of
    ``SHOWN``. Without ``says`` the message is made from the value and the bound. A table may give a list of operators:
    one rule for each then. A row whose value is ``soc`` says where the operator exists: its other rows count only there.
    """

    code: str
    operator: str
    value: Expression
    source: str
    soc: tuple[str, ...] = SOCS
    versions: tuple[Constraint, ...] = ()
    when: Expression | None = None
    min: Expression | None = None
    max: Expression | None = None
    multiple_of: Expression | None = None
    one_of: tuple[Any, ...] = ()
    equals: Expression | None = None
    unit: str = ""
    says: str = ""
    advice: str = ""

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The quantities that this rule reads."""
        expressions = (getattr(self, field) for field in EXPRESSIONS)
        shown = _braced(self.says) | _braced(self.advice)
        return (shown - SHOWN).union(*(e.names for e in expressions if e is not None))

    @property
    def bounds_buffer(self) -> bool:
        """Whether the rule asks for room in the HCCL window."""
        return self.max is not None and "buffer_bytes" in self.max.names

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
            if isinstance(value, (str, bool, int)):  # the type counts: True is not 1
                return any(type(v) is type(value) and v == value for v in self.one_of)
            return any(prover.equal(value, v) for v in self.one_of)
        if self.multiple_of is not None:
            return prover.equal(value % self.multiple_of(quantities), 0)
        if self.equals is not None:
            return prover.equal(value, self.equals(quantities))
        return (self.min is None or prover.at_least(value, self.min(quantities))) and (
            self.max is None or prover.at_most(value, self.max(quantities))
        )


@dataclasses.dataclass(frozen=True)
class Violation:
    """Why something is not legal: a stable code, the rule, the actual value, and what would be accepted.

    ``versions`` names what the rule is about certain versions of (``Limit.versions``).
    """

    code: str
    operator: str
    value: str
    limit: str
    source: str
    message: str
    advice: str = ""
    versions: tuple[str, ...] = ()

    def to_json(self) -> dict[str, str]:
        """What a reader is told."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "versions"}

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}"


def _braced(text: str) -> frozenset[str]:
    """The names that stand in braces."""
    return frozenset(name for _, name, _, _ in string.Formatter().parse(text) if name)


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
    bounds = {"min/max" if b in ("min", "max") else b for b in BOUNDS if raw.get(b) not in (None, [])}
    if len(bounds) != 1:
        found = " and ".join(sorted(bounds)) or "no bound"
        raise LimitsError(f"{where}: {found}; give one of {', '.join(BOUNDS)} (min and max may stand together)")
    if set(raw.get("soc", ())) - set(SOCS):
        raise LimitsError(f"{where}: soc is {raw['soc']}; accepted: {', '.join(SOCS)}")
    fields: dict[str, Any] = dict(raw)
    try:
        fields.update((key, Expression(str(fields[key]))) for key in EXPRESSIONS if key in fields)
        fields["versions"] = tuple(Constraint.parse(text) for text in fields.get("versions", ()))
    except ValueError as error:
        raise LimitsError(f"{where}: {error}") from None
    fields["one_of"] = tuple(fields.get("one_of", ()))
    fields["soc"] = tuple(fields.get("soc", SOCS))
    row = Limit(**fields)
    sizes = (_braced(row.says) | _braced(row.advice)) & {"buffer_mb", "needed_mb"}
    if sizes and not row.bounds_buffer:
        raise LimitsError(f"{where}: {sorted(sizes)} is shown, but max does not read buffer_bytes")
    if "version" in _braced(row.says) | _braced(row.advice) and not row.versions:
        raise LimitsError(f"{where}: version is shown, but the rule is not for certain versions")
    return row


def _entries(name: str, text: str) -> list[Absent]:
    try:
        return read_absent(name, tomllib.loads(text).get("absent", ()), SOCS)
    except ValueError as error:
        raise LimitsError(str(error)) from None


def read(name: str, text: str) -> list[Limit]:
    """The rows of one table.

    Raises:
        LimitsError: when a row is malformed; the message names the table, the row and what is wrong.
    """
    rows = []
    for number, raw in enumerate(tomllib.loads(text).get("limit", ()), 1):
        operators = raw.get("operator")
        for operator in operators if isinstance(operators, list) else [operators]:
            rows.append(_row({**raw, "operator": operator}, f"{name}, limit {number} ({raw.get('code', '?')})"))
    return rows


def narrow(rows: list[Limit]) -> list[Limit]:
    """The rows, those of an operator only for SoCs that its row on ``soc`` accepts: where it does not exist, nothing else counts.

    Raises:
        LimitsError: when a row is left without a SoC.
    """
    exists, narrowed = _exists(rows), []
    for row in rows:
        soc = tuple(s for s in row.soc if row.value.text == "soc" or s in exists.get(row.operator, SOCS))
        if not soc:
            raise LimitsError(f"{row.code} of {row.operator} is for {row.soc}, where the operator does not exist")
        narrowed.append(dataclasses.replace(row, soc=soc))
    return narrowed


def _exists(rows: list[Limit]) -> dict[str, tuple[str, ...]]:
    """The SoCs on which each operator exists, of those that a row says it of."""
    return {
        row.operator: row.one_of
        for row in rows
        if row.value.text == "soc" and row.one_of and row.when is None and not row.versions
    }


def validate(rows: list[Limit]) -> tuple[Limit, ...]:
    """The rows, when no two of one operator and SoC share code, condition and versions.

    Raises:
        LimitsError: otherwise.
    """
    seen: set[tuple[object, ...]] = set()
    for row in rows:
        for soc in row.soc:
            key = (row.operator, soc, row.code, row.when.text if row.when else "", row.versions)
            if key in seen:
                raise LimitsError(f"code {row.code} of {row.operator} stands twice for {soc} under one condition")
            seen.add(key)
    return tuple(rows)


@functools.lru_cache(maxsize=1)
def load() -> tuple[Limit, ...]:
    """All rows of all tables, validated.

    Raises:
        LimitsError: when a row is malformed, two rows of one operator and SoC share both code and condition, or a rule has
            neither a row nor an ``[[absent]]`` entry on a SoC where its operator exists (``coverage``).
    """
    rows: list[Limit] = []
    absent: list[Absent] = []
    for file in sorted(resources.files("moe_lowering.limits").joinpath("data").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            rows += read(file.name, text := file.read_text("utf-8"))
            absent += _entries(file.name, text)
    narrowed = narrow(rows)
    if found := gaps(narrowed, absent, _exists(rows), SOCS):
        raise LimitsError("; ".join(found))
    return validate(narrowed)


Versions = tuple[tuple[str, str], ...]  # (name, version), hashable


def _frozen(versions: Mapping[str, str] | None) -> Versions:
    return tuple(sorted(versions.items())) if versions else ()


def limits_for(operator: str, soc: str, versions: Mapping[str, str] | None = None) -> tuple[Limit, ...]:
    """The rows of one operator on one SoC that apply to these versions; to all of them without ``versions``."""
    return _limits_for(operator, soc, _frozen(versions))


@functools.lru_cache(maxsize=1024)
def _limits_for(operator: str, soc: str, versions: Versions) -> tuple[Limit, ...]:
    known = dict(versions)
    return tuple(row for row in load() if row.operator == operator and soc in row.soc and applies(row.versions, known))


@functools.lru_cache(maxsize=256)
def names(operator: str, soc: str) -> frozenset[str]:
    """The quantities that the rows of one operator on one SoC read: what a caller of ``check`` should give."""
    return frozenset().union(*(row.names for row in limits_for(operator, soc))) - {"soc"}


def check(
    operator: str,
    soc: str,
    quantities: Mapping[str, Any],
    prover: Prover | None = None,
    versions: Mapping[str, str] | None = None,
) -> list[Violation]:
    """Every rule of ``operator`` on ``soc`` that these quantities break, in table order.

    Args:
        operator: the operator's name, e.g. ``npu_moe_distribute_dispatch_v2``.
        soc: ``A2``, ``A3``, ``A5`` or ``310P``; rules read it as the quantity ``soc``.
        quantities: values by name; sizes may be SymInts. A rule that reads a quantity which is not given, or is None,
            does not apply.
        prover: proves limits on symbolic sizes; the default knows only what the ShapeEnv knows.
        versions: by name (``versions.NAMES``), as ``Deployment.versions`` gives them. Rules for certain versions apply
            also when the version is not known.
    """
    prover = prover or Prover()
    given = {name: value for name, value in quantities.items() if value is not None}
    given["soc"] = soc
    rows = _applicable(operator, soc, _frozen(versions), frozenset(given))
    return [v for row in rows if (v := _violation(row, given, prover, versions))]


@functools.lru_cache(maxsize=4096)
def _applicable(operator: str, soc: str, versions: Versions, given: frozenset[str]) -> tuple[Limit, ...]:
    """The rows that read nothing but what is given."""
    return tuple(row for row in _limits_for(operator, soc, versions) if row.names <= given)


def _violation(
    row: Limit, quantities: Mapping[str, Any], prover: Prover, versions: Mapping[str, str] | None
) -> Violation | None:
    if row.when is not None and not row.when(quantities):
        return None
    value = row.value(quantities)
    if row.holds(value, quantities, prover):
        return None
    accepted = row.accepted(quantities)
    sizes = _buffer_sizes(row, value, quantities, prover) if row.bounds_buffer else {}
    shown = {**quantities, "value": value, "version": subject(row.versions, versions or {}), **sizes}
    only, declare = in_words(row.versions, versions or {})
    advice = NO_SETTING.get(sizes.get("needed_mb", "")) or row.advice.format_map(shown)
    return Violation(
        code=row.code,
        operator=row.operator,
        value=str(value),
        limit=accepted,
        source=row.source,
        message=_message(row, value, accepted, shown) + only,
        advice="; ".join(filter(None, (advice, declare))),
        versions=tuple(constraint.name for constraint in row.versions),
    )


def _message(row: Limit, value: Any, accepted: str, shown: Mapping[str, Any]) -> str:
    if row.says:
        return f"{row.operator}: {row.says.format_map(shown)}"
    text = row.value.text
    what = f"{text} is {value}" if text in shown else f"value is {value} ({text})"
    return f"{row.operator}: {what}; accepted: {accepted}"


def _buffer_sizes(row: Limit, value: Any, quantities: Mapping[str, Any], prover: Prover) -> dict[str, str]:
    """HCCL_BUFFSIZE as it is, and the smallest that is enough for every value of the symbols, in MB; or in words, none."""
    needed = needed_buffer_mb(row, prover.bounds(value)[1], quantities)
    words = UNBOUNDED if needed is None else TOO_MANY if needed > MOST_BUFFER_MB else str(needed)
    return {"buffer_mb": f"{quantities['buffer_bytes'] / 2**20:g}", "needed_mb": words}


def needed_buffer_mb(row: Limit, most: int | None, quantities: Mapping[str, Any]) -> int | None:
    """The smallest HCCL_BUFFSIZE in MB for which a rule on the window (``Limit.bounds_buffer``) accepts ``most`` bytes.

    ``MOST_BUFFER_MB + 1`` when none does, None when ``most`` is None (no bound).
    """
    if most is None:
        return None
    assert row.max is not None
    bound = row.max
    return 1 + bisect_left(
        range(1, MOST_BUFFER_MB + 1), True, key=lambda mb: bound({**quantities, "buffer_bytes": mb * 2**20}) >= most
    )
