"""The check-lists of docs/adding.md, walked: a toy of each kind in a copy of the checkout, and each step left out in turn.

With every step done, the tests that the list names pass. Without one, the tests of that step fail, and name it and no other.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator

import pytest
from checklist_edits import all_edits, broken
from checklist_process import Checkout, Insert
from checklists import PAGE, Step, checklists

EDITS = all_edits()
WALKED = tuple(checklists())
STEPS = [step for kind in WALKED for step in checklists()[kind]]
NAMED = re.compile(rf"{re.escape(PAGE)}, ([\w ]+), step (\d+):")


@pytest.fixture(scope="module")
def checkout() -> Iterator[Checkout]:
    checkout = Checkout()
    try:
        yield checkout
    finally:
        checkout.close()


def list_tests(kind: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(test for step in checklists()[kind] for test in step.tests))


def list_edits(kind: str, left_out: int = 0) -> list[Insert]:
    return [edit for (name, at), edits in EDITS.items() if name == kind and at != left_out for edit in edits]


def find_steps(output: str) -> set[tuple[str, int]]:
    return {(kind, int(number)) for kind, number in NAMED.findall(output)}


def name_step(step: Step) -> str:
    return f"{step.kind}-{step.number}"


def test_every_step_has_its_edit_of_its_file() -> None:
    assert {(step.kind, step.number) for step in STEPS} == EDITS.keys()
    for step in STEPS:
        files = {edit.file for edit in EDITS[step.kind, step.number]}
        pattern = step.file.replace("<name>", "*")
        assert files and all(fnmatch.fnmatch(file, pattern) for file in files), (str(step), files)
        assert step.tests, str(step)


def test_the_named_tests_pass_as_it_stands(checkout: Checkout) -> None:
    code, output = checkout.run((), {test for kind in WALKED for test in list_tests(kind)})
    assert code == 0, output


@pytest.mark.parametrize("kind", WALKED)
def test_a_toy_made_by_the_list_is_whole(checkout: Checkout, kind: str) -> None:
    code, output = checkout.run(list_edits(kind), list_tests(kind))
    assert code == 0, output


@pytest.mark.parametrize("step", STEPS, ids=name_step)
def test_a_step_that_is_left_out_is_named(checkout: Checkout, step: Step) -> None:
    """By the tests that the step names, and by no other step's name."""
    code, output = checkout.run(list_edits(step.kind, step.number), step.tests)
    assert code != 0, f"{step} is left out, and nothing fails:\n{output}"
    assert find_steps(output) == {(step.kind, step.number)}, output


@pytest.mark.parametrize(("kind", "number", "old", "new"), [
    ("An activation", 2, "gate.relu()", "gate.sigmoid()"),
    ("An activation", 3, "aten.relu.default", "aten.silu.default"),
    ("A weight format", 1, "snr_floor=28.0", ""),
])  # fmt: skip
def test_a_step_that_is_done_wrongly_fails(checkout: Checkout, kind: str, number: int, old: str, new: str) -> None:
    """That a word is there is not enough."""
    wrong = broken(EDITS[kind, number], old, new)
    code, output = checkout.run([*list_edits(kind, number), *wrong], list_tests(kind))
    assert code == 1 and " failed" in output, output
