"""Every row of every limit table, by twins that are generated from the tables: see limit_twins.py.

A row for which no twins can be made fails here. Usually another row breaks with it: then one of the two says nothing
of its own, or reads fewer quantities than it should.
"""

from __future__ import annotations

from collections import Counter

import pytest
from limit_twins import find, outside, rows, sides

from moe_lowering.limits import Limit, check
from moe_lowering.limits.row import read

ROWS = rows()


def _ids() -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for row, soc in ROWS:
        name = f"{row.operator}-{row.code}-{soc}"
        seen[name] += 1
        names.append(f"{name}-{seen[name]}" if seen[name] > 1 else name)
    return names


def codes(row: Limit, soc: str, values: dict[str, object], versions: dict[str, str]) -> list[str]:
    return sorted({v.code for v in check(row.operator, soc, values, versions=versions)})


@pytest.mark.parametrize(("row", "soc"), ROWS, ids=_ids())
def test_twins(row: Limit, soc: str) -> None:
    for side in sides(row):
        twins = find(row, soc, side)
        assert twins is not None, (
            f"{row.code} of {row.operator} on {soc}: no twins ({side}); value {row.value.text!r}, "
            f"when {row.when.text if row.when else None!r}, source {row.source!r}"
        )
        different = {
            n for n in twins.legal if twins.legal[n] != twins.illegal[n] or twins.legal_soc != twins.illegal_soc
        }
        assert different == ({twins.differs} if twins.differs in twins.legal else set())
        assert codes(row, twins.illegal_soc, twins.illegal, twins.versions) == [row.code]
        if twins.differs != "version":
            assert codes(row, twins.legal_soc, twins.legal, twins.versions) == []
        if row.versions:
            assert row.code in codes(row, soc, twins.illegal, {}), "what is not known is taken as the stricter"
            others = list(outside(row, twins.versions))
            assert len(others) == len(row.versions)
            for versions in others:
                assert row.code not in codes(row, soc, twins.illegal, versions)


def test_a_row_that_says_nothing_of_its_own_has_no_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 9 and at most 8 of one thing: the first can never be broken alone."""
    row = '[[limit]]\ncode = "{}"\noperator = "op"\nvalue = "rows"\nmax = {}\nsource = "here.architecture"\nadvice = "x"\n'
    table = read("t.toml", row.format("op.nine", 9) + row.format("op.eight", 8))
    monkeypatch.setattr("limit_twins.limits_for", lambda operator, soc, versions=None: tuple(table))
    assert find(table[0], "A2", "above") is None
    found = find(table[1], "A2", "above")
    assert found is not None
    assert (found.legal["rows"], found.illegal["rows"]) == (8, 9)
