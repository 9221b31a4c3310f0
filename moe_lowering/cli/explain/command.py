"""Carries out an ``ExplainRequest``: calls ``moe_lowering.explanation`` with it, and makes the report to print."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from moe_lowering.cli.assumed_machine import assumed_differences
from moe_lowering.cli.deployments import make_deployment
from moe_lowering.cli.explain.arguments import missing_sizes
from moe_lowering.cli.explain.request import ExplainRequest
from moe_lowering.cli.explain.table_text import render_table
from moe_lowering.cli.html.explain_page import explain_page, table_page
from moe_lowering.cli.terminal import use_colour
from moe_lowering.cli.usage import UsageError
from moe_lowering.deployment import Deployment
from moe_lowering.explanation import TOKENS, ExplainError, Explanation, MissingSizesError, describe, explain
from moe_lowering.explanation.answer import Question
from moe_lowering.explanation.description import SIZES, BlockDescription
from moe_lowering.explanation.table import Row, choices_around, tabulate
from moe_lowering.explanation.text import render
from moe_lowering.limits import TokenRange
from moe_lowering.report.schemas import SCHEMA_VERSION

# How the command line spells what the library calls by these names.
OPTIONS = {
    "model": "MODEL",
    "hidden": "--hidden",
    "intermediate": "--intermediate",
    "experts": "--experts",
    "top_k": "--topk",
    "quantisation": "--quant",
    "tokens": "--tokens",
    "sweep": "--sweep",
    "dtype": "--dtype",
}


@dataclasses.dataclass(frozen=True)
class ExplainReport:
    """What an ``explain`` command found."""

    request: ExplainRequest
    explanation: Explanation
    around: tuple[Row, ...] = ()  # the choice over tokens and EP sizes around this deployment, for to_html

    def problems(self) -> list[str]:
        """Why the exit code is 1; empty when it is 0."""
        answer = self.explanation.answer
        return [] if answer.choice is not None else [answer.reason]

    def to_text(self) -> str:
        """The report for a person."""
        return render(self.explanation, self.request.why, colour=use_colour(self.request.color))

    def to_html(self) -> str:
        """A page."""
        return explain_page(self.explanation, self.around)

    def to_json(self) -> str:
        """One JSON object."""
        fields = self.explanation.to_json()
        if self.request.why is not None:
            fields["why"] = self.explanation.answer.rules_json(self.request.why)
        return json.dumps(fields, indent=2, allow_nan=False)


@dataclasses.dataclass(frozen=True)
class TableReport:
    """What an ``explain`` command about several deployments found. ``first`` is the answer for the first of them."""

    request: ExplainRequest
    first: Explanation
    rows: tuple[Row, ...]

    def problems(self) -> list[str]:
        """Why the exit code is 1: no deployment has a choice for any T."""
        return [] if any(row.choice for row in self.rows) else ["no implementation is legal in any of the deployments"]

    def to_text(self) -> str:
        """The report for a person."""
        return render_table(self.first, self.rows, colour=use_colour(self.request.color))

    def to_html(self) -> str:
        """A page."""
        return table_page(self.first, self.rows)

    def to_json(self) -> str:
        """One JSON object."""
        first = self.first.to_json()
        fields = {
            "schema_version": SCHEMA_VERSION,
            "model": first["model"],
            "block": {name: value for name, value in first["block"].items() if name in BLOCK_FIELDS},
            "assumptions": first["assumptions"],
            "rows": [row.to_json() for row in self.rows],
        }
        return json.dumps(fields, indent=2, allow_nan=False)


# Of the block in JSON: what is the same in all deployments.
BLOCK_FIELDS = ("hidden", "intermediate", "experts", "top_k", "activation", "interleaved", "has_bias", "dtype")


def run_explain(
    request: ExplainRequest, progress: Callable[[str], None] = lambda message: None
) -> ExplainReport | TableReport:
    """Carry out a command.

    Raises:
        UsageError: the block or a deployment is not possible.
    """
    if not request.is_table:
        progress("judging the implementations")
        report = _explain(request)
        if request.html is None:
            return report
        progress("working out the choice over tokens and EP sizes for the page")
        return dataclasses.replace(report, around=_choices_around(report))
    reports = [_explain(each) for each in request.each()]
    counts = request.counts or ((TOKENS, TOKENS),)
    if request.unequal_tokens:
        counts = ((request.max_tokens, request.max_tokens),)
    rows = tabulate(_questions(reports, progress), [TokenRange(*count) for count in counts])
    assumed = dict.fromkeys(text for report in reports for text in report.explanation.assumptions)
    return TableReport(request, dataclasses.replace(reports[0].explanation, assumptions=tuple(assumed)), rows)


def _choices_around(report: ExplainReport) -> tuple[Row, ...]:
    explanation, sweep = report.explanation, report.request.sweep
    return choices_around(explanation.question, explanation.answer.tokens, TokenRange(*sweep) if sweep else None)


def _questions(reports: Sequence[ExplainReport], progress: Callable[[str], None]) -> Iterator[Question]:
    """The question of each deployment, of which ``progress`` is told when it is taken."""
    for number, report in enumerate(reports, 1):
        one = report.request
        progress(f"deployment {number} of {len(reports)}: {one.soc}, EP {one.ep}, {one.quant}")
        yield report.explanation.question


def _explain(request: ExplainRequest) -> ExplainReport:
    try:
        block = _describe(request)
        deployment = _deployment(request, block.experts)
        explanation = explain(
            block,
            deployment,
            tokens=None if request.unequal_tokens else request.tokens,
            comm=request.comm,
            policy=request.policy,
            sweep=request.sweep,
        )
    except MissingSizesError as error:
        raise missing_sizes(error.model, [OPTIONS[size] for size in error.sizes]) from error
    except ExplainError as error:
        # A size that has no option comes from the model
        option = OPTIONS.get(error.argument, f"MODEL: {error.argument}")
        raise UsageError(f"argument {option}: {error.problem}") from error
    return ExplainReport(request, explanation)


def _describe(request: ExplainRequest) -> BlockDescription:
    sizes: dict[str, int | None] = {size: getattr(request, OPTIONS[size].removeprefix("--")) for size in SIZES}
    options: dict[str, Any] = {"quantisation": request.quant, **sizes}
    if request.dtype is not None:
        options["dtype"] = getattr(torch, request.dtype)
    try:
        block = describe(request.model, **options)
    except ImportError:  # some configs import torch_npu, which needs CANN or its stand-in
        from moe_lowering.cli.simulation import enable_simulator

        enable_simulator(request.soc)
        block = describe(request.model, **options)
    return dataclasses.replace(block, assumptions=(*block.assumptions, *_assumptions(request)))


def _deployment(request: ExplainRequest, experts: int) -> Deployment:
    if experts % request.ep:
        raise UsageError(f"argument --ep: is {request.ep}; accepted: a divisor of the number of experts, {experts}")
    try:
        return make_deployment(
            request,
            ep_group="ep" if request.ep > 1 else "",
            mc2_group="mc2",
            tp_group="tp" if request.tp > 1 else "",
            capture=request.capture,
        )
    except ValueError as error:  # the error's text names the field, the value and what is accepted
        raise UsageError(str(error).removeprefix("Deployment: ")) from error


def _assumptions(request: ExplainRequest) -> list[str]:
    """What the command did not say of the machine, and was taken to be so."""
    return [*request.taken_as, *assumed_differences(request)]
