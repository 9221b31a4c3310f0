"""A ``matrix.table.Table`` as text for a person: wrapped to ``report_width``; a grid that is wider is cut into several."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable

from moe_lowering.limits.sources import cite, load_sources
from moe_lowering.matrix.expected import REFUSALS, refusals
from moe_lowering.matrix.reference import FLOORS
from moe_lowering.matrix.table import CellResult, Table
from moe_lowering.number_words import count_of
from moe_lowering.report.width import report_width

LABEL, COLUMN = 37, 9


def render(table: Table, seconds: float) -> str:
    """The table, what its letters stand for, what is refused in some scenarios only, and the worst cells."""
    letters: dict[str, str] = {}
    parts = [_grid(table, letters)]
    if letters:
        parts.append("refused in all scenarios:\n" + "\n".join(_legend(table, letters)))
    partly = _refusal_lines(table)
    if partly:
        parts.append("refused in single scenarios (docs/matrix.md):\n" + "\n".join(partly))
    parts += ["\n".join(_worst(table)), _summary(table, seconds)]
    return "\n\n".join(parts)


def _groups(table: Table) -> dict[tuple[str, str, int, int], list[CellResult]]:
    """The scenarios of each place in the table."""
    groups: dict[tuple[str, str, int, int], list[CellResult]] = {}
    for result in table.results:
        cell = result.cell
        groups.setdefault((cell.form, cell.quantisation, cell.ep, cell.tp), []).append(result)
    return groups


def _grid(table: Table, letters: dict[str, str]) -> str:
    axes, groups = table.axes, _groups(table)
    columns = [(ep, tp) for ep in axes.eps for tp in axes.tps]
    most = (report_width() - LABEL) // COLUMN
    if len(columns) > most:
        parts = [columns[at : at + most] for at in range(0, len(columns), most)]
        return "\n\n".join(_columns(table, groups, part, letters) for part in parts)
    return _columns(table, groups, columns, letters)


def _columns(
    table: Table,
    groups: dict[tuple[str, str, int, int], list[CellResult]],
    columns: list[tuple[int, int]],
    letters: dict[str, str],
) -> str:
    """The grid of some (EP, TP)."""
    axes = table.axes
    lines = [f"{'dB of the worst token':29}{'EP/TP':8}" + "".join(f"{f'{ep}/{tp}':>9}" for ep, tp in columns)]
    for form in axes.forms:
        for at, quantisation in enumerate(axes.quantisations):
            entries = (_entry(groups[form, quantisation, ep, tp], letters) for ep, tp in columns)
            lines.append(f"{form if at == 0 else '':29}{quantisation:8}" + "".join(f"{e:>9}" for e in entries).rstrip())
    return "\n".join(lines)


def _entry(results: list[CellResult], letters: dict[str, str]) -> str:
    """dB, or the letter of the code that all scenarios are refused with; ``!`` where something is not as it must be."""
    mark = "!" if any(result.problems for result in results) else " "
    ratios = [result.snr for result in results if result.snr is not None]
    if ratios:
        return f"{min(ratios):.1f}{mark}"
    common = [code for code in _order_codes(results[0]) if all(code in result.codes for result in results)]
    if not common:
        return f"?{mark}"
    return f"({letters.setdefault(common[0], _letter(len(letters)))}){mark}"


def _order_codes(result: CellResult) -> list[str]:
    """The codes of a refused cell, those that it must be refused with first."""
    expected = [code for code in refusals(result.cell) if code in result.codes]
    return expected + [code for code in result.codes if code not in expected]


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"{_letter(number // 26 - 1)}{_letter(number % 26)}"


def _legend(table: Table, letters: dict[str, str]) -> Iterable[str]:
    reasons = {refusal.code: cite(refusal.why, load_sources())[0].note for refusal in REFUSALS}
    width = max(23, *map(len, letters))
    for code, letter in letters.items():
        yield _wrap_text(f"  ({letter}) {code:{width}}", reasons.get(code, ""))


def _refusal_lines(table: Table) -> list[str]:
    """Lines of code: forms, with the weight formats where those are not all, and scenarios."""
    refusals: dict[tuple[str, str], dict[str, dict[str, None]]] = {}  # (code, form): scenario: formats
    legal: dict[str, dict[str, None]] = {}
    for results in _groups(table).values():
        if all(result.snr is None for result in results):
            continue
        for result in results:
            cell = result.cell
            legal.setdefault(cell.form, {})[cell.quantisation] = None
            if result.snr is None and result.codes:
                scenarios = refusals.setdefault((_order_codes(result)[0], cell.form), {})
                scenarios.setdefault(cell.case, {})[cell.quantisation] = None
    lines: dict[tuple[str, str], list[str]] = {}
    for (code, form), scenarios in refusals.items():
        formats = list(dict.fromkeys(name for names in scenarios.values() for name in names))
        only = "" if formats == list(legal[form]) else f" {', '.join(formats)}"
        lines.setdefault((code, ", ".join(scenarios)), []).append(form + only)
    return [
        _wrap_text(f"  {code:27}", f"{scenarios}: {'all' if len(forms) == len(legal) > 1 else ', '.join(forms)}")
        for (code, scenarios), forms in lines.items()
    ]


def _worst(table: Table) -> list[str]:
    return [
        _wrap_text(f"worst of {quantisation}", f"{result.snr:.1f} dB, floor {FLOORS[quantisation]:g} dB: {result.cell}")
        for quantisation, result in table.worst().items()
        if result.snr is not None and math.isfinite(result.snr)
    ]


def _summary(table: Table, seconds: float) -> str:
    legal = sum(result.snr is not None for result in table.results)
    wrong = sum(bool(result.problems) for result in table.results)
    scenarios = len({result.cell.scenario for result in table.results})
    text = (
        f"{count_of(len(table.results), 'cell')} in {count_of(scenarios, 'scenario')}: {legal} run, {len(table.results) - legal} "
        f"refused, {wrong} not as they must be; {seconds:.0f} s"
    )
    return textwrap.fill(text, report_width())


def _wrap_text(label: str, text: str) -> str:
    label = f"{label} "
    return textwrap.fill(text or "-", report_width(), initial_indent=label, subsequent_indent=" " * len(label))
