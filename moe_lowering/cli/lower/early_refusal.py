"""Refusal of ``lower --comm X`` before anything is built, where the command's options alone make X illegal.

The blocks are described from the model's modules on device meta, and the pass's own functions judge them. With
``--dynamic`` a command is refused here only when X is illegal for few and for many tokens alike; then T is a symbol of the
command's range. None means that the graph has to be seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_lowering.cli.lower.models import ModelPlan
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.deployment import Deployment
from moe_lowering.explanation.modules import describe_experts
from moe_lowering.explanation.spec import block_spec
from moe_lowering.limits import Prover
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.legality import free_tokens, judge
from moe_lowering.passes.policy import Policy
from moe_lowering.report.records import BlockReport, LoweringReport, Verdict
from moe_lowering.vocabulary import AUTO


def find_early_refusal(
    request: LowerRequest, plan: ModelPlan, skeleton: nn.Module, deployment: Deployment
) -> LoweringReport | None:
    """The report of a command whose implementation is refused for every block; None when the graph has to be seen."""
    if request.comm == AUTO:
        return None
    reports = []
    for name, module in skeleton.named_modules():
        dtype = getattr(torch, request.dtype)
        block = describe_experts(module, plan.config, model=plan.name, quantisation=request.quant, dtype=dtype)
        if block is None or block.experts != plan.experts:
            continue
        spec = block_spec(block, deployment, request.batch * request.lengths[0])
        counts = (spec.tokens, 1, request.max_tokens) if request.dynamic else (spec.tokens,)
        if any(_choose_for(request, spec, deployment, tokens)[0] is not None for tokens in counts):
            return None
        tokens = free_tokens(1, request.max_tokens) if request.dynamic else spec.tokens
        _, reason, verdicts = _choose_for(request, spec, deployment, tokens)
        reports.append(BlockReport(name, None, reason, (), (), verdicts))
    return LoweringReport(tuple(reports), (), 0, 0, 0.0, deployment=deployment) if reports else None


def _choose_for(
    request: LowerRequest, spec: BlockSpec, deployment: Deployment, tokens: Any
) -> tuple[str | None, str, dict[str, Verdict]]:
    """(the implementation, None when it is refused; the reason; all verdicts) for T = ``tokens``."""
    verdicts = judge(spec, deployment, tokens, Prover(), torch_npu=True).verdicts
    return (*Policy(request.comm, request.policy).choose(verdicts, spec, deployment, spec.tokens), verdicts)
