"""``single_changes``: which one change of the deployment or the block would make a refused implementation legal.

A candidate is another value of one field (``candidate_changes``). The block is judged again with each, so a change that is
reported was tried and is not read off a message. Where several values of a field would do, the nearest is reported; tokens
are in ``token_changes``. What is found is in the order of ``candidate_changes.EFFORT``, what takes least to do first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_lowering.deployment import Deployment
from moe_lowering.explanation.answer import Answer, Question
from moe_lowering.explanation.candidate_changes import FIELDS, Change, candidates
from moe_lowering.explanation.description import BlockDescription
from moe_lowering.explanation.spec import block_spec
from moe_lowering.explanation.token_changes import describe_tokens, first_proven, most_tokens
from moe_lowering.limits import Prover
from moe_lowering.passes.legality import declared_tokens, free_tokens, judge
from moe_lowering.report.records import Verdict
from moe_lowering.vocabulary import WHEEL_BUILDS

FUSED = "fused_mc2"  # whose operators a library brings


def single_changes(question: Question, answer: Answer) -> dict[str, tuple[Change, ...]]:
    """By implementation that is refused in ``answer``; an empty tuple where no one change of those that are tried is enough."""
    refused = [name for name, verdict in answer.judgement.verdicts.items() if not verdict.legal]
    changes: dict[str, list[Change]] = {name: [] for name in refused}
    if not refused:
        return {}
    for change, block, deployment in candidates(question.block, answer):
        missing = [name for name in refused if change.field not in (c.field for c in changes[name])]
        verdicts = _verdicts(block, deployment, answer.tokens) if missing else {}
        for name in missing:
            if name in verdicts and verdicts[name].legal:
                changes[name].append(_with_builds(change, deployment) if name == FUSED else change)
    for name in refused:
        if (change_of_tokens := _fewer_tokens(question, answer.tokens, name)) is not None:
            changes[name].append(change_of_tokens)
    return {name: tuple(sorted(found, key=lambda c: FIELDS.index(c.field))) for name, found in changes.items()}


def _with_builds(change: Change, deployment: Deployment) -> Change:
    """A change to another SoC, with what a fused operator wants beside it: its library's wheels are builds for one SoC alone."""
    others = [name for name, _ in deployment.providers if WHEEL_BUILDS.get(name, deployment.soc) != deployment.soc]
    if change.field != "soc" or not others:
        return change
    return dataclasses.replace(change, text=f"{change.text}, with {' and '.join(others)} built for it")


def _verdicts(block: BlockDescription, deployment: Deployment, tokens: int) -> dict[str, Verdict]:
    """Of all implementations; none where the block cannot be there in this deployment."""
    if deployment.routed_ranks < 1 or block.experts % deployment.routed_ranks:
        return {}
    spec = block_spec(block, deployment, tokens)
    judged: Any = tokens if deployment.equal_tokens else declared_tokens(deployment)
    return judge(spec, deployment, judged, Prover(), torch_npu=True).verdicts


def _fewer_tokens(question: Question, tokens: int, name: str) -> Change | None:
    """Fewer tokens (or a lower declared bound), with which an implementation is legal. Of a step without tokens none."""
    deployment = question.deployment
    if tokens == 0:
        return None
    least = 1 if deployment.equal_tokens else max(1, deployment.min_tokens)

    def is_legal(count: int) -> bool:
        changed = deployment if deployment.equal_tokens else deployment.replace(max_tokens=count)
        verdicts = _verdicts(question.block, changed, count)
        return name in verdicts and verdicts[name].legal

    most = most_tokens(is_legal, least, tokens)
    if most is None:
        return None
    if not deployment.equal_tokens:  # a verdict for a bound is one for all T within it
        return Change("max_tokens", most, f"at most {most} tokens declared")

    def is_proven(low: int, high: int) -> bool:
        judged = free_tokens(low, high)
        spec = dataclasses.replace(block_spec(question.block, deployment, high), tokens=judged)
        return judge(spec, deployment, judged, Prover(), torch_npu=True).verdicts[name].legal

    return Change("tokens", most, f"T {describe_tokens(first_proven(is_proven, least, most), least, most)}")
