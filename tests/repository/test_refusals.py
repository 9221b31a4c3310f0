"""docs/refusals.md has every code of the limit tables, as they are now."""

import dataclasses
import re
import sys
from pathlib import Path

TOP = Path(__file__).parents[2]
sys.path.insert(0, str(TOP / ".ci"))

import refusals  # noqa: E402

from moe_lowering.limits.table import load  # noqa: E402


def listed() -> str:
    return refusals.PAGE.read_text().partition(refusals.BEGIN)[2].partition(refusals.END)[0].strip()


def test_the_list_is_that_of_the_tables():
    assert listed() == refusals.listing(load()), "run `make refusals`"
    assert all(f"| `{row.code}` |" in listed() for row in load())


def test_the_list_is_for_people():
    """No value of Python's, and no condition that cannot be understood."""
    assert not re.search(r"\(text=|`False` is|one of `,|one of `[^`,]*`|\|  \|", listed())
    assert any(f"{refusals.NEVER} (" in line and "vllm_ascend>=0.24" in line for line in listed().splitlines())
    assert '`comm_alg` one of `"", fullmesh' in listed() and "`has_clamps` is `False` (A2, A3; `cann<8.5`)" in listed()


def test_another_limit_would_be_seen():
    first, *others = load()
    assert refusals.listing((dataclasses.replace(first, advice="pray"), *others)) != listed()
    assert refusals.listing(tuple(others)) != listed()
