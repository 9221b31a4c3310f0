"""The limit tables against facts written by hand (fact_tables.py, limit_facts/*.toml): no number here comes from the tables."""

from __future__ import annotations

from collections import Counter

import pytest
from checklists import forgotten
from fact_tables import Case, cases
from limit_mutants import EQUIVALENT, equivalent, mutants

from moe_lowering.limits import Limit, Prover, check, load
from moe_lowering.limits.versions import do_constraints_apply

PROVER = Prover()


def breaks(row: Limit, case: Case) -> bool:
    """Whether a row, by itself, is broken by a case: the check's own rule for one row."""
    given = {**case.given, "soc": case.soc}
    if (
        case.soc not in row.soc
        or not do_constraints_apply(row.versions, case.versions)
        or not row.names <= given.keys()
    ):
        return False
    if row.when is not None and not row.when(given):
        return False
    return not row.holds(row.value(given), given, PROVER)


def by_code() -> dict[tuple[str, str], list[Case]]:
    found: dict[tuple[str, str], list[Case]] = {}
    for case in cases():
        found.setdefault((case.operator, case.code), []).append(case)
    return found


FACTS = by_code()


@pytest.mark.parametrize(("operator", "code"), FACTS, ids=lambda name: name)
def test_facts(operator: str, code: str) -> None:
    """The illegal call has the code, the legal one does not, as the sources say."""
    wrong = [
        f"{case}: {'refused' if case.legal else 'accepted'}"
        for case in FACTS[operator, code]
        if (code in {v.code for v in check(operator, case.soc, case.given, versions=case.versions)}) == case.legal
    ]
    assert wrong == []


def test_every_row_has_a_fact() -> None:
    """For every row, on each SoC and on each side of its bound, some illegal call of a fact breaks that very row."""
    missing = []
    for row in load():
        broken = [case for case in FACTS.get((row.operator, row.code), []) if not case.legal and breaks(row, case)]
        exists = row.one_of if row.value.text == "soc" else ()  # nothing can be illegal there
        for soc in set(row.soc) - set(exists):
            here = [case for case in broken if case.soc == soc]
            sides = {below(row, case) for case in here}
            expected = {True} if row.min is not None else set()
            expected |= {False} if row.max is not None or row.min is None else set()
            if expected - sides:
                missing.append((row.operator, row.code, soc, row.when.text if row.when else "", row.source))
    assert missing == [], forgotten("A limit", "tests/helpers/limit_facts/*.toml", missing)


def test_every_fact_has_a_row() -> None:
    unknown = FACTS.keys() - {(row.operator, row.code) for row in load()}
    assert unknown == set(), forgotten("A limit", "moe_lowering/limits/data/*.toml", unknown)


def below(row: Limit, case: Case) -> bool:
    given = {**case.given, "soc": case.soc}
    return row.min is not None and bool(row.value(given) < row.min(given))


def test_a_wrong_number_is_caught() -> None:
    """Every integer, enumeration, SoC and version of every row, changed in memory: some fact is then wrong."""
    groups: dict[tuple[str, str], list[Limit]] = {}
    for row in load():
        groups.setdefault((row.operator, row.code), []).append(row)
    survivors, reasons, caught = [], Counter[str](), 0
    for key, rows in groups.items():
        for at, row in enumerate(rows):
            for change, mutant in mutants(row):
                if any(is_wrong(case, [*rows[:at], mutant, *rows[at + 1 :]]) for case in FACTS[key]):
                    caught += 1
                elif why := equivalent(row.code, change):
                    reasons[why] += 1
                else:
                    survivors.append((*key, row.soc, change))
    assert survivors == []
    assert caught > 6000  # 6813 on 2026-11-25, and 81 that nothing can tell
    assert reasons.keys() == {why for _, _, why in EQUIVALENT}
    assert reasons.total() < caught / 50


def is_wrong(case: Case, rows: list[Limit]) -> bool:
    try:
        return any(breaks(row, case) for row in rows) == case.legal
    except ZeroDivisionError:  # a size became 0
        return True
