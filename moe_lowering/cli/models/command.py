"""Carry out ``moe-lowering models``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from moe_lowering.cli.files import write_file
from moe_lowering.cli.models.request import ModelsRequest
from moe_lowering.cli.simulation import enable_simulator
from moe_lowering.cli.usage import UsageError
from moe_lowering.families.listing import families, transformers_version
from moe_lowering.families.records import WRONG, Row, read_rows, to_json
from moe_lowering.families.runner import run_families
from moe_lowering.families.table import page, render


def run_models(request: ModelsRequest, progress: Callable[[str], None]) -> ModelsReport:
    """Carry out a command."""
    version = transformers_version()
    rows = {row.family: row for row in (read_rows(request.resume, version) if request.resume else [])}
    planned = []
    for family in request.only or families():
        has = rows[family].kinds if family in rows and not request.again else set()
        if kinds := [kind for kind in request.kinds if kind not in has]:
            planned.append((family, kinds))

    def done(row: Row) -> None:
        rows[row.family] = rows[row.family].with_attempts(row) if row.family in rows else row
        if request.resume is not None:
            write_file("resume", request.resume, to_json(_sorted(rows), version))

    if planned:
        progress("enabling the simulator (A3), and loading transformers")
        enable_simulator("A3")
        _register()
        run_families(planned, done, progress)
    report = ModelsReport(request, _sorted(rows), version)
    if request.json_file is not None:
        write_file("json", request.json_file, report.to_json())
    if request.write is not None:
        write_file("write", request.write, page(report.rows, version))
    return report


def _sorted(rows: dict[str, Row]) -> list[Row]:
    return [rows[family] for family in sorted(rows)]


def _register() -> None:
    from moe_lowering.integrations.transformers import register

    try:
        register()
    except ImportError as error:
        raise UsageError(f"transformers cannot be used: {error}") from error


@dataclasses.dataclass(frozen=True)
class ModelsReport:
    """One command's result: the rows of this command, and those that it resumed."""

    request: ModelsRequest
    rows: list[Row]
    version: str

    def problems(self) -> list[str]:
        """Why the exit code is 1, a line each; empty when it is 0."""
        return [
            f"{row.family}: {attempt.way} {attempt.dtype} {attempt.shapes}: {attempt.reason}"
            for row in self.rows
            for attempt in row.attempts
            if attempt.state == WRONG
        ]

    def to_json(self) -> str:
        return to_json(self.rows, self.version)

    def to_text(self) -> str:
        return render(self.rows, self.version)
