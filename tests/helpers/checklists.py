"""The check-lists of ``docs/adding.md``, as tests name their steps and as ``test_checklists.py`` walks them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = "docs/adding.md"
RECORD = "moe_lowering/vocabulary.py"
_STEP = re.compile(r"^(\d+)\. (.+?)(?=^\d+\. |\Z)", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a list: the file that it is about (a pattern), what it says, the tests that fail without it."""

    kind: str
    number: int
    file: str
    text: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{PAGE}, {self.kind}, step {self.number}: {self.file}: {self.text}"


@functools.cache
def checklists() -> dict[str, tuple[Step, ...]]:
    """The steps of every list, by its title.

    Raises:
        ValueError: a step without a file, or numbers that are not 1, 2, ...
    """
    parts = re.split(r"^## (.+)$", (ROOT / PAGE).read_text("utf-8"), flags=re.MULTILINE)[1:]
    lists = {}
    for kind, body in zip(parts[::2], parts[1::2], strict=True):
        steps = tuple(_read(kind, int(number), text) for number, text in _STEP.findall(body))
        if [step.number for step in steps] != list(range(1, len(steps) + 1)):
            raise ValueError(f"{PAGE}, {kind}: steps are {[step.number for step in steps]}")
        lists[kind] = steps
    return lists


def _read(kind: str, number: int, text: str) -> Step:
    text = " ".join(text.split())
    match = re.match(r"`([^`]+)`(?:[:,] ?)(.*)$", text)
    if match is None:
        raise ValueError(f"{PAGE}, {kind}, step {number}: begins with no file")
    says, _, tests = match[2].partition("Test: ")
    return Step(kind, number, match[1], says.strip(), tuple(re.findall(r"`(tests/[^`]+)`", tests)))


def forgotten(kind: str, file: str, detail: object = "") -> str:
    """The message of a test that finds the step of ``kind`` about ``file`` left out."""
    (step,) = (step for step in checklists()[kind] if step.file == file)
    return f"{step} {detail}"


def require_words(kind: str, file: str, words: Collection[str], vocabulary: Collection[str]) -> None:
    """``words``, which ``file`` has, are those of the vocabulary."""
    missing, unknown = sorted({*vocabulary} - {*words}), sorted({*words} - {*vocabulary})
    assert not missing, forgotten(kind, file, f"has no {', '.join(missing)}")
    assert not unknown, forgotten(kind, RECORD, f"has no {', '.join(unknown)}, which {file} has")


@functools.cache
def page(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def first_cells(name: str, title: str) -> list[str]:
    """The words of the first column of the table of a page whose first title is ``title``."""
    table = page(name).split(f"| {title} |", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\| `(\w+)`", table, re.MULTILINE)


def bullet(name: str, title: str) -> str:
    """The item of a list that begins with ``title``, up to the next one."""
    return page(name).split(f"\n- `{title}`:", 1)[1].split("\n- ", 1)[0]
