"""The limit tables: ``data/*.toml``, loaded and validated once per process, and the rows for an operator, a SoC and versions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from importlib import resources
from typing import Any

from moe_lowering.limits.coverage import Absent, gaps, read_absent
from moe_lowering.limits.row import Limit, LimitsError, read_rows
from moe_lowering.limits.sources import load_sources
from moe_lowering.limits.toml import loads
from moe_lowering.limits.versions import do_constraints_apply
from moe_lowering.vocabulary import SOCS


def _entries(name: str, table: Mapping[str, Any]) -> list[Absent]:
    try:
        return read_absent(name, table.get("absent", ()), tuple(SOCS), load_sources())
    except ValueError as error:
        raise LimitsError(str(error)) from None


def drop_other_socs(rows: list[Limit]) -> list[Limit]:
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
    keys: set[tuple[object, ...]] = set()
    for row in rows:
        for soc in row.soc:
            key = (row.operator, soc, row.code, row.when.text if row.when else "", row.versions)
            if key in keys:
                raise LimitsError(f"code {row.code} of {row.operator} stands twice for {soc} under one condition")
            keys.add(key)
    return tuple(rows)


@functools.lru_cache(maxsize=1)
def load() -> tuple[Limit, ...]:
    """All rows of all tables, validated.

    Raises:
        LimitsError: when there is no row, one is malformed, two of one operator and SoC share both code and condition, a rule
            has neither a row nor an ``[[absent]]`` entry on a SoC where its operator exists (``coverage``).
    """
    rows: list[Limit] = []
    absent: list[Absent] = []
    for file in sorted(resources.files("moe_lowering.limits").joinpath("data").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            table = loads(file.read_text("utf-8"))
            rows += read_rows(file.name, table)
            absent += _entries(file.name, table)
    if not rows:  # an installation without its data would find everything legal
        raise LimitsError("there are no limit tables in moe_lowering/limits/data; accepted: a complete installation")
    narrowed = drop_other_socs(rows)
    if missing := gaps(narrowed, absent, _exists(rows), tuple(SOCS)):
        raise LimitsError("; ".join(missing))
    return validate(narrowed)


Versions = tuple[tuple[str, str], ...]  # (name, version), hashable


def freeze_versions(versions: Mapping[str, str] | None) -> Versions:
    """Versions by name as something that can be hashed."""
    return tuple(sorted(versions.items())) if versions else ()


def limits_for(operator: str, soc: str, versions: Mapping[str, str] | None = None) -> tuple[Limit, ...]:
    """The rows of one operator on one SoC that apply to these versions; to all of them without ``versions``."""
    return limits_of(operator, soc, freeze_versions(versions))


@functools.lru_cache(maxsize=1024)
def limits_of(operator: str, soc: str, versions: Versions) -> tuple[Limit, ...]:
    """As ``limits_for``, of versions that can be hashed."""
    known = dict(versions)
    return tuple(
        row
        for row in load()
        if row.operator == operator and soc in row.soc and do_constraints_apply(row.versions, known)
    )


@functools.lru_cache(maxsize=256)
def names(operator: str, soc: str) -> frozenset[str]:
    """The quantities that the rows of one operator on one SoC read: what a caller of ``check`` should give."""
    return frozenset().union(*(row.names for row in limits_for(operator, soc))) - {"soc"}
