"""What a ``lower`` command found, as JSON, as text, and as an exit code."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from moe_lowering.cli.arguments import Request
from moe_lowering.cli.compare import MAX_REROUTED, TOLERANCE, Errors
from moe_lowering.report.records import BlockReport, LoweringReport
from moe_lowering.report.text import names, render, row


@dataclasses.dataclass
class Outcome:
    """One command's result.

    Attributes:
        model: its name.
        reports: of the graphs of rank 0, in order of compilation.
        unsupported: (module, why) of MoE modules that never reach the generic operators.
        errors: over all ranks and token counts; None when nothing was run.
        facts: (label, text) about how it was done: what was assumed, how long it took.
    """

    request: Request
    model: str
    reports: list[LoweringReport]
    unsupported: list[tuple[str, str]]
    errors: Errors | None
    facts: list[tuple[str, str]]

    @property
    def max_relative(self) -> float | None:
        """The larger of the logits' and the blocks' relative error."""
        return None if self.errors is None else max(self.errors.relative, self.errors.block_relative)

    def problems(self) -> list[str]:
        """Why the exit code is 1; empty when it is 0."""
        found = [f"{module} is not lowered: {why}" for module, why in self.unsupported]
        left: dict[str, list[str]] = {}
        for report in self.reports:
            for block in report.blocks:
                if block.comm is None:
                    left.setdefault(_refusal(block), []).append(block.name)
            found += [f"{place} is not lowered: {why}" for place, why in report.unrecognised]
        found += [f"{names(list(dict.fromkeys(blocks)))} not lowered: {why}" for why, blocks in left.items()]
        if not found and not any(report.blocks for report in self.reports):
            found.append("no MoE block was found in the graph")
        return found + self._mismatches()

    def _mismatches(self) -> list[str]:
        if self.errors is None or self.max_relative is None:
            return []
        found = []
        tolerance, rerouted = TOLERANCE[self.request.dtype], MAX_REROUTED[self.request.dtype]
        if self.max_relative > tolerance:
            found.append(
                f"outputs differ: max_rel_error {self.max_relative:.3g} (logits {self.errors.relative:.3g}, blocks "
                f"{self.errors.block_relative:.3g}); accepted for {self.request.dtype}: {tolerance:g}"
            )
        if self.errors.rerouted > rerouted * self.errors.routed:
            found.append(
                f"{self.errors.rerouted} of {self.errors.routed} tokens went to other experts; accepted for "
                f"{self.request.dtype}: {rerouted:.0%}"
            )
        return found

    def to_json(self) -> str:
        """One JSON object. The blocks and numbers are those of the first graph."""
        first = self.reports[0] if self.reports else None
        fields: dict[str, Any] = {
            "model": self.model,
            "blocks": [_block_json(block) for block in first.blocks] if first else [],
            "max_abs_error": None if self.errors is None else self.errors.absolute,
            "max_rel_error": self.max_relative,
            "nodes_before": first.nodes_before if first else None,
            "nodes_after": first.nodes_after if first else None,
            "pass_ms": first.pass_ms if first else None,
            "captured": None,
        }
        return json.dumps(fields, indent=2, allow_nan=False)

    def to_text(self) -> str:
        """The report for a person."""
        parts = [self._header()]
        shown: list[LoweringReport] = []
        for report in self.reports:
            if any(report.blocks == other.blocks for other in shown):
                continue
            shown.append(report)
            parts.append(render(report))
        if self.unsupported:
            parts.append("\n".join(["not supported:", *(row(module, why) for module, why in self.unsupported)]))
        parts.append(self._comparison())
        return "\n\n".join(parts)

    def _header(self) -> str:
        asked = self.request
        title = f"{self.model}: comm {asked.comm}, ep {asked.ep}, soc {asked.soc}, {asked.dtype}"
        return "\n".join([title, *(row(label, text) for label, text in self.facts)])

    def _comparison(self) -> str:
        if self.errors is None:
            return "compared with nothing: nothing was run"
        tolerance = TOLERANCE[self.request.dtype]
        lines = [
            "compared with the model's own output (grouped_mm, experts not sharded)",
            row("max abs error", f"{self.errors.absolute:.3g} (logits)"),
            row("max rel error", f"{self.errors.relative:.3g} (logits), {self.errors.block_relative:.3g} (MoE blocks); "
                f"accepted for {self.request.dtype}: {tolerance:g}"),
            row("near ties", f"{self.errors.rerouted} of {self.errors.routed} tokens went to other experts"),
        ]  # fmt: skip
        return "\n".join(lines)


def _block_json(block: BlockReport) -> dict[str, Any]:
    whole = block.to_json()
    return {key: whole[key] for key in ("name", "comm", "ops_before", "ops_after", "verdicts")}


def _refusal(block: BlockReport) -> str:
    """Why a block was left, with the messages of the implementation that was asked for."""
    asked = [name for name in block.verdicts if block.reason.startswith(f"{name} was asked for")]
    if not asked:
        return block.reason
    messages = (f"[{v.code}] {v.message}" for name in asked for v in block.verdicts[name].violations)
    return f"{asked[0]} was asked for and is not legal: " + "; ".join(dict.fromkeys(messages))
