"""What reports say of the deployment that they are about."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from moe_lowering.number_words import count_of

if TYPE_CHECKING:  # a deployment can be in a report, and imports what reports are made of
    from moe_lowering.deployment import Deployment

# Fields that have words of their own below, or are names that say nothing of what is legal.
_IN_WORDS = {
    "soc", "ep_size", "tp_size", "hccl_buffer_mb", "weight_format", "cann", "torch_npu", "providers", "max_tokens", "min_tokens",
    "equal_tokens", "ep_group", "mc2_group", "ep_communicator", "installed", "measured",
}  # fmt: skip
_WORDS = {"mc2_hierarchy": "MC2 in two levels", "capture": "not captured", "mask_is_prefix": "token masks are prefixes"}


def deployment_facts(deployment: Deployment) -> list[str]:
    """What verdicts and prices depend on, in the order of a report: ranks, window, weights, what is installed, and every other
    field that is not as by default."""
    defaults = {field.name: field.default for field in dataclasses.fields(deployment)}
    other = {
        name: value
        for name, value in deployment.invariant_fields().items()
        if name not in _IN_WORDS and value != defaults[name]
    }
    return [
        f"EP {deployment.ep_size}",
        f"TP {deployment.tp_size}",
        f"HCCL_BUFFSIZE {deployment.hccl_buffer_mb} MB",
        f"weights {deployment.weight_format}",
        f"CANN {deployment.cann or 'unknown'}",
        *([f"torch_npu {deployment.torch_npu}"] if deployment.torch_npu else []),
        *([f"{name} {version}" for name, version in deployment.providers] or ["no provider"]),
        *(_WORDS.get(name, f"{name.replace('_', ' ')} {value}") for name, value in other.items()),
        *(["no communicator for MC2"] if deployment.ep_size > 1 and not deployment.mc2_group else []),
        *(["prices measured"] if deployment.measured else []),
    ]


def deployment_text(deployment: Deployment) -> str:
    """The same in a sentence, with the SoC and the tokens that are declared."""
    most = deployment.max_tokens
    tokens = f"at most {count_of(most, 'token')} on a rank" if most else "no bound of tokens"
    if not deployment.equal_tokens:
        tokens = f"{deployment.min_tokens} to {count_of(most, 'token')} on a rank, not equal on all ranks"
    return ", ".join([deployment.soc, *deployment_facts(deployment), tokens])


def deployment_json(deployment: Deployment) -> dict[str, Any]:
    """Its fields that are equal on all ranks, with the providers by name."""
    return deployment.invariant_fields() | {"providers": dict(deployment.providers)}
