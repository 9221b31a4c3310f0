"""docs/limits.md: every condition has a row or says where it is enforced, and every code that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checklists import forgotten

from moe_lowering.limits import load
from moe_lowering.limits.sources import load_sources

TEXT = (Path(__file__).parents[2] / "docs" / "limits.md").read_text("utf-8")
CODE = re.compile(r"`([a-z0-9_]+\.[a-z0-9_]+)`")
FILES = (".py", ".toml", ".md")
NO_ROWS = {"call.symbolic_int"}  # found by limits/calls, not by a row


def section(title: str) -> list[tuple[str, str]]:
    """The rows of the table of one section: (condition, what enforces it)."""
    body = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")
    ]
    assert all(len(row) == 2 for row in cells)
    return [(row[0], row[1]) for row in cells[2:]]


def named(text: str) -> set[str]:
    return {code for code in CODE.findall(text) if not code.endswith(FILES)}


def test_every_code_that_is_named_exists() -> None:
    known = {row.code for row in load()} | NO_ROWS
    assert named(TEXT) - known - load_sources().keys() == set()
    assert len(named(TEXT)) > 90


def test_the_nine_conditions() -> None:
    conditions = section("Conditions for dispatch_ffn_combine")
    assert {int(condition.split(".")[0]) for condition, _ in conditions} == set(range(10))


@pytest.mark.parametrize("title", ["Conditions for dispatch_ffn_combine", "Hazards of dispatch_ffn_combine", "MC2"])
def test_every_condition_is_enforced_or_says_why_not(title: str) -> None:
    assert all(enforced for _, enforced in section(title))


@pytest.mark.parametrize(("prefix", "titles"), [
    ("mc2.", ["MC2"]),
    ("fused.", ["Conditions for dispatch_ffn_combine", "Hazards of dispatch_ffn_combine"]),
])  # fmt: skip
def test_every_rule_of_the_communicating_operators_is_in_the_tables(prefix: str, titles: list[str]) -> None:
    told = {code for title in titles for _, enforced in section(title) for code in named(enforced)}
    codes = {row.code for row in load() if row.code.startswith(prefix)}
    assert codes - told == set(), forgotten("A limit", "docs/limits.md", codes - told)
    left = {code for code in told if code.startswith(prefix)} - codes - NO_ROWS
    assert left == set(), forgotten("A limit", "moe_lowering/limits/data/*.toml", left)


def test_every_table_is_listed() -> None:
    data = Path(__file__).parents[2] / "moe_lowering" / "limits" / "data"
    patterns = re.findall(r"`([a-z0-9_*]+\.toml)`", TEXT)
    assert {file for file in data.iterdir() if not any(file.match(p) for p in patterns)} == set()
