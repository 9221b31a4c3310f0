"""``check``: the rules of an operator that some quantities break, each as a ``Violation``.

The pass judges by it, and so do the verifier and the simulator's kernels. A ``Violation`` holds numbers and expressions; its
message, advice and source are put into words when they are read (``wording``). No guard is added.
"""

from __future__ import annotations

import dataclasses
import functools
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from moe_lowering.limits.bounds import TokenRange
from moe_lowering.limits.prover import Prover
from moe_lowering.limits.row import Limit
from moe_lowering.limits.sources import Citation, render_citations
from moe_lowering.limits.table import Versions, freeze_versions, limits_of
from moe_lowering.limits.versions import describe_versions, name_subject
from moe_lowering.limits.wording import (
    Accepted,
    Names,
    Value,
    Wording,
    as_value,
    names_in,
    pick_values,
    show_word,
    to_json,
)
from moe_lowering.vocabulary import MOST_BUFFER_MB


@dataclasses.dataclass(frozen=True)
class BufferNeed:
    """HCCL_BUFFSIZE where a rule wants more of it: as it is, and the smallest that is enough for every value of the symbols.

    ``needed_mb`` is None when there is no bound, and more than ``MOST_BUFFER_MB`` when no setting is enough.
    """

    buffer_mb: int | float
    needed_mb: int | None

    @property
    def words(self) -> str:
        """``needed_mb`` in words."""
        if self.needed_mb is None:
            return "unboundedly many"
        return f"more than {MOST_BUFFER_MB}" if self.needed_mb > MOST_BUFFER_MB else str(self.needed_mb)

    @property
    def instead(self) -> str:
        """What to do where no setting is enough, so that a rule's own advice, which names one, is none; else ""."""
        if self.needed_mb is None:
            return (
                "T has no upper bound, so no HCCL_BUFFSIZE is enough: declare Deployment.max_tokens, or the range of T "
                "with mark_dynamic(..., min=..., max=...)"
            )
        if self.needed_mb > MOST_BUFFER_MB:
            return (
                f"HCCL_BUFFSIZE is {MOST_BUFFER_MB} MB at most: lower T (Deployment.max_tokens, or max of mark_dynamic)"
            )
        return ""


@dataclasses.dataclass(frozen=True)
class Violation:
    """Why something is not legal: numbers and expressions; ``message``, ``advice`` and ``source`` put them in words.

    Attributes:
        code: stable.
        operator: which one refuses, or the implementation or ``deployment``.
        quantity: what was looked at: a quantity, or an expression over some, as the table has it.
        value: its value; of symbolic sizes an expression in the ShapeEnv's symbols.
        limit: what would be accepted.
        sources: where the rule comes from.
        says, advises: the rule's own words, with quantities in braces, and ``shown``, their values.
        note: for which versions the rule is; undeclared: which of them to declare. Both may be "".
        versions: names of what the rule is about certain versions of (``Limit.versions``).
        buffer: of a rule on the HCCL window, how much would be enough.
        declared: the range of T that the deployment declares, where the value depends on it.
        names: the user's names of the symbols.
    """

    code: str
    operator: str
    quantity: str
    value: Value
    limit: Accepted
    sources: tuple[Citation, ...] = ()
    says: str = ""
    advises: str = ""
    shown: tuple[tuple[str, Value], ...] = ()
    note: str = ""
    undeclared: str = ""
    versions: tuple[str, ...] = ()
    buffer: BufferNeed | None = None
    declared: TokenRange | None = None
    names: Names = ()

    def named(self, names: Names) -> Violation:
        """The same with the user's names, as far as they concern it."""
        read_names = names_in(names, self.value, *self.limit.values, *(value for _, value in self.shown))
        return dataclasses.replace(self, names=read_names) if read_names else self

    @property
    def source(self) -> str:
        """Where the rule comes from, in one line."""
        return render_citations(self.sources)

    @property
    def fault(self) -> str:
        """What is wrong, without the name of the operator that refuses it."""
        if self.says:
            text = self._fill(self.says)
        else:
            value, is_argument = self.show(), self.quantity.isidentifier()
            what = f"{self.quantity} is {value}" if is_argument else f"value is {value} ({self.quantity})"
            text = f"{what}; accepted: {self.limit.say(self.names)}"
        declared = "" if self.declared is None else f"; the deployment declares {self.declared}"
        return text + self.note + declared

    @property
    def message(self) -> str:
        """The operator that refuses, and what is wrong."""
        return f"{self.operator}: {self.fault}"

    @property
    def advice(self) -> str:
        """What to change."""
        instead = "" if self.buffer is None else self.buffer.instead
        return "; ".join(filter(None, (instead or self._fill(self.advises), self.undeclared)))

    @property
    def tells_limit(self) -> bool:
        """Whether the rule's own words say both the value and what is accepted: of the HCCL window in MB."""
        if self.buffer is not None and isinstance(self.value, int):
            return "{needed_mb}" in self.says
        bounds = (self.limit.min, self.limit.max, self.limit.multiple_of, self.limit.equals)
        names = [self.quantity, *(bound.expression for bound in bounds if bound is not None)]
        return len(names) > 1 and all(f"{{{name}}}" in self.says for name in names)

    def show(self) -> str:
        """The value as text."""
        return show_word(self.value, self.names)

    def _fill(self, template: str) -> str:
        shown = self.shown
        if self.buffer is not None:
            shown += (("buffer_mb", f"{self.buffer.buffer_mb:g}"), ("needed_mb", self.buffer.words))
        return Wording(template, (*shown, ("value", self.value))).say(self.names)

    def to_json(self) -> dict[str, Any]:
        """Numbers as numbers, expressions as text in the user's names; and the same in sentences."""
        fields: dict[str, Any] = {
            "code": self.code,
            "operator": self.operator,
            "quantity": self.quantity,
            "value": to_json(self.value, self.names),
            "limit": self.limit.to_json(self.names),
            "accepted": self.limit.say(self.names),
            "source": self.source,
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "message": self.message,
            "advice": self.advice,
        }
        return fields if self.buffer is None else {**fields, "buffer": dataclasses.asdict(self.buffer)}

    def say(self, names: Names = ()) -> str:
        """Code and message."""
        named = self.named(names) if names else self
        return f"[{named.code}] {named.message}"

    def __str__(self) -> str:
        return self.say()


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
    rules, key = _rules(operator, soc, freeze_versions(versions)), _plain_key(quantities)
    broken = None if key is None else rules.known.get(key)
    if broken is None:
        broken = rules.broken(quantities, prover or Prover())
        if key is not None and len(rules.known) < _MOST_KNOWN:
            rules.known[key] = broken
    return [*broken]


