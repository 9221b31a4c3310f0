"""Rows as a table for a person, and as the page ``docs/models.md``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from moe_lowering.families.records import DTYPES, RIGHT, SHAPES, WAYS, WRONG, Attempt, Row

WIDTH = 118
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}
MARKS = {"right": "yes", "wrong": "WRONG", "left": "no", "failed": "failed"}
COLUMNS = tuple((way, dtype, shapes) for way in WAYS for dtype in DTYPES for shapes in SHAPES)


def render(rows: list[Row], version: str) -> str:
    """The table, why what is not lowered is not, and a summary."""
    heads = [
        [way for way, _, _ in COLUMNS],
        [_SHORT[dtype] for _, dtype, _ in COLUMNS],
        [shapes for _, _, shapes in COLUMNS],
    ]
    lines = []
    for at, cells in enumerate(heads):
        lines.append(f"{'family' if at == 2 else '':24}" + "".join(f"{head:>9}" for head in cells))
    lines[2] += f"{'router':>9}{'overlap':>9}{'error':>9}"
    lines += [_line(row) for row in rows]
    reasons = [textwrap.fill(f"{name}: {reason}", WIDTH, subsequent_indent="  ") for name, reason in reasons_of(rows)]
    return "\n".join(
        [*lines, "", *(["not lowered, and why:", *reasons, ""] if reasons else []), summary(rows, version)]
    )


def _line(row: Row) -> str:
    attempts = {(attempt.way, attempt.dtype, attempt.shapes): attempt for attempt in row.attempts}
    cells = [MARKS[attempts[kind].state] if kind in attempts else "-" for kind in COLUMNS]
    return f"{row.family:24}" + "".join(f"{cell:>9}" for cell in (*cells, routers(row), overlap(row), error(row)))


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
    parts = [f"{len(rows)} families of transformers {version}"]
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

Each family of the installed transformers whose code has a class of experts, as a small random model on the CPU: by the **hook**
(`experts_implementation="moe_lowering"`, and `replace_experts` for models without transformers' interface; see
[transformers.md](transformers.md)), and from the **trace** of the model as transformers makes it. *yes*: every MoE layer lowered,
and its output within rounding of the model's own for the very inputs that it had; *no*: not lowered, for the reason below;
*WRONG*: another result; *failed*: the model could not be built, compiled whole or run; -: not tried. *Router*: routers that
became one operator of the device. *Overlap*: shared experts that run beside the layer on a side stream (npugraph_ex, asked for).
*Error*: the largest max|a - b| / max|b| of a lowered layer, over all attempts: that of bfloat16, where it was tried.

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
