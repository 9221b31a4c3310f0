"""``single_changes``: which one change of the deployment or the block would make a refused implementation legal.

A candidate is another value of one field: HCCL window, weight format, fused mode, an installed provider, quantisation,
dtype, capture, MC2 in two levels, EP size, SoC, tokens. The block is judged again with each, so a change that is
reported was tried and is not read off a message. Where several values of a field would do, the nearest is reported; tokens
are in ``token_changes``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from moe_lowering.deployment import Deployment
from moe_lowering.explanation.answer import Answer, Question
from moe_lowering.explanation.description import BlockDescription
from moe_lowering.explanation.errors import ExplainError
from moe_lowering.explanation.spec import block_spec
from moe_lowering.explanation.token_changes import describe_tokens, first_proven, most_tokens
from moe_lowering.limits import Prover
from moe_lowering.passes.legality import declared_tokens, free_tokens, judge
from moe_lowering.report.records import Verdict
from moe_lowering.vocabulary import EXPERT_FORMATS, FUSED_MODES, PROVIDER_VERSIONS, SOCS, WEIGHT_FORMATS

MOST_RANKS = 1024
# What a flag is in words, by its value.
_FLAGS = {
    "capture": {True: "captured graphs", False: "graphs that are not captured"},
    "mc2_hierarchy": {True: "MC2 in two levels", False: "MC2 in one level"},
}


@dataclasses.dataclass(frozen=True)
class Change:
    """One change, with which an implementation is legal.

    Attributes:
        field: of the ``Deployment``; ``quantisation`` or ``dtype`` of the block; or ``tokens``. value: the new one.
        text: both in words.
    """

    field: str
    value: Any
    text: str

    def to_json(self) -> dict[str, Any]:
        value = self.value if isinstance(self.value, (int, str, bool)) else str(self.value)
        return {"field": self.field, "value": value, "text": self.text}


def single_changes(question: Question, answer: Answer) -> dict[str, tuple[Change, ...]]:
    """By implementation that is refused in ``answer``; an empty tuple where no one change of those that are tried is enough."""
    refused = [name for name, verdict in answer.judgement.verdicts.items() if not verdict.legal]
    changes: dict[str, list[Change]] = {name: [] for name in refused}
    if not refused:
        return {}
    for change, block, deployment, tokens in _candidates(question, answer):
        missing = [name for name in refused if change.field not in (c.field for c in changes[name])]
        verdicts = _verdicts(block, deployment, tokens) if missing else {}
        for name in missing:
            if name in verdicts and verdicts[name].legal:
                changes[name].append(change)
    for name in refused:
        if (change_of_tokens := _fewer_tokens(question, answer.tokens, name)) is not None:
            changes[name].append(change_of_tokens)
    return {name: tuple(found) for name, found in changes.items()}


def _verdicts(block: BlockDescription, deployment: Deployment, tokens: int) -> dict[str, Verdict]:
    """Of all implementations; none where the block cannot be there in this deployment."""
    if deployment.routed_ranks < 1 or block.experts % deployment.routed_ranks:
        return {}
    spec = block_spec(block, deployment, tokens)
    judged: Any = tokens if deployment.equal_tokens else declared_tokens(deployment)
    return judge(spec, deployment, judged, Prover(), torch_npu=True).verdicts


def _candidates(question: Question, answer: Answer) -> Iterator[tuple[Change, BlockDescription, Deployment, int]]:
    """(the change, block, deployment and T with it), nearest values of a field first."""
    block, deployment, tokens = question.block, answer.deployment, answer.tokens

    def deployed(field: str, value: Any, text: str, **more: Any) -> Iterator[Any]:
        try:
            yield Change(field, value, text), block, deployment.replace(**{field: value}, **more), tokens
        except ValueError:
            return  # a deployment that cannot be, e.g. ranks with shared experts in a smaller group

    def described(field: str, value: Any, text: str) -> Iterator[Any]:
        try:
            changed = dataclasses.replace(block, **{field: value})
        except ExplainError:
            return  # e.g. biases, which quantised experts have not
        yield Change(field, value, text), changed, deployment, tokens

    for size in _needed_buffers(answer):
        yield from deployed("hccl_buffer_mb", size, f"HCCL_BUFFSIZE {size} MB")
    if deployment.equal_tokens and 0 < deployment.max_tokens < tokens:
        yield from deployed("max_tokens", tokens, f"at most {tokens} tokens declared")
    for name in WEIGHT_FORMATS:
        yield from deployed("weight_format", name, f"weights in {name}") if name != deployment.weight_format else ()
    for mode, name in FUSED_MODES.items():
        yield from deployed("fused_mode", mode, f"fused mode {mode} ({name})") if mode != deployment.fused_mode else ()
    for name, version in PROVIDER_VERSIONS.items():
        if name not in dict(deployment.providers):
            providers = (*deployment.providers, (name, version))
            yield from deployed("providers", providers, f"{name} {version} installed", installed=())
    for name in EXPERT_FORMATS:
        yield from described("quantisation", name, f"experts in {name}") if name != block.quantisation else ()
    if block.dtype != torch.bfloat16:
        yield from described("dtype", torch.bfloat16, "bfloat16")
    for field, texts in _FLAGS.items():
        value = not getattr(deployment, field)
        yield from deployed(field, value, texts[value])
    for size in _other_sizes(deployment, block.experts):
        yield from deployed("ep_size", size, f"EP {size}", ep_group="ep" if size > 1 else "")
    for soc in SOCS:
        yield from deployed("soc", soc, f"SoC {soc}", measured=()) if soc != deployment.soc else ()


def _needed_buffers(answer: Answer) -> list[int]:
    """Sizes of the HCCL window that broken rules name, the smallest first."""
    window_sizes = set()
    for verdict in answer.judgement.verdicts.values():
        sizes = [size for v in verdict.violations if (size := (v.to_json().get("buffer") or {}).get("needed_mb"))]
        if sizes:
            window_sizes.add(max(sizes))
    return sorted(window_sizes)


def _other_sizes(deployment: Deployment, experts: int) -> list[int]:
    """EP sizes that could hold the experts, those next to the deployment's first."""
    now = deployment.ep_size
    sizes = [
        size
        for size in range(1, min(experts + deployment.shared_expert_ranks, MOST_RANKS) + 1)
        if (routed := size - deployment.shared_expert_ranks) > 0
        and experts % routed == 0
        and size % deployment.tp_size == 0
    ]
    return sorted((size for size in sizes if size != now), key=lambda size: (max(size, now) / min(size, now), size))


def _fewer_tokens(question: Question, tokens: int, name: str) -> Change | None:
    """Fewer tokens (or a lower declared bound), or 1 in place of 0, with which an implementation is legal."""
    deployment = question.deployment
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
    if tokens == 0:
        return Change("tokens", most, f"T {most}")

    def is_proven(low: int, high: int) -> bool:
        judged = free_tokens(low, high)
        spec = dataclasses.replace(block_spec(question.block, deployment, high), tokens=judged)
        return judge(spec, deployment, judged, Prover(), torch_npu=True).verdicts[name].legal

    return Change("tokens", most, f"T {describe_tokens(first_proven(is_proven, least, most), least, most)}")
