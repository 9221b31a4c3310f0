"""Steps of ``lower`` that ``--fake`` and a run share: the deployment is made, and a command that cannot succeed is refused."""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_lowering.cli.assumed_machine import assumed_differences
from moe_lowering.cli.deployments import make_deployment
from moe_lowering.cli.lower import early_refusal, models
from moe_lowering.cli.lower.outcome import LowerOutcome
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.cli.usage import UsageError
from moe_lowering.model_configs.check import ACCEPTED, OWN
from moe_lowering.number_words import count_of
from moe_lowering.quantisation import require_quantisable
from moe_lowering.vocabulary import TOKEN_UNPERMUTE


def deployment_facts(request: LowerRequest) -> list[tuple[str, str]]:
    """What ``make_deployment`` takes for granted, and what the command said of the machine, for the report."""
    named = [f"{name} {version}" for name, version in request.providers] if request.provider is not None else []
    templates = {
        "HCCL_BUFFSIZE {} MB": request.buffer_mb,
        "expert weights in format {}": request.weight_format,
        "CANN {}": request.cann,
        "{} installed": ", ".join(named) or (None if request.provider is None else "no provider of fused operators"),
        "MC2 in two levels": request.hierarchy or None,
        "unpermute operator {}": None if request.unpermute_operator == TOKEN_UNPERMUTE else request.unpermute_operator,
    }
    equal = "not equal on all ranks" if request.unequal_tokens else "equal on all ranks"
    sentences = [text.format(value) for text, value in templates.items() if value is not None]
    tokens = f"at most {count_of(request.max_tokens, 'token')} per rank, {equal}"
    assumed = ("assumed", "; ".join([tokens, *request.taken_as, *assumed_differences(request)]))
    return [assumed, ("given", "; ".join(sentences))] if sentences else [assumed]


def tensor_parallel_place(request: LowerRequest, rank: int, backend: str | None = None) -> dict[str, Any]:
    """The TP group of a rank, of neighbours; every rank makes every group, as ``new_group`` wants it."""
    import torch.distributed as dist

    if request.tp == 1:
        return {}
    firsts = range(0, request.ep, request.tp)
    groups = [dist.new_group(range(first, first + request.tp), backend=backend) for first in firsts]
    group: Any = groups[rank // request.tp]
    return {"tp_rank": rank % request.tp, "tp_group": group.group_name}


def early_outcome(
    request: LowerRequest, plan: models.ModelPlan, skeleton: nn.Module, unsupported: list[tuple[str, str]]
) -> LowerOutcome | None:
    """The outcome of a command that cannot succeed, whatever the graph is; None when the graph has to be seen."""
    facts = deployment_facts(request)
    if unsupported:
        stops = request.ep > 1 or request.capture
        return LowerOutcome(request, plan.name, [], unsupported, None, facts) if stops else None
    if request.quantised:
        try:
            require_quantisable(skeleton, request.quant)
        except (ValueError, TypeError) as error:
            raise UsageError(f"argument --quant: is {request.quant}, and {error}") from error
    # groups by any name: a decision does not depend on it
    names = {"ep_group": "ep", "mc2_group": "mc2"} if request.ep > 1 else {}
    names |= {"tp_group": "tp"} if request.tp > 1 else {}
    report = early_refusal.find_early_refusal(request, plan, skeleton, make_deployment(request, **names))
    return None if report is None else LowerOutcome(request, plan.name, [report], [], None, facts)


def register_transformers(request: LowerRequest) -> None:
    """Make ``moe_lowering`` known to transformers, when the command needs it."""
    if request.model == OWN:
        return
    from moe_lowering.integrations.transformers import register

    try:
        register()
    except ImportError as error:
        raise UsageError(f"argument MODEL: {request.model} needs transformers: {error}") from error


def unsupported_modules(model: nn.Module) -> list[tuple[str, str]]:
    """MoE modules of the model that never reach the generic operators."""
    from moe_lowering.integrations.transformers import capabilities

    modules = capabilities(model)
    if not modules:
        raise UsageError(f"argument MODEL: {type(model).__name__} has no MoE layers; accepted: {ACCEPTED}")
    return [(name, reason) for name, supported, reason in modules if not supported]
