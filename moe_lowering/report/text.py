"""A ``LoweringReport`` as text for a person: wrapped to ``report_width``; equal blocks stand once with their count, and
sources in a list at the end."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

from moe_lowering.limits import Violation
from moe_lowering.limits.wording import Accepted, Value
from moe_lowering.report.leftovers import NotCapturable
from moe_lowering.report.module_names import names
from moe_lowering.report.records import BlockReport, LoweringReport, RouterReport, Verdict, renderers
from moe_lowering.report.sizes import Size, Sizes, Window
from moe_lowering.report.width import fold, report_width, wrap

_LABEL = 18  # columns of the left column
_INDENT = "  "
_BOUND_CHECK = "moe_lowering.assert_tokens"


def render(report: LoweringReport) -> str:
    """The whole report: a headline, each kind of block, what was not recognised, what the deployment was detected to be, and
    the sources of the broken rules."""
    sources: list[str] = []
    parts = [fold(_headline(report))]
    parts += [_render_blocks(blocks, sources) for blocks in equal_blocks(report.blocks)]
    if report.unlowered:
        lines = [labelled_text(place, why) for place, why in report.unlowered]
        parts.append("\n".join(["not recognised as an MoE block:", *lines]))
    if report.routers:
        parts.append("\n".join(["routers:", *_render_routers(report.routers)]))
    if report.not_capturable:
        lines = [_render_finding(finding) for finding in report.not_capturable]
        parts.append("\n".join(["cannot be captured:", *lines]))
    if report.detected:
        lines = [labelled_text(detected.field, f"{detected.value} ({detected.source})") for detected in report.detected]
        parts.append("\n".join(["the deployment, as it was detected", *lines]))
    if sources:
        lines = [labelled_text(f"source {number}", source) for number, source in enumerate(sources, 1)]
        parts.append("\n".join(["sources of the broken rules", *lines]))
    return "\n\n".join(parts)


def count_of(number: int, what: str) -> str:
    """A number of things in words: ``1 layer``, ``2 layers``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _headline(report: LoweringReport) -> str:
    blocks = count_of(len(report.blocks), "MoE block")
    if not report.nodes_before:
        return f"{blocks}, judged from the command's options alone: nothing was built, traced or run"
    return f"{blocks}; {report.nodes_before} graph nodes became {report.nodes_after}; the pass took {report.pass_ms:.1f} ms"


def _render_routers(routers: Sequence[RouterReport]) -> list[str]:
    """Routers that differ in their place only, together."""
    alike: dict[RouterReport, list[str]] = {}
    for router in routers:
        alike.setdefault(dataclasses.replace(router, place=""), []).append(router.place)
    lines = []
    for router, places in alike.items():
        lines.append(labelled_text(names(places), router.says()))
        lines += [labelled_text("", note) for note in router.notes]
    return lines


def equal_blocks(blocks: Sequence[BlockReport]) -> list[list[BlockReport]]:
    """Blocks that differ in their name only, together, in order of first appearance."""
    groups: list[list[BlockReport]] = []
    for block in blocks:
        for group in groups:
            if _are_equal(group[0], block):
                group.append(block)
                break
        else:
            groups.append([block])
    return groups


def _are_equal(a: BlockReport, b: BlockReport) -> bool:
    fields = ("comm", "reason", "ops_before", "verdicts", "notes", "enforced", "sizes", "raised_from")
    return all(getattr(a, field) == getattr(b, field) for field in fields) and _own_ops(a) == _own_ops(b)


def _render_finding(finding: NotCapturable) -> str:
    lines = [labelled_text(finding.place, f"[{finding.code}] {finding.reason} ({finding.advice})", hanging="    ")]
    return "\n".join(lines + ([labelled_text("", finding.line)] if finding.line else []))


def _own_ops(block: BlockReport) -> list[str]:
    """Operators after lowering without the check of the token bound, which the first block carries for the graph."""
    return [op for op in block.ops_after if op != _BOUND_CHECK]


def _render_blocks(blocks: Sequence[BlockReport], sources: list[str]) -> str:
    block = blocks[0]
    times = f"  x{len(blocks)}" if len(blocks) > 1 else ""
    lines = textwrap.wrap(names([b.name for b in blocks]) + times, report_width(), break_on_hyphens=False)
    lines.append(labelled_text("implementation", f"{_implementation(block)} ({block.reason})"))
    if block.raised_from:
        lines.append(labelled_text("raised from", block.raised_from))
    if block.ops_before:
        lines.append(labelled_text(f"before ({len(block.ops_before)})", " > ".join(block.ops_before)))
    if block.comm is not None:
        ops = _own_ops(block)
        lines.append(labelled_text(f"after ({len(ops)})", " > ".join(ops)))
        if any(len(_own_ops(b)) < len(b.ops_after) for b in blocks):
            lines.append(labelled_text("once per graph", f"{_BOUND_CHECK}: refuses to run outside of {block.enforced}"))
    if block.sizes is not None:
        lines += render_sizes(block.sizes)
    for name, verdict in block.verdicts.items():
        if name != block.comm:
            lines.append(_render_verdict(name, verdict, sources))
        if name == block.comm or not verdict.legal:
            lines += _render_ruled_out(name, verdict)
    lines += [labelled_text("" if at else "cost", str(cost), hanging="    ") for at, cost in enumerate(block.costs)]
    lines += [labelled_text("note", note) for note in block.notes]
    return "\n".join(lines)


