"""Modules and files that docstrings, comments and pages name are there: a name that was left behind by a move leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moe_lowering"
FOLDERS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
SOURCES = sorted(PACKAGE.rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# ``passes.costs.price``, with the package's name or without it, and what may follow: a name in that module, and one in that
DOTTED = re.compile(rf"``(?:moe_lowering\.)?((?:{'|'.join(FOLDERS)})(?:\.\w+)+)``")
PATH = re.compile(rf"[`( ]((?:moe_lowering/|tests/)?(?:{'|'.join(FOLDERS)}|repository|package)/[\w/]+\.(?:py|toml))\b")
# Folders whose names are words of codes or attributes too: only files of theirs are looked for
CODES = {
    "limits",
    "report",
}


def is_module(dotted: str) -> bool:
    place = PACKAGE / dotted.replace(".", "/")
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def leads_nowhere(dotted: str) -> bool:
    """Whether neither the name nor what is before its last parts is a module, or that module does not have the name."""
    parts = dotted.split(".")
    for count in range(len(parts), 1, -1):
        module = ".".join(parts[:count])
        if is_module(module):
            place = PACKAGE / module.replace(".", "/")
            text = (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
            return count < len(parts) and not re.search(rf"\b{parts[count]}\b", text)
    init = (PACKAGE / parts[0] / "__init__.py").read_text()
    return not re.search(rf"\b{parts[1]}\b", init)


def missing(text: str) -> list[str]:
    """Names of modules and files in a text that are not there."""
    dotted = [name for name in DOTTED.findall(text) if name.split(".")[0] not in CODES and leads_nowhere(name)]
    places = (ROOT, PACKAGE, PACKAGE / "passes", ROOT / "tests")
    return dotted + [path for path in PATH.findall(text) if not any((place / path).exists() for place in places)]


def test_what_is_named_is_there() -> None:
    found = {str(file.relative_to(ROOT)): missing(file.read_text()) for file in (*SOURCES, *PAGES)}
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(("text", "found"), [
    ("see ``passes.costs.price`` and ``moe_lowering.testing.ge.convert``", []),
    ("see ``passes.price``", ["passes.price"]),
    ("see ``passes.costs.price.no_such_name``", ["passes.costs.price.no_such_name"]),
    ("in `passes/costs/price.py` (moe_lowering/limits/sources.toml)", []),
    ("in `passes/prices.py`", ["passes/prices.py"]),
])  # fmt: skip
def test_a_name_that_leads_nowhere_is_seen(text: str, found: list[str]) -> None:
    assert missing(text) == found
