"""The machine that `lower` and `explain` assume where a command does not describe it. Imports no torch."""

from __future__ import annotations

from typing import Any

from moe_lowering.cli.usage import UsageError
from moe_lowering.providers import declarable
from moe_lowering.vocabulary import PROVIDER_VERSIONS, WHEEL_BUILDS

ASSUMED_PROVIDERS = (("vllm_ascend", PROVIDER_VERSIONS["vllm_ascend"][0]),)
HCCL_BUFFER_MB = 1024  # enough for MC2 with the published sizes at 64 tokens per rank; CANN's own default is 200
CANN_BUFFER_MB = 200
WEIGHT_FORMAT = "nz"


def assumed_differences(request: Any) -> list[str]:
    """What a command did not say of the machine and was taken to be so, other than a ``Deployment`` takes it."""
    assumptions = []
    if request.buffer_mb is None:
        assumptions.append(
            f"HCCL_BUFFSIZE is {HCCL_BUFFER_MB} MB (where it is not set, CANN and a Deployment take {CANN_BUFFER_MB})"
        )
    if request.weight_format is None:
        assumptions.append(f"the expert weights are in format {WEIGHT_FORMAT} (a Deployment's default is nd)")
    if request.provider is None:
        assumptions += [
            f"{name} {version} is installed (a Deployment's default is none)" for name, version in request.providers
        ]
        assumptions += [
            f"{name} is built from source for {request.soc} (its wheels are {wheel} builds); --provider none answers without it"
            for name, _ in request.providers
            if (wheel := WHEEL_BUILDS.get(name, request.soc)) != request.soc and name not in dict(declarable())
        ]
    return assumptions


def provider_packages(assumed: list[tuple[str, str]] | None) -> tuple[tuple[str, str], ...]:
    """The providers of a command; the assumed ones when none was named.

    Raises:
        UsageError: ``none`` beside others, or one that is named twice.
    """
    if assumed is None:  # of the assumed providers, the installed version where there is one
        return tuple((name, dict(declarable()).get(name, version)) for name, version in ASSUMED_PROVIDERS)
    names = [name for name, _ in assumed]
    if "none" in names and len(names) > 1:
        raise UsageError("argument --provider: is none and others; accepted: none alone, or each library once")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"argument --provider: {twice} is given twice; accepted: none alone, or each library once")
    return () if names == ["none"] else tuple(assumed)
