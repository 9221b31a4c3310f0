"""Carries out a ``MatrixRequest`` with ``matrix.runner``, and reports the table and its problems."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable

from moe_lowering.cli.matrix.request import MatrixRequest
from moe_lowering.cli.matrix.text import render
from moe_lowering.cli.simulation import enable_simulator
from moe_lowering.matrix import runner
from moe_lowering.matrix.reference import FLOORS
from moe_lowering.matrix.table import Axes, Table
from moe_lowering.report.schemas import SCHEMA_VERSION

MOST_PROBLEMS = 20  # lines on stderr; --json has all


def run_matrix(request: MatrixRequest, progress: Callable[[str], None]) -> MatrixReport:
    """Carry out a command."""
    progress("enabling the simulator (A3)")
    enable_simulator("A3")  # each rank enables it too; done here first, so that a failure is one line
    started = time.perf_counter()
    axes = Axes(
        forms=request.forms,
        quantisations=request.quant,
        eps=request.ep,
        tps=request.tp,
        unpermute_operator=request.unpermute_operator,
    )
    return MatrixReport(request, runner.run(axes, progress), time.perf_counter() - started)


@dataclasses.dataclass(frozen=True)
class MatrixReport:
    """One command's result."""

    request: MatrixRequest
    table: Table
    seconds: float

    def problems(self) -> list[str]:
        """Why the exit code is 1, a line each; empty when it is 0."""
        problems = self.table.problems()
        lines = [_last_line(problem) for problem in problems[:MOST_PROBLEMS]]
        return lines + ([f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else [])

    def to_json(self) -> str:
        cells = [result.to_json() for result in self.table.results]
        seconds = round(self.seconds, 1)
        record = {"schema_version": SCHEMA_VERSION, "cells": cells, "floors_db": FLOORS, "seconds": seconds}
        return json.dumps(record, indent=1, allow_nan=False)

    def to_text(self) -> str:
        return render(self.table, self.seconds)


def _last_line(problem: str) -> str:
    """A problem that ends with a traceback as the cell and the exception."""
    lines = problem.splitlines()
    text = lines[0] if len(lines) == 1 else f"{lines[0].removesuffix('Traceback (most recent call last):')}{lines[-1]}"
    return text if len(text) <= 300 else text[:297] + "..."
