"""``moe-lowering matrix``: every implementation on real ranks, with every weight format, as one table.

What can be checked without torch is checked here; the cells are run by ``moe_lowering.testing.matrix``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from moe_lowering.cli.arguments import UsageError
from moe_lowering.vocabulary import EXPERT_FORMATS, IMPLEMENTATION_FORMS, ONE_OPERATOR

if TYPE_CHECKING:
    from moe_lowering.testing.matrix import Result, Table

# Equal to the axes of testing.matrix_cells (a test says so); written out because that module imports torch.
EP_SIZES, TP_SIZES = (1, 2, 4), (1, 2)
# Chosen for a ``max_rows`` below what the routings of the scenarios send: no row of the table, see tests/test_lowering_ranks.py.
WITHOUT_A_ROW = ("buffers",)
# The rows of the table: a form by its own name, or by its implementation's first where it has the one form only.
FORMS = {
    comm: tuple(
        form if form == comm or comm in ONE_OPERATOR else f"{comm}_{form}"
        for form in forms
        if form not in WITHOUT_A_ROW
    )
    for comm, forms in IMPLEMENTATION_FORMS.items()
}
WIDTH = 100
MOST_PROBLEMS = 20  # lines on stderr; --json has all

DESCRIPTION = """\
Lower one small MoE block to every implementation, with every weight format, EP and TP size, run it on real ranks
(processes, gloo, the simulator's kernels), and compare with a dense float64 reference. What must be refused must be
refused with its code."""

EXAMPLES = """\
examples:
  moe-lowering matrix
      the whole table: a few minutes on two cores
  moe-lowering matrix --ep 2 --comm mc2,fused_mc2 --quant w8a8
      some of its cells
  moe-lowering matrix --json
      every cell by itself: signal-to-noise ratio, codes, problems

A number in the table is the worst token's signal-to-noise ratio in dB, over ranks and scenarios (token counts, routings,
masks), at EP 2, TP 1 also over layouts of the weights (one tensor or a list, FRACTAL_NZ or ND); a letter stands for the
code of a cell that is refused in all of them.

exit code: 0 every cell is what it must be; 1 a cell is not; 2 wrong usage
"""


@dataclasses.dataclass(frozen=True)
class MatrixRequest:
    """One ``matrix`` command."""

    ep: tuple[int, ...] = EP_SIZES
    tp: tuple[int, ...] = TP_SIZES
    quant: tuple[str, ...] = tuple(EXPERT_FORMATS)
    comm: tuple[str, ...] = tuple(FORMS)
    json: bool = False

    @property
    def forms(self) -> tuple[str, ...]:
        return tuple(form for comm in self.comm for form in FORMS[comm])


def add_command(commands: Any) -> None:
    """Add ``matrix`` to the commands of a parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "matrix",
        help="run every implementation with every weight format on real ranks, and print the table",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(request=MatrixRequest)
    add = parser.add_argument
    add("--ep", type=_some(EP_SIZES), default=EP_SIZES, metavar="N,...", help="EP sizes, of 1, 2, 4 (default all)")
    add("--tp", type=_some(TP_SIZES), default=TP_SIZES, metavar="N,...", help="TP sizes, of 1, 2 (default all)")
    add(
        "--quant", type=_some(tuple(EXPERT_FORMATS)), default=tuple(EXPERT_FORMATS), metavar="FORMAT,...",
        help=f"weight formats, of {', '.join(tuple(EXPERT_FORMATS))} (default all)",
    )  # fmt: skip
    add(
        "--comm", type=_some(tuple(FORMS)), default=tuple(FORMS), metavar="NAME,...",
        help=f"implementations, of {', '.join(FORMS)} (default all)",
    )  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead of the table")


def _some(accepted: Sequence[Any]) -> Callable[[str], tuple[Any, ...]]:
    """Parser of a list with commas, in the order of ``accepted``."""

    def parse(text: str) -> tuple[Any, ...]:
        by_name = {str(value): value for value in accepted}
        names = text.split(",")
        if not all(name in by_name for name in names):
            raise argparse.ArgumentTypeError(f"is {text!r}; accepted: one or more of {','.join(by_name)}, with commas")
        return tuple(value for name, value in by_name.items() if name in names)

    return parse


def run_matrix(request: MatrixRequest, progress: Callable[[str], None]) -> Report:
    """Carry out a command."""
    from moe_lowering import simulator
    from moe_lowering.testing import matrix

    try:
        simulator.enable("A3")  # each rank does so; here, so that it fails with one line
    except simulator.SimulatorError as error:
        raise UsageError(f"the simulator cannot be used: {error}") from error
    started = time.perf_counter()
    axes = matrix.Axes(forms=request.forms, quantisations=request.quant, eps=request.ep, tps=request.tp)
    return Report(request, matrix.run(axes, progress), time.perf_counter() - started)


@dataclasses.dataclass(frozen=True)
class Report:
    """One command's result."""

    request: MatrixRequest
    table: Table
    seconds: float

    def problems(self) -> list[str]:
        """Why the exit code is 1, a line each; empty when it is 0."""
        found = self.table.problems()
        lines = [_last_line(problem) for problem in found[:MOST_PROBLEMS]]
        return lines + ([f"and {len(found) - MOST_PROBLEMS} more"] if len(found) > MOST_PROBLEMS else [])

    def to_json(self) -> str:
        from moe_lowering.testing.matrix_reference import FLOORS

        cells = [result.to_json() for result in self.table.results]
        return json.dumps({"cells": cells, "floors_db": FLOORS, "seconds": round(self.seconds, 1)}, indent=1)

    def to_text(self) -> str:
        return render(self.table, self.seconds)