def _implementation(block: BlockReport) -> str:
    if block.comm is None:
        return "NOT LOWERED"
    form = block.verdicts[block.comm].form if block.comm in block.verdicts else ""
    return f"{block.comm}, {form}" if form not in ("", block.comm) else block.comm


def render_sizes(sizes: Sizes) -> list[str]:
    """Capacity, receive bound and HCCL window of a lowered block."""
    tokens = str(sizes.tokens)
    parts = [sizes.range if sizes.tokens.fixed or tokens == "T" else f"T = {tokens}, {sizes.range}"]
    if sizes.bound != sizes.high:
        parts.append(f"at most {sizes.bound} on any rank")
    parts.append(f"capacity {_size(sizes.capacity)} per TP rank")
    parts.append(f"a rank receives up to {_size(sizes.received)} rows")
    if sizes.exchanged is not None:
        parts.append(f"{_size(sizes.exchanged)} lines to each rank")
    if sizes.max_output_size is not None:
        parts.append(f"max_output_size {sizes.max_output_size}")
    lines = [labelled_text("sizes", "; ".join(parts))]
    for window in sizes.windows:
        lines.append(
            labelled_text("" if len(lines) > 1 else "HCCL window", _window(window, sizes.buffer_bytes), hanging="    ")
        )
    return lines


def _size(size: Size) -> str:
    return str(size) if size.fixed else f"{size} ({'no bound' if size.most is None else f'at most {size.most}'})"


def _window(window: Window, buffer_bytes: int) -> str:
    enough = "" if window.needed_mb is None else f" ({window.needed_mb} would do)"
    return (
        f"[{window.code}] {_size(window.needed)} of {window.accepted} {window.unit}; HCCL_BUFFSIZE "
        f"{buffer_bytes / 2**20:g} MB{enough}"
    )


def _render_verdict(name: str, verdict: Verdict, sources: list[str]) -> str:
    if verdict.legal:
        return labelled_text("also legal", name)
    lines: list[str] = []
    shown_rules: set[tuple[str, Value, Accepted]] = set()
    for violation in verdict.violations:
        key = (violation.code, violation.value, violation.limit)
        if key in shown_rules:  # the same rule is broken at both ends of an exchange: shown once
            continue
        shown_rules.add(key)
        label = f"not {name}" if not lines else ""
        advice = f"{violation.advice}; " if violation.advice else ""
        where = f"({advice}source {_number(violation, sources)})"
        text = f"[{violation.code}] {violation.message}{missing_values(violation)} {where}"
        lines.append(labelled_text(label, text, hanging="    "))
    return "\n".join(lines)


def _number(violation: Violation, sources: list[str]) -> int:
    """The place of a violation's source in the list at the end, which it is added to."""
    if violation.source not in sources:
        sources.append(violation.source)
    return sources.index(violation.source) + 1


def missing_values(violation: Violation) -> str:
    """The value and the limit of a rule whose message does not hold them."""
    message, value, limit = violation.message, violation.show(), violation.limit.say(violation.names)
    if violation.limit.is_flag or limit in message:
        return ""
    return f"; {'' if value in message else f'value {value}, '}limit {limit}"


def _render_ruled_out(name: str, verdict: Verdict) -> list[str]:
    """The forms that the deployment excludes, unless the whole implementation is refused, whatever its form."""
    if any(violation.operator in (name, "deployment") for violation in verdict.violations):
        return []
    return [
        labelled_text(f"nor {form}", f"[{violation.code}] {violation.message}", hanging="    ")
        for form, violations in verdict.ruled_out
        for violation in violations
    ]


def labelled_text(label: str, text: str, hanging: str = "") -> str:
    """A label, and a text beside it that is wrapped under itself, after its first line ``hanging`` deeper."""
    start = f"{_INDENT}{label:<{_LABEL - 1}} "
    rest = " " * len(f"{_INDENT}{'':<{_LABEL}}") + hanging
    wrapped = wrap(text, start, rest)
    return "\n".join(wrapped) if wrapped else start.rstrip()


renderers.append(render)
