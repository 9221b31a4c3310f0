"""Rows as a table for a person, and as the page ``docs/models.md``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from moe_lowering.families.records import DTYPES, RIGHT, SHAPES, WAYS, WRONG, Attempt, Row
from moe_lowering.number_words import count_of
from moe_lowering.report.width import report_width

FAMILY = 23  # columns of a name; with the others a table has 80
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}
MARKS = {"right": "yes", "wrong": "WRONG", "left": "no", "failed": "failed"}
COLUMNS = tuple((way, dtype, shapes) for way in WAYS for dtype in DTYPES for shapes in SHAPES)


def render(rows: list[Row], version: str) -> str:
    """A table for each way that was tried, why what is not lowered is not, and a summary. Wrapped to ``report_width``."""
    ways = [way for way in WAYS if any(row.of(way) for row in rows)] or WAYS
    tables = [_table(rows, way, way == ways[0]) for way in ways]
    reasons = [
        textwrap.fill(f"{name}: {reason}", report_width(), subsequent_indent="  ") for name, reason in reasons_of(rows)
    ]
    counts = (
        "router: MoE layers whose router became one operator; overlap: MoE layers that a shared expert runs beside, 0 also "
        "where there is none"
    )
    why = ["not lowered, and why:", *reasons, ""] if reasons else []
    legend, total = (textwrap.fill(text, report_width()) for text in (counts, summary(rows, version)))
    return "\n".join([*tables, legend, "", *why, total])


def _table(rows: list[Row], way: str, is_first: bool) -> str:
    """Of one way; what is said of all attempts together stands in the first table."""
    kinds = [(dtype, shapes) for dtype in DTYPES for shapes in SHAPES]
    lines = [
        f"{'':{FAMILY}}" + "".join(f"{_SHORT[dtype]:>8}" for dtype, _ in kinds),
        f"{f'by {way}':{FAMILY}}" + "".join(f"{shapes:>8}" for _, shapes in kinds),
    ]
    lines[1] += f"{'router':>8}{'overlap':>9}{'error':>8}" if is_first else ""
    for row in rows:
        attempts = {(attempt.way, attempt.dtype, attempt.shapes): attempt for attempt in row.attempts}
        asked = [(way, dtype, shapes) for dtype, shapes in kinds]
        states = [MARKS[attempts[kind].state] if kind in attempts else "-" for kind in asked]
        whole = f"{routers(row):>8}{overlap(row):>9}{error(row):>8}" if is_first else ""
        lines.append(f"{row.family:{FAMILY}}" + "".join(f"{state:>8}" for state in states) + whole)
    return "\n".join([*lines, ""])


def routers(row: Row) -> str:
    """Routers that became one operator, of all MoE layers, in the best attempt that says so."""
    counted = [attempt for attempt in row.attempts if attempt.routers is not None]
    if not counted:
        return "-"
    best = max(counted, key=lambda attempt: attempt.routers or 0)
    return f"{best.routers} of {best.layers}"


def overlap(row: Row) -> str:
    """Shared experts that run beside an MoE layer, of all MoE layers."""
    counted = [attempt for attempt in row.attempts if attempt.overlapped is not None]
    return f"{counted[0].overlapped} of {counted[0].layers}" if counted else "-"


def error(row: Row) -> str:
    """The largest error of a lowered layer."""
    errors = [
        attempt.error for attempt in row.attempts if attempt.error is not None and attempt.state in (RIGHT, WRONG)
    ]
    return f"{max(errors):.0e}" if errors else "-"


def reasons_of(rows: list[Row]) -> Iterable[tuple[str, str]]:
    """(family, way and kinds; reason), equal reasons of a family together."""
    for row in rows:
        by_reason: dict[tuple[str, str], list[Attempt]] = {}
        for attempt in row.attempts:
            if attempt.reason:
                by_reason.setdefault((attempt.way, attempt.reason), []).append(attempt)
        for (way, reason), attempts in by_reason.items():
            kinds = ", ".join(f"{_SHORT[attempt.dtype]} {attempt.shapes}" for attempt in attempts)
            whole = len(attempts) == len(row.of(way))
            yield f"{row.family}, {way}" + ("" if whole else f" ({kinds})"), reason


def summary(rows: list[Row], version: str) -> str:
    parts = [f"{count_of(len(rows), 'family', 'families')} of transformers {version}"]
    for way in WAYS:
        tried = [row for row in rows if row.of(way)]
        parts.append(f"by {way} {sum(row.is_right(way) for row in tried)} of {len(tried)} lowered and right")
    wrong = sum(attempt.state == WRONG for row in rows for attempt in row.attempts)
    return "; ".join([*parts, f"{wrong} wrong"])


PAGE = """\
# Models of transformers

**What:** which families of transformers are lowered, by the hook and from the trace. **For:** whoever has a model of
transformers. **Next:** [how such a model is made ready](transformers.md).

Written by `moe-lowering models --write docs/models.md`; do not edit. {summary}.

Each family of the installed transformers whose code has a class of experts is tried as a small random model on the CPU:

- by the **hook**: `experts_implementation="moe_lowering"`, and `replace_experts` for models without transformers' interface (see
  [transformers.md](transformers.md));
- from the **trace** of the model as transformers makes it.

What the table says:

- *yes*: every MoE layer lowered, and its output within rounding of the model's own for the very inputs that it had;
- *no*: not lowered, for the reason below;
- *WRONG*: another result;
- *failed*: the model could not be built, compiled whole or run;
- `-`: not tried;
- *Router*: routers that became one operator of the device;
- *Overlap*: shared experts that run beside the layer on a side stream ([npugraph_ex](glossary.md#npugraph_ex), asked for); 0 also
  where there is none;
- *Error*: the largest max|a - b| / max|b| of a lowered layer, over all attempts: that of bfloat16, where it was tried.

| family | {heads} | router | overlap | error |
|---|{rule}
{rows}

## Not lowered, and why

{reasons}
"""


def page(rows: list[Row], version: str) -> str:
    """The page, in Markdown."""
    heads = " | ".join(f"{way} {_SHORT[dtype]} {shapes}" for way, dtype, shapes in COLUMNS)
    lines = []
    for row in rows:
        attempts = {(attempt.way, attempt.dtype, attempt.shapes): attempt for attempt in row.attempts}
        cells = [MARKS[attempts[kind].state] if kind in attempts else "-" for kind in COLUMNS]
        lines.append(f"| {row.family} | " + " | ".join((*cells, routers(row), overlap(row), error(row))) + " |")
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons_of(rows):
        grouped.setdefault(reason, []).append(name)
    reasons = [f"- {'; '.join(names)}: {_plain(reason)}" for reason, names in grouped.items()]
    return PAGE.format(
        summary=summary(rows, version),
        heads=heads,
        rule="---|" * (len(COLUMNS) + 3),
        rows="\n".join(lines),
        reasons="\n".join(reasons) or "None.",
    )


def _plain(reason: str) -> str:
    """A reason without what Markdown would take for its own."""
    return f"`{reason.replace('`', chr(39))}`"
