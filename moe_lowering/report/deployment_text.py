"""What reports say of the deployment that they are about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_lowering.number_words import count_of
from moe_lowering.vocabulary import TOKEN_UNPERMUTE

if TYPE_CHECKING:  # a deployment can be in a report, and imports what reports are made of
    from moe_lowering.deployment import Deployment


def deployment_facts(deployment: Deployment) -> list[str]:
    """What verdicts depend on, in the order of a report: sizes, window, weights, what is installed, and what is not usual."""
    unusual = {
        "MC2 in two levels": deployment.mc2_hierarchy,
        f"unpermute operator {deployment.unpermute_operator}": deployment.unpermute_operator != TOKEN_UNPERMUTE,
        "not captured": not deployment.capture,
    }
    return [
        f"EP {deployment.ep_size}",
        f"TP {deployment.tp_size}",
        f"HCCL_BUFFSIZE {deployment.hccl_buffer_mb} MB",
        f"weights {deployment.weight_format}",
        f"CANN {deployment.cann or 'unknown'}",
        *([f"{name} {version}" for name, version in deployment.providers] or ["no provider"]),
        *(text for text, holds in unusual.items() if holds),
    ]


def deployment_text(deployment: Deployment) -> str:
    """The same in a sentence, with the SoC and the bound of tokens that is declared."""
    declared = (
        f"at most {count_of(deployment.max_tokens, 'token')} on a rank"
        if deployment.max_tokens
        else "no bound of tokens"
    )
    return ", ".join([deployment.soc, *deployment_facts(deployment), declared])


def deployment_json(deployment: Deployment) -> dict[str, Any]:
    """Its fields that are equal on all ranks, with the providers by name."""
    return deployment.invariant_fields() | {"providers": dict(deployment.providers)}