_MOST_KNOWN = 1024  # per operator; about 1 KB each
_PLAIN = frozenset({int, bool, str, type(None)})


def _plain_key(quantities: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """All that rules see of quantities that are plain values, types too: 1 is not True. None where one of them is not plain, such
    as a symbolic size: what is proven of that depends on the ShapeEnv."""
    kinds = (*map(type, quantities.values()),)
    return (*quantities, *quantities.values(), kinds) if _PLAIN.issuperset(kinds) else None


class _Rules:
    """The rows of an operator for one SoC and certain versions, and what they said of quantities so far: kernels and blocks ask
    the same again and again, and a row costs about 0.6 us."""

    def __init__(self, operator: str, soc: str, versions: Versions) -> None:
        self._rows, self._soc, self._versions = limits_of(operator, soc, versions), soc, dict(versions)
        self._applicable: dict[frozenset[str], tuple[Limit, ...]] = {}
        self.known: dict[tuple[Any, ...], tuple[Violation, ...]] = {}

    def broken(self, quantities: Mapping[str, Any], prover: Prover) -> tuple[Violation, ...]:
        """Every row that these quantities break; a row counts that reads only what is given."""
        known = {name: value for name, value in quantities.items() if value is not None}
        known["soc"] = self._soc
        names = frozenset(known)
        rows = self._applicable.get(names)
        if rows is None:
            rows = self._applicable[names] = tuple(row for row in self._rows if row.names <= names)
        return tuple([v for row in rows if (v := _violation(row, known, prover, self._versions))])


@functools.lru_cache(maxsize=1024)
def _rules(operator: str, soc: str, versions: Versions) -> _Rules:
    return _Rules(operator, soc, versions)


def _violation(
    row: Limit, quantities: Mapping[str, Any], prover: Prover, versions: Mapping[str, str] | None
) -> Violation | None:
    if row.when is not None and not row.when(quantities):
        return None
    value = row.value(quantities)
    if row.holds(value, quantities, prover):
        return None
    note, undeclared = describe_versions(row.versions, versions or {})
    buffer = None
    if row.bounds_buffer:
        needed = needed_buffer_mb(row, prover.bounds(value)[1], quantities)
        buffer = BufferNeed(quantities["buffer_bytes"] / 2**20, needed)
    return Violation(
        code=row.code,
        operator=row.operator,
        quantity=row.value.text,
        value=as_value(value),
        limit=row.accepted(quantities),
        sources=row.sources,
        says=row.says,
        advises=row.advice,
        shown=pick_values(row.shown, quantities) + _about(row, versions or {}),
        note=note,
        undeclared=undeclared,
        versions=tuple(constraint.name for constraint in row.versions),
        buffer=buffer,
    )


def _about(row: Limit, versions: Mapping[str, str]) -> tuple[tuple[str, Value], ...]:
    """What a rule for certain versions may show of them."""
    return (("version", name_subject(row.versions, versions)),) if row.versions else ()


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
