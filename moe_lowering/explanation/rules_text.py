"""``explain --why``: every rule of one implementation as text, what decides first.

1. ``decisive_lines``: the broken rules; of a legal implementation, those that are nearest to their upper limit.
2. ``other_lines``: the rules that hold, the operators' own before those of any block. Those that compare the block with the
   deployment that it was described for cannot be broken here, and are named only.
"""

from __future__ import annotations

from collections.abc import Iterable

from moe_lowering.explanation.answer import Answer
from moe_lowering.explanation.layout import Paint, labelled_rows, wrap_text, wrap_texts
from moe_lowering.limits.findings import Finding
from moe_lowering.limits.wording import show_word
from moe_lowering.number_words import count_of

_NEAR = 0.25  # of what is accepted, from which on a rule is told as near to its limit
_MOST_NEAR = 3
_OF_ANY_BLOCK = "deployment"  # the operator that the limit tables name for them


def decisive_lines(answer: Answer, name: str, paint: Paint) -> str:
    """Whether an implementation is legal, and the rules that decide on it."""
    verdict = answer.judgement.verdicts[name]
    findings = _once(answer.findings(name))
    broken = [finding for finding in findings if not finding.holds]
    count = count_of(len(findings), "rule")
    if verdict.legal:
        lines = [paint.legal(f"  why {name} is legal: all of its {count} hold", True)]
        if near := _nearest(findings):
            lines += [labelled_rows("nearest limits", near)]
        return "\n".join(lines)
    are = "is" if len(broken) == 1 else "are"
    lines = [paint.legal(f"  why {name} is refused: {len(broken)} of its {count} {are} broken", False)]
    lines += [_finding_lines(answer, name, finding, paint, finding.limit.operator) for finding in broken]
    return "\n".join(lines)


def other_lines(answer: Answer, name: str, paint: Paint) -> str:
    """The rules that hold, by operator, and the forms that the deployment rules out."""
    verdict = answer.judgement.verdicts[name]
    all_held = [finding for finding in answer.findings(name) if finding.holds]
    new = {id(finding) for finding in _once(all_held)}
    by_operator: dict[str, list[Finding]] = {}
    for finding in all_held:
        by_operator.setdefault(finding.limit.operator, []).append(finding)
    lines = [paint.legal(f"  the rules of {name} that hold", True)]
    for operator in sorted(by_operator, key=lambda operator: operator == _OF_ANY_BLOCK):
        findings = by_operator[operator]
        told = [f for f in findings if id(f) in new and not _compares_with_itself(f)]
        same = [f for f in findings if id(f) in new and _compares_with_itself(f)]
        above = len(findings) - len(told) - len(same)
        again = f" (and {count_of(above, 'rule')} shown above)" if above else ""
        title = "any block" if operator == _OF_ANY_BLOCK else operator
        lines += ["", paint(f"  {title}{again}", "bold")]
        lines += [_finding_lines(answer, name, finding, paint) for finding in told]
        if same:
            codes = ", ".join(f"[{finding.limit.code}]" for finding in same)
            text = f"{codes}: compare a traced block with the deployment; here it is described for this very one"
            lines += wrap_text(text, "    given   ", " " * 14)
    for form, violations in verdict.ruled_out:
        lines += ["", paint(f"  form {form}, which the deployment rules out", "bold")]
        lines += wrap_texts("    ", [f"[{v.code}] {v.message} ({v.advice})" for v in violations], " " * 6).splitlines()
    return "\n".join(lines)


def _once(findings: Iterable[Finding]) -> list[Finding]:
    """Each rule with its value once: many are the same at both ends of an exchange."""
    first: dict[tuple[object, ...], Finding] = {}
    for finding in findings:
        first.setdefault((finding.limit.code, finding.value, finding.accepted), finding)
    return list(first.values())


def _compares_with_itself(finding: Finding) -> bool:
    """Whether a rule asks that a block and its deployment say the same, which they do where the one is made from the other."""
    limit = finding.limit
    return limit.equals is not None and any(name.startswith("deployment_") for name in limit.equals.names)


def _nearest(findings: Iterable[Finding]) -> list[str]:
    """The rules whose value is a large part of the most that is accepted, the nearest first."""
    parts = [(part, finding) for finding in findings if (part := _part(finding)) >= _NEAR]
    parts.sort(key=lambda each: -each[0])
    return [f"[{finding.limit.code}] {_near(finding)} ({part:.0%})" for part, finding in parts[:_MOST_NEAR]]


def _near(finding: Finding) -> str:
    what, most, unit = finding.limit.value.text, finding.accepted.max, finding.accepted.unit
    assert most is not None
    name = what if what.isidentifier() else "value"  # the whole expression stands below
    return f"{name} is {show_word(finding.value)} of at most {most.say()}{f' {unit}' if unit else ''}"


def _part(finding: Finding) -> float:
    """The value as a part of the most that is accepted; 0 where it is no number, or nothing above it is refused."""
    most = None if finding.accepted.max is None else finding.accepted.max.value
    if isinstance(finding.value, bool) or not isinstance(finding.value, int) or not isinstance(most, int) or most <= 0:
        return 0.0
    return finding.value / most


def _value(finding: Finding) -> str:
    return f"{finding.limit.value.text} is {show_word(finding.value)}; accepted: {finding.accepted}"


def _finding_lines(answer: Answer, name: str, finding: Finding, paint: Paint, operator: str = "") -> str:
    """One rule; of a broken one its operator, its message and what to change, too."""
    limit = finding.limit
    mark = f"{'holds' if finding.holds else 'BROKEN':<7}"
    texts = [f"[{limit.code}] {_value(finding)}"]
    if limit.value.text == str(finding.value):  # a rule for certain versions, in which nothing is accepted
        texts = [f"[{limit.code}] never legal there"]
    if not finding.holds:
        violations = answer.judgement.verdicts[name].violations
        violation = next((v for v in violations if (v.operator, v.code) == (limit.operator, limit.code)), None)
        # a verdict of where an implementation cannot be at all (SoC, one rank) has that alone, without what follows from it
        texts += [violation.message] if violation is not None and limit.says else [f"of {operator}"]
        texts += [f"change: {violation.advice}"] if violation is not None and violation.advice else []
    lines = wrap_texts(f"    {mark} ", texts, " " * 14)
    source = "\n".join(wrap_text(f"source: {limit.source}", " " * 14, " " * 16))
    return f"{lines.replace(mark, paint.legal(mark, finding.holds), 1)}\n{paint(source, 'dim')}"
