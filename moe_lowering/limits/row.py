"""``Limit``, one rule of one operator, and the reading of the rows of a table.

A row names its operator, SoCs, code, expression, what the value must be, sources and advice, and may have a condition and
versions. A row with a key that is missing or unknown is a ``LimitsError`` that names the file, the row and the key.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Mapping
from typing import Any

from moe_lowering.limits.expressions import Expression, expression_of
from moe_lowering.limits.prover import Prover
from moe_lowering.limits.sources import Citation, cite, load_sources, render_citations
from moe_lowering.limits.toml import loads
from moe_lowering.limits.versions import Constraint
from moe_lowering.limits.wording import Accepted, Bound, as_value
from moe_lowering.vocabulary import SOCS

BOUNDS = ("min", "max", "multiple_of", "one_of", "equals")
EXPRESSIONS = ("value", "when", "min", "max", "multiple_of", "equals")
# What texts may show beside the quantities: the value; of rules for certain versions, what has them (``versions.name_subject``);
# for bounds on the HCCL window, HCCL_BUFFSIZE and what is enough.
SHOWN = frozenset({"value", "version", "buffer_mb", "needed_mb"})
NOTHING_HELPS = "nothing helps: "  # how advice begins where no change would make a call legal; the reason follows


class LimitsError(ValueError):
    """A limit table is malformed: the file, the row and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """One rule of one operator.

    ``value`` is an expression over the operator's quantities; exactly one of ``min``/``max`` (either or both),
    ``multiple_of``, ``one_of``, ``equals`` bounds it. Bounds may be expressions too. ``when`` restricts the rule to
    calls for which it is true (it may read only quantities that are never symbolic), ``versions`` to versions of CANN,
    torch_npu or a provider (``["cann<8.5"]``, all of them; a version that is not known does not restrict). ``sources``
    are the documents that a row's ``source`` cites (``limits.sources``). ``advice`` tells what to change, for who chose
    a model and for who wrote the call, or that ``NOTHING_HELPS`` and why; ``says`` puts a broken rule in words. Both
    may hold quantities in braces, and those of ``SHOWN``. Without ``says`` the message is made from the value and the
    bound. A table may give a list of operators: one rule for each then. A row whose value is ``soc`` says where the
    operator exists: its other rows count only there.
    """

    code: str
    operator: str
    value: Expression
    sources: tuple[Citation, ...]
    advice: str
    soc: tuple[str, ...] = tuple(SOCS)
    versions: tuple[Constraint, ...] = ()
    when: Expression | None = None
    min: Expression | None = None
    max: Expression | None = None
    multiple_of: Expression | None = None
    one_of: tuple[Any, ...] = ()
    equals: Expression | None = None
    unit: str = ""
    says: str = ""

    @functools.cached_property
    def source(self) -> str:
        """Where the rule comes from, as text."""
        return render_citations(self.sources)

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The quantities that this rule reads."""
        expressions = (getattr(self, field) for field in EXPRESSIONS)
        return self.shown.union(*(e.names for e in expressions if e is not None))

    @property
    def bounds_buffer(self) -> bool:
        """Whether the rule asks for room in the HCCL window."""
        return self.max is not None and "buffer_bytes" in self.max.names

    @functools.cached_property
    def shown(self) -> frozenset[str]:
        """The quantities that its texts show."""
        return (_names_in_braces(self.says) | _names_in_braces(self.advice)) - SHOWN

    def accepted(self, quantities: Mapping[str, Any]) -> Accepted:
        """The limit, with its value for these quantities."""

        def bound(expression: Expression | None) -> Bound | None:
            return None if expression is None else Bound(as_value(expression(quantities)), expression.text)

        return Accepted(
            bound(self.min), bound(self.max), bound(self.multiple_of), bound(self.equals), self.one_of, self.unit
        )

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


def _names_in_braces(text: str) -> frozenset[str]:
    """The names that stand in braces."""
    return frozenset(name for _, name, _, _ in string.Formatter().parse(text) if name)


def _read_row(raw: dict[str, Any], where: str, declared: Mapping[str, Citation]) -> Limit:
    _check_keys(raw, where)
    fields: dict[str, Any] = dict(raw)
    try:
        fields.update((key, expression_of(str(fields[key]))) for key in EXPRESSIONS if key in fields)
        fields["versions"] = tuple(Constraint.parse(text) for text in fields.get("versions", ()))
        fields["sources"] = cite(fields.pop("source"), declared)
    except ValueError as error:
        raise LimitsError(f"{where}: {error}") from None
    fields["one_of"] = tuple(fields.get("one_of", ()))
    fields["soc"] = tuple(fields.get("soc", SOCS))
    row = Limit(**fields)
    if "version" in _names_in_braces(row.says) | _names_in_braces(row.advice) and not row.versions:
        raise LimitsError(f"{where}: version is shown, but the rule is not for certain versions")
    sizes = (_names_in_braces(row.says) | _names_in_braces(row.advice)) & {"buffer_mb", "needed_mb"}
    if sizes and not row.bounds_buffer:
        raise LimitsError(f"{where}: {sorted(sizes)} is shown, but max does not read buffer_bytes")
    return row


def _check_keys(raw: dict[str, Any], where: str) -> None:
    """Raises unless a row has the keys that it needs and no unknown one.

    Raises:
        LimitsError: otherwise.
    """
    known = {field.name for field in dataclasses.fields(Limit)} - {"sources"} | {"source"}
    if unknown := raw.keys() - known:
        raise LimitsError(f"{where}: unknown key {sorted(unknown)}; known: {sorted(known)}")
    for key in ("code", "operator", "value", "source"):
        if not raw.get(key):
            raise LimitsError(f"{where}: {key} is missing")
    advice = raw.get("advice", "").strip()
    if advice in ("", NOTHING_HELPS.strip(), NOTHING_HELPS.strip(": ")):
        raise LimitsError(f"{where}: advice is {advice!r}; accepted: what to change, or '{NOTHING_HELPS}' and why")
    bounds = {"min/max" if b in ("min", "max") else b for b in BOUNDS if raw.get(b) not in (None, [])}
    if len(bounds) != 1:
        bounds_text = " and ".join(sorted(bounds)) or "no bound"
        raise LimitsError(f"{where}: {bounds_text}; give one of {', '.join(BOUNDS)} (min and max may stand together)")
    if set(raw.get("soc", ())) - set(SOCS):
        raise LimitsError(f"{where}: soc is {raw['soc']}; accepted: {', '.join(SOCS)}")


def read(name: str, text: str, declared: Mapping[str, Citation] | None = None) -> list[Limit]:
    """As ``read_rows``, of the text of a table."""
    return read_rows(name, loads(text), declared)


def read_rows(name: str, table: Mapping[str, Any], declared: Mapping[str, Citation] | None = None) -> list[Limit]:
    """The rows of one table; ``declared`` are the documents that they may cite, by default those of ``sources.toml``.

    Raises:
        LimitsError: when a row is malformed; the message names the table, the row and what is wrong.
    """
    declared = load_sources() if declared is None else declared
    rows = []
    for number, raw in enumerate(table.get("limit", ()), 1):
        operators = raw.get("operator")
        for operator in operators if isinstance(operators, list) else [operators]:
            where = f"{name}, limit {number} ({raw.get('code', '?')})"
            rows.append(_read_row({**raw, "operator": operator}, where, declared))
    return rows
