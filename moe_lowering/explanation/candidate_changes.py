"""What ``single_changes`` tries: other values of one field of a deployment or a block, what takes least to do first.

``EFFORT`` is the order, and ``docs/deployment.md`` says it to users. A setting of the next start comes before what must be
installed; that before smaller steps; those before other weights, with which results differ; those before another number of
ranks, and that before another machine. An older SoC is not tried: nobody changes to one. Of one field the nearest value that is
legal counts, which is why values come in that order, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from moe_lowering.deployment import Deployment
from moe_lowering.explanation.answer import Answer
from moe_lowering.explanation.description import BlockDescription
from moe_lowering.explanation.errors import ExplainError
from moe_lowering.limits.versions import compare_versions
from moe_lowering.providers import same_version
from moe_lowering.vocabulary import (
    CANN_VERSIONS,
    EXPERT_FORMATS,
    FUSED_MODES,
    PROVIDER_VERSIONS,
    SOCS,
    TOKEN_UNPERMUTE,
    WEIGHT_FORMATS,
    WHEEL_BUILDS,
)

MOST_RANKS = 1024
# The fields of changes, least to do first; a test holds what is found against it.
EFFORT = (
    (
        "a setting",
        (
            "hccl_buffer_mb",
            "max_tokens",
            "weight_format",
            "fused_mode",
            "unpermute_operator",
            "capture",
            "mc2_hierarchy",
        ),
    ),
    ("an installation", ("providers", "installed", "cann")),
    ("fewer tokens in a step", ("tokens",)),
    ("other weights", ("quantisation", "dtype")),
    ("another number of ranks", ("ep_size",)),
    ("another machine", ("soc",)),
)
FIELDS = tuple(field for _, fields in EFFORT for field in fields)
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


class Candidate(NamedTuple):
    """A change, and the block and the deployment with it."""

    change: Change
    block: BlockDescription
    deployment: Deployment


def candidates(block: BlockDescription, answer: Answer) -> Iterator[Candidate]:
    """All but fewer tokens, in the order of ``EFFORT``."""
    deployment = answer.deployment
    for changes in (_settings(answer), _installations(deployment)):
        yield from _deployed(changes, block, deployment)
    yield from _described(_other_weights(block), block, deployment)
    for changes in (_ranks(deployment, block.experts), _machines(deployment)):
        yield from _deployed(changes, block, deployment)


# A change of a deployment, and what changes with it.
_Deployed = Iterator[tuple[Change, dict[str, Any]]]


def _deployed(changes: _Deployed, block: BlockDescription, deployment: Deployment) -> Iterator[Candidate]:
    for change, more in changes:
        try:
            yield Candidate(change, block, deployment.replace(**{change.field: change.value}, **more))
        except ValueError:
            continue  # a deployment that cannot be, e.g. ranks with shared experts in a smaller group


def _described(changes: Iterable[Change], block: BlockDescription, deployment: Deployment) -> Iterator[Candidate]:
    for change in changes:
        try:
            yield Candidate(change, dataclasses.replace(block, **{change.field: change.value}), deployment)
        except ExplainError:
            continue  # e.g. biases, which quantised experts have not


def _settings(answer: Answer) -> _Deployed:
    """Of the next start: environment, ``Deployment``, and how ``shard_experts`` lays weights out."""
    deployment, tokens = answer.deployment, answer.tokens
    for size in _needed_buffers(answer):
        yield Change("hccl_buffer_mb", size, f"HCCL_BUFFSIZE {size} MB"), {}
    if deployment.equal_tokens and 0 < deployment.max_tokens < tokens:
        yield Change("max_tokens", tokens, f"at most {tokens} tokens declared"), {}
    for name in WEIGHT_FORMATS:
        if name != deployment.weight_format:
            yield Change("weight_format", name, f"weights in {name}"), {}
    for mode, operators in FUSED_MODES.items():
        if mode != deployment.fused_mode:
            yield Change("fused_mode", mode, f"fused mode {mode} ({operators})"), {}
    # the other one has the stricter rules, so that it is never a cure
    if deployment.unpermute_operator != TOKEN_UNPERMUTE:
        yield Change("unpermute_operator", TOKEN_UNPERMUTE, f"unpermute operator {TOKEN_UNPERMUTE}"), {}
    for field, texts in _FLAGS.items():
        value = not getattr(deployment, field)
        yield Change(field, value, texts[value]), {}


def _installations(deployment: Deployment) -> _Deployed:
    """Another version of a provider that is there or of CANN, newer ones first; a build for this SoC; another provider."""
    declared = dict(deployment.providers)
    for name, version, _ in deployment.installed or ():
        if name in declared and not same_version(version, declared[name]):
            providers = tuple((each, version if each == name else now) for each, now in deployment.providers)
            yield Change("providers", providers, f"{name} {version} declared, which is installed"), {}
    for name, now in deployment.providers:
        for version in _nearest(PROVIDER_VERSIONS.get(name, ()), now):
            providers = tuple((each, version if each == name else of_it) for each, of_it in deployment.providers)
            yield Change("providers", providers, f"{name} {version} in place of {now}"), {"installed": ()}
    for name, versions in PROVIDER_VERSIONS.items():
        if name not in declared:
            providers = (*deployment.providers, (name, versions[0]))
            suffix = "" if WHEEL_BUILDS.get(name, deployment.soc) == deployment.soc else f", built for {deployment.soc}"
            yield Change("providers", providers, f"{name} {versions[0]} installed{suffix}"), {"installed": ()}
    for name, version, build in deployment.installed or ():
        if name in declared and build not in ("", deployment.soc):
            built = tuple((n, v, deployment.soc if n == name else b) for n, v, b in deployment.installed or ())
            yield Change("installed", built, f"{name} {version} built for {deployment.soc}"), {}
    for version in _nearest(CANN_VERSIONS, deployment.cann):
        yield Change("cann", version, f"CANN {version}{'' if deployment.cann else ' declared'}"), {}


def _nearest(versions: Iterable[str], now: str) -> list[str]:
    """Versions other than ``now``: newer ones, the nearest first, and then older ones; all of them where it is not known."""
    if not now:
        return list(versions)
    newer = [version for version in versions if compare_versions(version, now) > 0]
    return newer + [version for version in reversed(tuple(versions)) if compare_versions(version, now) < 0]


def _other_weights(block: BlockDescription) -> Iterator[Change]:
    for name in EXPERT_FORMATS:
        if name != block.quantisation:
            yield Change(
                "quantisation", name, "unquantised (16-bit) experts" if name == "none" else f"experts in {name}"
            )
    if block.dtype != torch.bfloat16:
        yield Change("dtype", torch.bfloat16, "bfloat16")


def _ranks(deployment: Deployment, experts: int) -> _Deployed:
    for size in other_sizes(deployment, experts):
        yield Change("ep_size", size, f"EP {size}"), {"ep_group": "ep" if size > 1 else ""}


def _machines(deployment: Deployment) -> _Deployed:
    """Newer ones, the nearest first; and then older ones, likewise."""
    now = SOCS[deployment.soc].generation
    others = [soc for soc in SOCS.values() if soc.generation != now]
    for soc in sorted(others, key=lambda soc: (soc.generation < now, abs(soc.generation - now))):
        yield Change("soc", soc.name, f"SoC {soc.name}"), {"measured": ()}


def _needed_buffers(answer: Answer) -> list[int]:
    """Sizes of the HCCL window that broken rules name, the smallest first."""
    window_sizes = set()
    for verdict in answer.judgement.verdicts.values():
        sizes = [size for v in verdict.violations if (size := (v.to_json().get("buffer") or {}).get("needed_mb"))]
        if sizes:
            window_sizes.add(max(sizes))
    return sorted(window_sizes)


def other_sizes(deployment: Deployment, experts: int) -> list[int]:
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