def _last_line(problem: str) -> str:
    """A problem that ends with a traceback as the cell and the exception."""
    lines = problem.splitlines()
    text = lines[0] if len(lines) == 1 else f"{lines[0].removesuffix('Traceback (most recent call last):')}{lines[-1]}"
    return text if len(text) <= 300 else text[:297] + "..."


# -------------------------------------------------------------------------------------------------------------- as text


def render(table: Table, seconds: float) -> str:
    """The table, what its letters stand for, what is refused in some scenarios only, and the worst cells."""
    letters: dict[str, str] = {}
    parts = [_grid(table, letters)]
    if letters:
        parts.append("refused in all scenarios:\n" + "\n".join(_legend(table, letters)))
    partly = _partly_refused(table)
    if partly:
        parts.append("refused in single scenarios (docs/matrix.md):\n" + "\n".join(partly))
    parts += ["\n".join(_worst(table)), _summary(table, seconds)]
    return "\n\n".join(parts)


def _groups(table: Table) -> dict[tuple[str, str, int, int], list[Result]]:
    """The scenarios of each place in the table."""
    groups: dict[tuple[str, str, int, int], list[Result]] = {}
    for result in table.results:
        cell = result.cell
        groups.setdefault((cell.form, cell.quantisation, cell.ep, cell.tp), []).append(result)
    return groups


def _grid(table: Table, letters: dict[str, str]) -> str:
    axes, groups = table.axes, _groups(table)
    columns = [(ep, tp) for ep in axes.eps for tp in axes.tps]
    lines = [f"{'':29}{'EP/TP':8}" + "".join(f"{f'{ep}/{tp}':>9}" for ep, tp in columns)]
    for form in axes.forms:
        for at, quantisation in enumerate(axes.quantisations):
            entries = (_entry(groups[form, quantisation, ep, tp], letters) for ep, tp in columns)
            lines.append(f"{form if at == 0 else '':29}{quantisation:8}" + "".join(f"{e:>9}" for e in entries).rstrip())
    return "\n".join(lines)


def _entry(results: list[Result], letters: dict[str, str]) -> str:
    """dB, or the letter of the code that all scenarios are refused with; ``!`` where something is not as it must be."""
    mark = "!" if any(result.problems for result in results) else " "
    ratios = [result.snr for result in results if result.snr is not None]
    if ratios:
        return f"{min(ratios):.1f}{mark}"
    common = [code for code in _named(results[0]) if all(code in result.codes for result in results)]
    if not common:
        return f"?{mark}"
    return f"({letters.setdefault(common[0], _letter(len(letters)))}){mark}"


def _named(result: Result) -> list[str]:
    """The codes of a refused cell, those that it must be refused with first."""
    from moe_lowering.testing.matrix_expected import refusals

    wanted = [code for code in refusals(result.cell) if code in result.codes]
    return wanted + [code for code in result.codes if code not in wanted]


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"{_letter(number // 26 - 1)}{_letter(number % 26)}"


def _legend(table: Table, letters: dict[str, str]) -> Iterable[str]:
    from moe_lowering.testing.matrix_expected import REFUSALS

    reasons = {refusal.code: refusal.why for refusal in REFUSALS}
    for code, letter in letters.items():
        yield _wrapped(f"  ({letter}) {code:23}", reasons.get(code, ""))


def _partly_refused(table: Table) -> list[str]:
    """Lines of code: forms, with the weight formats where those are not all, and scenarios."""
    found: dict[tuple[str, str], dict[str, dict[str, None]]] = {}  # (code, form): scenario: formats
    legal: dict[str, dict[str, None]] = {}
    for results in _groups(table).values():
        if all(result.snr is None for result in results):
            continue
        for result in results:
            cell = result.cell
            legal.setdefault(cell.form, {})[cell.quantisation] = None
            if result.snr is None and result.codes:
                scenarios = found.setdefault((_named(result)[0], cell.form), {})
                scenarios.setdefault(cell.case, {})[cell.quantisation] = None
    lines: dict[tuple[str, str], list[str]] = {}
    for (code, form), scenarios in found.items():
        formats = list(dict.fromkeys(name for names in scenarios.values() for name in names))
        only = "" if formats == list(legal[form]) else f" {', '.join(formats)}"
        lines.setdefault((code, ", ".join(scenarios)), []).append(form + only)
    return [
        _wrapped(f"  {code:27}", f"{scenarios}: {'all' if len(forms) == len(legal) > 1 else ', '.join(forms)}")
        for (code, scenarios), forms in lines.items()
    ]


def _worst(table: Table) -> list[str]:
    from moe_lowering.testing.matrix_reference import FLOORS

    return [
        f"worst of {quantisation:8}{result.snr:5.1f} dB, floor {FLOORS[quantisation]:g} dB: {result.cell}"
        for quantisation, result in table.worst().items()
        if result.snr is not None and math.isfinite(result.snr)
    ]


def _summary(table: Table, seconds: float) -> str:
    legal = sum(result.snr is not None for result in table.results)
    wrong = sum(bool(result.problems) for result in table.results)
    scenarios = len({result.cell.scenario for result in table.results})
    return (
        f"{len(table.results)} cells in {scenarios} scenarios: {legal} run, {len(table.results) - legal} "
        f"refused, {wrong} not as they must be; {seconds:.0f} s"
    )


def _wrapped(label: str, text: str) -> str:
    label = f"{label} "
    return textwrap.fill(text or "-", WIDTH, initial_indent=label, subsequent_indent=" " * len(label))
