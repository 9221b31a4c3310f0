"""A ``LoweringReport`` as text for a person: wrapped to ``report_width``; equal blocks stand once with their count, and
sources in a list at the end."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

from moe_lowering.limits import Violation
from moe_lowering.limits.wording import Accepted, Value
from moe_lowering.number_words import UNITS, count_of
from moe_lowering.report.deployment_text import deployment_text
from moe_lowering.report.leftovers import NotCapturable
from moe_lowering.report.module_names import names
from moe_lowering.report.records import BlockReport, LoweringReport, RouterReport, Verdict, renderers
from moe_lowering.report.sizes import Size, Sizes, Window
from moe_lowering.report.width import fold, report_width, wrap

_LABEL = 18  # columns of the left column
_INDENT = "  "
_BOUND_CHECK = "moe_lowering.assert_tokens"


def render(report: LoweringReport, deployment: bool = True) -> str:
    """The whole report: a headline, the deployment unless it was said before, each kind of block, what was not recognised, what
    the deployment was detected to be, and the sources of the broken rules."""
    said = Said()
    parts = [fold(_headline(report))]
    if deployment and report.deployment is not None:
        parts[0] += "\n" + labelled_text("deployment", deployment_text(report.deployment))
    parts += [_render_blocks(blocks, said) for blocks in equal_blocks(report.blocks)]
    if report.unlowered:
        lines = [labelled_text(place, why) for place, why in report.unlowered]
        parts.append("\n".join(["not recognised as an MoE block:", *lines]))
    if report.routers:
        parts.append("\n".join(["routers:", *_render_routers(report.routers)]))
    if report.not_capturable:
        lines = [_render_finding(finding) for finding in report.not_capturable]
        parts.append("\n".join(["cannot be captured:", *lines]))
    if any(block.sizes is not None for block in report.blocks):
        parts.append(labelled_text("units", UNITS))
    if report.detected:
        lines = [labelled_text(detected.field, f"{detected.value} ({detected.source})") for detected in report.detected]
        parts.append("\n".join(["the deployment, as it was detected", *lines]))
    if said.sources:
        parts.append(render_sources(said.sources))
    return "\n\n".join(parts)


class Said:
    """What a report says once: sources, in the order of their numbers, and of each block a refusal."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self._first: dict[str, str] = {}

    def begin_block(self) -> None:
        """What was said of another block is said again."""
        self._first = {}

    def refusal(self, label: str, violation: Violation) -> str:
        """A broken rule as docs/refusals.md has it; its code alone where another implementation was refused by the same."""
        advice = f"{violation.advice}; " if violation.advice else ""
        text = f"[{violation.code}] {violation.message}{missing_values(violation)} ({advice}source {self._number(violation)})"
        first = self._first.setdefault(text, label)
        return text if first == label else f"[{violation.code}] as for {first.removeprefix('not ')}"

    def _number(self, violation: Violation) -> int:
        if violation.source not in self.sources:
            self.sources.append(violation.source)
        return self.sources.index(violation.source) + 1


def render_sources(sources: Sequence[str]) -> str:
    """The list at the end that refusals give numbers of."""
    lines = [labelled_text(f"source {number}", source) for number, source in enumerate(sources, 1)]
    return "\n".join(["sources of the broken rules", *lines])


def _headline(report: LoweringReport) -> str:
    blocks = count_of(len(report.blocks), "MoE block")
    if not report.nodes_before:
        return f"{blocks}, judged from the command's options alone: nothing was built, traced or run"
    nodes = f"{count_of(report.nodes_before, 'graph node')} became {report.nodes_after}"
    return f"{blocks}; {nodes}; the pass took {report.pass_ms:.1f} ms"


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


def _render_blocks(blocks: Sequence[BlockReport], said: Said) -> str:
    block = blocks[0]
    said.begin_block()
    times = f"  x{len(blocks)}" if len(blocks) > 1 else ""
    lines = textwrap.wrap(_title(blocks) + times, report_width(), break_on_hyphens=False)
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
            is_legal = verdict.legal
            lines.append(
                labelled_text("also legal", name) if is_legal else render_refusal(f"not {name}", verdict, said)
            )
        if name == block.comm or not verdict.legal:
            lines += _render_ruled_out(name, verdict)
    lines += [labelled_text("" if at else "cost", str(cost), hanging="    ") for at, cost in enumerate(block.costs)]
    lines += [labelled_text("note", note) for note in block.notes]
    return "\n".join(lines)


def _title(blocks: Sequence[BlockReport]) -> str:
    """Where the blocks are in the model; of a graph without modules, such as make_fx's, at which node they end."""
    places = names([block.name for block in blocks])
    of_nodes = all(any(node.name == block.name for node in block.nodes_before) for block in blocks)
    return f"MoE block that ends at graph node {places}" if of_nodes else places


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
    if sizes.tp_size > 1:
        parts.append(f"capacity {_size(sizes.capacity)} on each of {sizes.tp_size} TP ranks")
    parts.append(f"a rank receives up to {count_of(_size(sizes.received), 'row')}")
    if sizes.exchanged is not None:
        parts.append(f"{count_of(_size(sizes.exchanged), 'row')} to each rank")
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
    """How much of HCCL_BUFFSIZE a rule asks for; where nothing bounds T, the bytes of each instead."""
    buffer_mb = f"{buffer_bytes / 2**20:g} MB"
    if window.needed_mb is None:
        return f"[{window.code}] {_size(window.needed)} of {window.accepted} {window.unit}; HCCL_BUFFSIZE {buffer_mb}"
    of = "" if window.needed.fixed else f" for {_size(window.needed)} bytes"
    return f"[{window.code}] HCCL_BUFFSIZE of {window.needed_mb} MB would do{of}; it is {buffer_mb}"


def distinct(verdict: Verdict) -> list[Violation]:
    """Each broken rule once, as many are the same at both ends of an exchange."""
    rules: dict[tuple[str, Value, Accepted], Violation] = {}
    for violation in verdict.violations:
        rules.setdefault((violation.code, violation.value, violation.limit), violation)
    return list(rules.values())


def render_refusal(label: str, verdict: Verdict, said: Said) -> str:
    """Every broken rule of an implementation."""
    return "\n".join(
        labelled_text("" if at else label, said.refusal(label, violation), hanging="    ")
        for at, violation in enumerate(distinct(verdict))
    )


def missing_values(violation: Violation) -> str:
    """What was looked at, its value and what is accepted, of a rule whose message does not hold that; of what is computed from
    several quantities without the expression, which is a line of its own."""
    accepted = violation.limit.say(violation.names)
    if violation.limit.is_flag or violation.tells_limit or accepted in violation.message:
        return ""
    what = violation.quantity if violation.quantity.isidentifier() else "value"
    return f"; {what} is {violation.show()}; accepted: {accepted}"


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
    """A label, and a text beside it that is wrapped under itself, after its first line ``hanging`` deeper; below a label that
    is longer than its column."""
    above = [] if len(label) < _LABEL else [_INDENT + label]
    start = f"{_INDENT}{'' if above else label:<{_LABEL - 1}} "
    rest = " " * len(f"{_INDENT}{'':<{_LABEL}}") + hanging
    wrapped = wrap(text, start, rest)
    return "\n".join(above + (wrapped or ([] if above else [start.rstrip()])))


renderers.append(render)
