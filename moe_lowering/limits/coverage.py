"""The check that a limit table covers every SoC, made when the tables load.

Rows name their SoCs, so that a SoC without rows would be one where everything is legal. Hence a code that an operator has on
one SoC must have, on every other one, a row or an entry of ``[[absent]]``, which says why the operator is free of the rule
there; a code with neither is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from moe_lowering.limits.sources import Citation, cite

Key = tuple[str, str]  # operator, code


class Rule(Protocol):
    """What this file reads of a row."""

    @property
    def operator(self) -> str: ...
    @property
    def code(self) -> str: ...
    @property
    def soc(self) -> tuple[str, ...]: ...


@dataclasses.dataclass(frozen=True)
class Absent:
    """One operator has no rule of that code on these SoCs, according to ``sources``; ``where`` it stands in the tables."""

    operator: str
    code: str
    soc: tuple[str, ...]
    sources: tuple[Citation, ...]
    where: str


def read_absent(
    name: str, tables: Sequence[dict[str, Any]], socs: Sequence[str], declared: Mapping[str, Citation]
) -> list[Absent]:
    """The entries of the ``[[absent]]`` tables of a file, which cite documents of ``declared``.

    Raises:
        ValueError: a table is malformed; the message names the file, the table and what is wrong.
    """
    return [entry for at, raw in enumerate(tables, 1) for entry in _read(raw, f"{name}, absent {at}", socs, declared)]


def _read(raw: dict[str, Any], where: str, socs: Sequence[str], declared: Mapping[str, Citation]) -> list[Absent]:
    """The entries of one table.

    Raises:
        ValueError: a key is missing or unknown, or a SoC is, or a document that is cited.
    """
    keys = {"codes", "operators", "soc", "source"}
    if raw.keys() != keys or not all(raw.values()):
        raise ValueError(f"{where}: has {sorted(raw)}; accepted: {sorted(keys)}, none of them empty")
    if unknown := set(raw["soc"]) - set(socs):
        raise ValueError(f"{where}: soc is {sorted(unknown)}; accepted: {', '.join(socs)}")
    try:
        sources = cite(raw["source"], declared)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return [
        Absent(operator, code, tuple(raw["soc"]), sources, where)
        for operator in raw["operators"]
        for code in raw["codes"]
    ]


def gaps(
    rules: Iterable[Rule], absent: Iterable[Absent], exists: dict[str, tuple[str, ...]], socs: Sequence[str]
) -> list[str]:
    """What is wrong, in words; empty when every rule has a row or an entry on every SoC where its operator exists.

    Args:
        exists: the SoCs on which an operator exists; on all of ``socs`` where it is not named.
    """
    have: dict[Key, set[str]] = {}
    for rule in rules:
        have.setdefault((rule.operator, rule.code), set()).update(rule.soc)
    free: dict[Key, set[str]] = {}
    messages = []
    for entry in absent:
        key = entry.operator, entry.code
        covered = set(entry.soc) & set(exists.get(entry.operator, socs))
        if key not in have:
            messages.append(f"{entry.where}: {entry.operator} has no rule {entry.code} on any SoC")
        if both := sorted(covered & have.get(key, set())):
            messages.append(f"{entry.where}: {entry.operator} has a rule {entry.code} on {', '.join(both)}")
        if twice := sorted(covered & free.get(key, set())):
            messages.append(f"{entry.where}: {entry.code} of {entry.operator} stands twice for {', '.join(twice)}")
        free.setdefault(key, set()).update(entry.soc)
    for (operator, code), with_rule in have.items():
        missing = [
            s for s in exists.get(operator, socs) if s not in with_rule and s not in free.get((operator, code), set())
        ]
        if missing:
            messages.append(
                f"{operator} has no rule {code} on {', '.join(missing)}, as it has on {', '.join(sorted(with_rule))}: give it a "
                "row, or say in an [[absent]] entry why it needs none (docs/adding.md, A SoC, step 2: rows)"
            )
    return messages
