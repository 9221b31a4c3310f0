"""Writes the lists of docs/refusals.md: every code of the limit tables with what it asks for and what to change, and those
of layers that are left and of shared experts that do not overlap.

python .ci/refusals.py    # `make refusals`; tests/repository/test_refusals.py compares
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moe_lowering.limits.row import BOUNDS, Limit  # noqa: E402
from moe_lowering.limits.table import load  # noqa: E402
from moe_lowering.passes.leftovers.find_foreign import FORMS, advice_of  # noqa: E402
from moe_lowering.passes.overlap_region import CODES  # noqa: E402
from moe_lowering.vocabulary import SOCS  # noqa: E402

PAGE = ROOT / "docs" / "refusals.md"
BEGIN, END = "<!-- codes: written by make refusals -->", "<!-- end of codes -->"
OTHERS, END_OF_OTHERS = "<!-- other codes: written by make refusals -->", "<!-- end of other codes -->"
ABOVE = "as above"
NEVER = "nothing: it is never legal"
HEAD = "| code | of | must hold | change |\n|---|---|---|---|"


def main() -> int:
    text = PAGE.read_text("utf-8")
    for begin, end, lines in ((OTHERS, END_OF_OTHERS, others()), (BEGIN, END, listing(load()))):
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{lines}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, "utf-8")
    return 0


def others() -> str:
    """The codes whose words are in the code of the pass."""
    layers = [f"| `{code}` | {seen} | {_cell(advice_of(code))} |" for code, seen in FORMS.items()]
    overlaps = [f"| `{code}` | {seen.removeprefix('plain order: ')} |" for code, seen in CODES.items()]
    return "\n".join([
        "### Layers that are left", "", "| code | seen | change |", "|---|---|---|", *layers, "",
        "### Shared experts that do not overlap", "", "They run in plain order, and the layer is lowered all the same.", "",
        "| code | seen |", "|---|---|", *overlaps,
    ])  # fmt: skip


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def listing(rows: tuple[Limit, ...]) -> str:
    """A section for each part before the dot of a code, and lines for each code."""
    families: dict[str, dict[str, list[Limit]]] = {}
    for row in rows:
        families.setdefault(row.code.partition(".")[0], {}).setdefault(row.code, []).append(row)
    parts = []
    for family in sorted(families):
        lines = [each for code in sorted(families[family]) for each in lines_of(code, families[family][code])]
        parts.append("\n".join([f"### {family}", "", HEAD, *lines]))
    return "\n\n".join(parts)


def lines_of(code: str, rows: list[Limit]) -> list[str]:
    """A line for each thing that a code asks for, with the operators that ask for it; what is as in the line above is a sign."""
    operators: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        of = operators.setdefault((rule(row), row.advice), [])
        of += [] if f"`{row.operator}`" in of else [f"`{row.operator}`"]
    lines, above = [], ("", "")
    for (must_hold, advice), names in operators.items():
        cells = (f"`{code}`", of := ", ".join(names), must_hold, advice)
        shown = (cells[0], ABOVE if of == above[0] else of, must_hold, ABOVE if advice == above[1] else advice)
        above = (of, advice)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in shown) + " |")
    return lines


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
