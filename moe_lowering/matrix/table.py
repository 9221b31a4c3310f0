"""``Axes``, which cells a run of the matrix has, and ``Table``, the results of the run."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from moe_lowering.matrix.cells import SCENARIOS, Cell
from moe_lowering.matrix.expected import refusals
from moe_lowering.matrix.forms import EP_SIZES, FORMS, LAYOUTS, TP_SIZES
from moe_lowering.vocabulary import EXPERT_FORMATS, TOKEN_UNPERMUTE

LAYOUTS_AT = (2, 1)  # EP and TP size


@dataclasses.dataclass(frozen=True)
class Axes:
    """The cells of a run: all combinations, as far as a scenario is for them; ``layouts`` beside each form's own at EP 2,
    TP 1 and in the scenario ``even`` only, as nothing else depends on them."""

    forms: tuple[str, ...] = tuple(FORMS)
    quantisations: tuple[str, ...] = tuple(EXPERT_FORMATS)
    eps: tuple[int, ...] = EP_SIZES
    tps: tuple[int, ...] = TP_SIZES
    scenarios: tuple[str, ...] = tuple(SCENARIOS)
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    unpermute_operator: str = TOKEN_UNPERMUTE

    def cells(self, ep: int, tp: int, quantisation: str) -> list[Cell]:
        names = [s.name for s in SCENARIOS.values() if quantisation in s.quantisations and ep in s.eps]
        make = functools.partial(Cell, unpermute_operator=self.unpermute_operator)
        cells = [make(f, quantisation, ep, tp, s) for f in self.forms for s in self.scenarios if s in names]
        if (ep, tp) != LAYOUTS_AT or "even" not in self.scenarios:
            return cells
        other = [
            (f, layout) for f in self.forms for layout in self.layouts if layout != FORMS[f].layout(quantisation).name
        ]
        return cells + [make(form, quantisation, ep, tp, "even", layout) for form, layout in other]


EVERYTHING = Axes()


@dataclasses.dataclass
class CellResult:
    """What one cell came to.

    Attributes:
        codes: of the broken rules, when it was refused.
        reason: the words of the pass.
        snr: the worst token's signal-to-noise ratio in dB, None when nothing was run; infinite for no tokens.
        problems: what differs from what the cell must be.
    """

    cell: Cell
    codes: tuple[str, ...] = ()
    reason: str = ""
    snr: float | None = None
    problems: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        snr = None if self.snr is None or math.isinf(self.snr) else round(self.snr, 2)
        return {
            **dataclasses.asdict(self.cell),
            "legal": self.snr is not None,
            "snr_db": snr,
            "codes": list(self.codes),
            "expected_codes": list(refusals(self.cell)),
            "problems": self.problems,
        }


@dataclasses.dataclass(frozen=True)
class Table:
    """The results of a run, in order."""

    axes: Axes
    results: tuple[CellResult, ...]

    def problems(self) -> list[str]:
        """One line for each thing that is not as it must be."""
        return [f"{r.cell}: {problem.strip()}" for r in self.results for problem in r.problems]

    def worst(self) -> dict[str, CellResult]:
        """By weight format, the legal cell with the lowest signal-to-noise ratio."""
        lowest: dict[str, CellResult] = {}
        for result in self.results:
            known = lowest.get(result.cell.quantisation)
            if result.snr is not None and (known is None or result.snr < (known.snr or 0.0)):
                lowest[result.cell.quantisation] = result
        return lowest
