"""An ``Explanation`` as text for a person: wrapped to ``report_width``, coloured on request."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_lowering.explanation.description import BlockDescription
from moe_lowering.explanation.layout import LABEL, Paint, labelled_line, labelled_rows, wrap_text, wrap_texts
from moe_lowering.explanation.rules_text import decisive_lines, other_lines
from moe_lowering.number_words import UNITS, count_of
from moe_lowering.passes.quantities import dtype_name
from moe_lowering.report.deployment_text import deployment_facts
from moe_lowering.report.records import Verdict
from moe_lowering.report.text import Said, distinct, render_refusal, render_sizes, render_sources
from moe_lowering.report.width import report_width
from moe_lowering.vocabulary import AUTO, EXPERT_FORMATS, FIXED

if TYPE_CHECKING:  # they print themselves by this module
    from moe_lowering.explanation.answer import Answer
    from moe_lowering.explanation.records import Explanation
    from moe_lowering.explanation.sweep import Piece


def render(explanation: Explanation, why: str | None = None, colour: bool = False) -> str:
    """The whole report; with ``why``, every rule of that implementation instead of the broken ones of all."""
    paint = Paint(colour)
    answer = explanation.answer
    parts = [_header(explanation, paint)]
    parts += [] if why is None else [decisive_lines(answer, why, paint)]
    if explanation.changes:
        parts.append(labelled_rows("one change", change_texts(explanation)))
    parts += [_table(answer, paint), _choice_lines(explanation, paint)]
    if explanation.pieces is not None:
        parts.append(_sweep(explanation.pieces, explanation, paint))
    said = Said()
    if why is not None:
        parts.append(other_lines(answer, why, paint))
    else:
        parts += _refusals(explanation, said, paint)
    parts.append(labelled_rows("assumed", explanation.assumptions))
    parts += [paint(render_sources(said.sources), "dim")] if said.sources else []
    return "\n\n".join(parts)


def change_texts(explanation: Explanation) -> list[str]:
    """What one change would make each refused implementation legal; once where it is the same for all of them."""
    answer, changes = explanation.answer, explanation.changes
    none = "no single change of the deployment makes it legal"
    if answer.tokens == 0:
        none += " at T = 0, a step without tokens"
    texts = {
        name: f" would be legal with {' or '.join(change.text for change in found)}" if found else f": {none}"
        for name, found in changes.items()
    }
    if len(texts) == len(answer.judgement.verdicts) and all(changes.values()) and len(set(texts.values())) == 1:
        return ["each" + next(iter(texts.values()))]
    return [name + text for name, text in texts.items()]


def size_text(block: BlockDescription) -> str:
    """The sizes of a block on all ranks."""
    layers = count_of(block.layers, "MoE layer") if block.layers else "layers unknown"
    return (
        f"hidden {block.hidden}, intermediate {block.intermediate}, {count_of(block.experts, 'expert')}, top {block.top_k}, "
        f"{layers}, {dtype_name(block.dtype)}"
    )


def size_lines(block: BlockDescription) -> list[str]:
    """The same in a report: one line of 80 columns where they are those of a model."""
    return wrap_text(size_text(block), "  ", "    ")


def _header(explanation: Explanation, paint: Paint) -> str:
    answer, comm = explanation.answer, explanation.question.policy.comm
    spec, deployment = answer.spec, answer.deployment
    form = f"{spec.activation}{', gate and up interleaved' if spec.interleaved else ''}{', biases' if spec.has_bias else ''}"
    declared = (
        f", at most {deployment.max_tokens} declared" if deployment.max_tokens and deployment.equal_tokens else ""
    )
    tokens = (
        f"{count_of(answer.tokens, 'token')} on a rank{declared}"
        if deployment.equal_tokens
        else f"{deployment.min_tokens} to {deployment.max_tokens} tokens on a rank, not equal on all ranks"
    )
    policy = f"policy {explanation.question.policy.name}"
    if comm != AUTO:  # FIXED falls back on nothing, see --policy
        policy = f"{comm} asked for" + (", and nothing else" if explanation.question.policy.name == FIXED else "")
    quantised = f" in {spec.quantisation}" if EXPERT_FORMATS[spec.quantisation].quantised else ""
    title = textwrap.wrap(f"{explanation.block.title} on {deployment.soc}: {tokens}", report_width())
    fits = answer.memory(explanation.block.layers).fits
    return "\n".join(
        [
            *(paint(line, "bold") for line in title),
            *size_lines(explanation.block),
            labelled_line(
                "block",
                f"{count_of(spec.local_experts, 'expert')} on a rank{quantised}, {form}, routing weights in "
                f"{dtype_name(spec.routing_dtype)}",
            ),
            labelled_line(
                "deployment",
                ", ".join([*deployment_facts(deployment), policy]),
            ),
            *([] if fits else [paint(labelled_line("note", "it does not fit a rank's memory, see memory"), "red")]),
        ]
    )


def _table(answer: Answer, paint: Paint) -> str:
    """One row per implementation."""
    lines = [paint(f"  {'implementation':<{LABEL - 1}} {'verdict':<34} {'estimated cost':>16}", "dim")]
    for name, verdict in answer.judgement.verdicts.items():
        form = f", {verdict.form}" if verdict.form not in ("", name) else ""
        status = f"legal{form}" if verdict.legal else f"refused: {count_of(len(distinct(verdict)), 'rule')}"
        chosen = paint("  chosen", "bold") if name == answer.choice else ""
        price = answer.prices[name]
        cost = "not known" if price is None else f"{_us(price.us)} +- {_us(price.error_us)} us"
        beside = cost.rjust(50 - len(status))  # a long figure takes of the room of the verdict
        lines.append(f"  {name:<{LABEL - 1}} {paint.legal(status, verdict.legal)} {beside}{chosen}")
    return "\n".join(lines)


def _us(value: float) -> str:
    """Short where it is large: an absurd number of tokens is no reason for a line that does not fit."""
    return f"{value:.0f}" if value < 1e6 else f"{value:.3g}"


def _choice_lines(explanation: Explanation, paint: Paint) -> str:
    answer = explanation.answer
    lines = [labelled_line("choice", f"{answer.choice or 'NONE'} ({answer.reason})")]
    policy = explanation.question.policy
    if answer.requested is not None and policy.comm == AUTO:
        lines.append(labelled_line("policy", f"{policy.name} selects {answer.requested}"))
    if policy.comm == AUTO and policy.name == AUTO:
        lines.append(labelled_line("vllm-ascend", str(answer.beside_rule())))
    if (sizes := answer.sizes()) is not None:
        lines += render_sizes(sizes)
    costs = [str(cost) for cost in answer.costs()]
    if costs and answer.choice is None:
        costs.insert(0, "nothing is chosen; what is legal would take")
    lines += [labelled_line("" if at else "cost", cost) for at, cost in enumerate(costs)]
    lines.append(labelled_line("memory", str(answer.memory(explanation.block.layers))))
    lines.append(labelled_line("units", UNITS))
    label = f"{answer.choice or 'NONE'}"
    return "\n".join(lines).replace(f" {label}", " " + paint.legal(label, answer.choice is not None), 1)


def _sweep(pieces: Sequence[Piece], explanation: Explanation, paint: Paint) -> str:
    """The pieces, each with what ends it."""
    what = "T" if explanation.answer.deployment.equal_tokens else "declared bound of T"
    lines = [paint(f"  {what:<{LABEL - 1}} {'choice':<12} ends because of", "dim")]
    for piece in pieces:
        name = f"{piece.choice or 'none':<12}"
        start = f"  {f'{piece.low}..{piece.high}':<{LABEL - 1}} {name} "
        reasons = [f"[{code}] {text}" for code, text in zip(piece.boundary, piece.because, strict=True)] or ["-"]
        text = wrap_texts(start, reasons, " " * (LABEL + 15))
        lines.append(text.replace(name.strip(), paint.legal(name.strip(), piece.choice is not None), 1))
    return "\n".join(lines)


def _refusals(explanation: Explanation, said: Said, paint: Paint) -> list[str]:
    """Of each refused implementation; once where all of them break the same rules."""
    comm, verdicts = explanation.question.policy.comm, explanation.answer.judgement.verdicts
    rules = {tuple(str(violation) for violation in distinct(verdict)) for verdict in verdicts.values()}
    if comm == AUTO and len(rules) == 1 and not any(verdict.legal for verdict in verdicts.values()):
        return [_refusal("none is legal", next(iter(verdicts.values())), said, paint)]
    return [
        _refusal(f"not {name}", verdict, said, paint) if comm in (AUTO, name) else _codes(name, verdict)
        for name, verdict in verdicts.items()
        if not verdict.legal
    ]


def _refusal(label: str, verdict: Verdict, said: Said, paint: Paint) -> str:
    """The broken rules of an implementation, in the words of a lowering's report."""
    text = render_refusal(label, verdict, said)
    for code in dict.fromkeys(violation.code for violation in verdict.violations):
        text = text.replace(f"[{code}]", paint(f"[{code}]", "red"))
    return text


def _codes(name: str, verdict: Verdict) -> str:
    """The broken rules of an implementation that was not asked for: by their codes alone."""
    codes = list(dict.fromkeys(f"[{violation.code}]" for violation in distinct(verdict)))
    them = "it" if len(codes) == 1 else "them"
    return labelled_line(f"not {name}", f"{', '.join(codes)} (--why {name} says {them} in full)")
