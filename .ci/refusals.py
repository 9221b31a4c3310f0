"""Writes the list of docs/refusals.md: every code of the limit tables with what it asks for and what to change.

python .ci/refusals.py    # `make refusals`; tests/repository/test_refusals.py compares
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moe_lowering.limits.row import BOUNDS, Limit  # noqa: E402
from moe_lowering.limits.table import load  # noqa: E402
from moe_lowering.vocabulary import SOCS  # noqa: E402

PAGE = ROOT / "docs" / "refusals.md"
BEGIN, END = "<!-- codes: written by make refusals -->", "<!-- end of codes -->"
NEVER = "nothing: it is never legal"
HEAD = "| code | of | must hold | change |\n|---|---|---|---|"


def main() -> int:
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{listing(load())}\n\n{END}{rest.partition(END)[2]}", "utf-8")
    return 0


def listing(rows: tuple[Limit, ...]) -> str:
    """A section for each part before the dot of a code, a line for each code with the operators and rules that have it."""
    families: dict[str, dict[str, list[Limit]]] = {}
    for row in rows:
        families.setdefault(row.code.partition(".")[0], {}).setdefault(row.code, []).append(row)
    parts = []
    for family in sorted(families):
        lines = [line(code, families[family][code]) for code in sorted(families[family])]
        parts.append("\n".join([f"### {family}", "", HEAD, *lines]))
    return "\n\n".join(parts)


def line(code: str, rows: list[Limit]) -> str:
    operators = dict.fromkeys(f"`{row.operator}`" for row in rows)
    rules = dict.fromkeys(rule(row) for row in rows)
    advice = dict.fromkeys(row.advice for row in rows)
    cells = (f"`{code}`", ", ".join(operators), "; ".join(rules), "; ".join(advice))
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def rule(row: Limit) -> str:
    """The value, its bounds, and where the rule counts."""
    words = {
        "min": "at least",
        "max": "at most",
        "multiple_of": "a multiple of",
        "equals": "equal to",
    }
    bounds = []
    for bound in BOUNDS:
        limit = getattr(row, bound)
        if limit is None or limit == ():
            continue
        if bound == "one_of":
            shown = ", ".join(str(each) or '""' for each in limit)
            bounds.append(f"is `{shown}`" if len(limit) == 1 else f"one of `{shown}`")
        else:
            bounds.append(f"{words[bound]} `{limit.text}`")
    where = [] if set(row.soc) == set(SOCS) else [", ".join(row.soc)]
    where += [f"where `{row.when.text}`"] if row.when else []
    where += [", ".join(f"`{each.text}`" for each in row.versions)] if row.versions else []
    held = NEVER if (row.value.text, row.one_of) == ("False", (True,)) else f"`{row.value.text}` {' and '.join(bounds)}"
    return held + (f" ({'; '.join(where)})" if where else "")


if __name__ == "__main__":
    sys.exit(main())
