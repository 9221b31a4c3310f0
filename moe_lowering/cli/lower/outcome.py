"""The result of a ``lower`` command as a record: its JSON, its text and its exit code."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from moe_lowering.cli.lower.compare import LOGITS_SNR_FLOOR, MAX_REROUTED, SNR_FLOOR, TOLERANCE, Errors
from moe_lowering.cli.lower.configs import is_small
from moe_lowering.cli.lower.graph_replay import Captured
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.number_words import count_of
from moe_lowering.report.module_names import names
from moe_lowering.report.records import BlockReport, LoweringReport
from moe_lowering.report.schemas import SCHEMA_VERSION
from moe_lowering.report.text import distinct, labelled_text, render
from moe_lowering.report.width import fold

if TYPE_CHECKING:
    from moe_lowering.explanation.table import Row


@dataclasses.dataclass
class LowerOutcome:
    """One command's result.

    Attributes:
        model: its name.
        reports: of the graphs of rank 0, in order of compilation.
        unsupported: (module, why) of MoE modules that never reach the generic operators.
        errors: over all ranks and token counts; None when nothing was run.
        facts: (label, text) about how it was done: what was assumed, how long it took.
        captured: by rank, with ``--capture``; JSON and text show rank 0's.
        refused: why nothing could be captured.
        choices: over tokens and EP sizes, for ``to_html``.
    """

    request: LowerRequest
    model: str
    reports: list[LoweringReport]
    unsupported: list[tuple[str, str]]
    errors: Errors | None
    facts: list[tuple[str, str]]
    captured: list[Captured] = dataclasses.field(default_factory=list)
    refused: str = ""
    choices: tuple[Row, ...] = ()

    @property
    def max_relative(self) -> float | None:
        """The larger of the logits' and the blocks' relative error."""
        return None if self.errors is None else max(self.errors.relative, self.errors.block_relative)

    def problems(self) -> list[str]:
        """Why the exit code is 1; empty when it is 0."""
        problems = [f"{module} is not lowered: {why}" for module, why in self.unsupported]
        blocks_by_reason: dict[str, list[str]] = {}
        for report in self.reports:
            for block in report.blocks:
                if block.comm is None:
                    blocks_by_reason.setdefault(_refusal(block, self.request.comm), []).append(block.name)
            problems += [f"{place} is not lowered: {why}" for place, why in report.unlowered]
        problems += [
            f"{names(list(dict.fromkeys(blocks)))} not lowered: {why}" for why, blocks in blocks_by_reason.items()
        ]
        if not problems and not any(report.blocks for report in self.reports):
            problems.append("no MoE block was found in the graph")
        if self.refused:
            problems.append(f"nothing was captured: {self.refused}")
        for rank, captured in enumerate(self.captured):
            problems += [f"rank {rank}: {problem}" for problem in captured.problems()]
        return problems + self._mismatches()

    def _mismatches(self) -> list[str]:
        if self.errors is None or self.max_relative is None:
            return []
        if self.request.quantised:
            return self._noise(self.errors)
        mismatches = []
        tolerance, rerouted = TOLERANCE[self.request.dtype], MAX_REROUTED[self.request.dtype]
        if self.max_relative > tolerance:
            mismatches.append(
                f"outputs differ: max_rel_error {self.max_relative:.3g} (logits {self.errors.relative:.3g}, blocks "
                f"{self.errors.block_relative:.3g}); accepted for {self.request.dtype}: {tolerance:g}"
            )
        if self.errors.rerouted > rerouted * self.errors.routed:
            mismatches.append(
                f"{self.errors.rerouted} of {self.errors.routed} tokens went to other experts; accepted for "
                f"{self.request.dtype}: {rerouted:.0%}"
            )
        return mismatches

    def _noise(self, errors: Errors) -> list[str]:
        """With quantised experts: too low a signal-to-noise ratio, and too many tokens with other experts."""
        quant = self.request.quant
        limits = (("blocks", errors.block_snr, SNR_FLOOR[quant]), ("logits", errors.snr, LOGITS_SNR_FLOOR))
        return [
            f"outputs differ: signal-to-noise ratio of {what} is {snr:.1f} dB; accepted for {quant}: {floor:g} or more"
            for what, snr, floor in limits
            if snr < floor
        ]

    def to_json(self) -> str:
        """One JSON object. The blocks and numbers are those of the first graph; no numbers where nothing was traced."""
        first = self.reports[0] if self.reports else None
        traced = first if first is not None and first.nodes_before else None
        fields: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "blocks": [block.to_json() for block in first.blocks] if first else [],
            "max_abs_error": None if self.errors is None else self.errors.absolute,
            "max_rel_error": self.max_relative,
            "snr_db": None if self.errors is None else min(self.errors.snr, self.errors.block_snr),
            "nodes_before": traced.nodes_before if traced else None,
            "nodes_after": traced.nodes_after if traced else None,
            "pass_ms": traced.pass_ms if traced else None,
            "not_capturable": [finding.to_json() for finding in traced.not_capturable] if traced else [],
            "foreign": [layer.to_json() for layer in traced.foreign] if traced else [],
            "captured": self.captured[0].to_json() if self.captured else None,
            "deployment": first.deployment_json() if first else None,
            "detected": first.to_json()["detected"] if first else [],
        }
        return json.dumps(fields, indent=2, allow_nan=False)

    def to_html(self) -> str:
        """A page with the blocks drawn, and the choice over tokens and EP sizes."""
        from moe_lowering.cli.html.lower_page import lower_page  # only a command that asked for a page pays for it

        return lower_page(self, self.choices)

    def to_text(self) -> str:
        """The report for a person."""
        parts = [self._header()]
        shown: list[LoweringReport] = []
        for report in self.reports:
            if any(_look_alike(report, other) for other in shown):
                continue
            shown.append(report)
            # The header has what the command said of the deployment, and what is assumed
            parts.append(render(report, deployment=False))
        if self.unsupported:
            parts.append(
                "\n".join(["not supported:", *(labelled_text(module, why) for module, why in self.unsupported)])
            )
        if self.captured:
            parts.append(
                "\n".join(["captured", *(labelled_text(label, text) for label, text in self.captured[0].rows())])
            )
        if self.refused:
            parts.append("\n".join(["captured", labelled_text("nothing", self.refused)]))
        parts.append(self._comparison())
        return "\n\n".join(parts)

    def _header(self) -> str:
        request = self.request
        ranks = f"ep {request.ep}" + (f", tp {request.tp}" if request.tp > 1 else "")
        experts = f", experts {request.quant}" if request.quantised else ""
        title = f"{self._what()}: comm {request.comm}, {ranks}, soc {request.soc}, {request.dtype}{experts}"
        return "\n".join([fold(title), *(labelled_text(label, text) for label, text in self.facts)])

    def _what(self) -> str:
        """The model, and what is not as published of the one that was lowered."""
        layers = self.request.layers
        if is_small(self.request):
            return f"a small {self.model}"
        return self.model if layers is None else f"{self.model} with {count_of(layers, 'layer')}"

    def _comparison(self) -> str:
        if self.errors is None:
            return "not compared: nothing was run" + (" (--fake)" if self.request.fake else "")
        tolerance, quant = TOLERANCE[self.request.dtype], self.request.quant
        weights = "experts not sharded" + (f", their {quant} weights dequantised" if self.request.quantised else "")
        accepted = "" if self.request.quantised else f"; accepted for {self.request.dtype}: {tolerance:g}"
        lines = [
            fold(f"compared with the model's own output (grouped_mm, {weights})"),
            labelled_text("max abs error", f"{self.errors.absolute:.3g} (logits)"),
            labelled_text(
                "max rel error",
                f"{self.errors.relative:.3g} (logits), {self.errors.block_relative:.3g} (MoE blocks){accepted}",
            ),
            labelled_text(
                "near ties",
                f"{self.errors.rerouted} of {self.errors.routed} tokens went to other experts (those of all ranks, each once "
                "per MoE layer)",
            ),
        ]
        if self.request.quantised:
            noise = f"{self.errors.snr:.1f} dB (logits), {self.errors.block_snr:.1f} dB (MoE blocks)"
            lines.append(
                labelled_text("signal to noise", f"{noise}; accepted: {LOGITS_SNR_FLOOR:g} and {SNR_FLOOR[quant]:g}")
            )
        return "\n".join(lines)


def _look_alike(a: LoweringReport, b: LoweringReport) -> bool:
    return (a.blocks, a.not_capturable, a.unlowered) == (b.blocks, b.not_capturable, b.unlowered)


def _refusal(block: BlockReport, names: str) -> str:
    """Why a block was left, with the messages of the implementation that was asked for."""
    verdict = block.verdicts.get(names)
    if verdict is None or verdict.legal:
        return block.reason
    return f"{names} was asked for and is not legal: " + "; ".join(map(str, distinct(verdict)))
