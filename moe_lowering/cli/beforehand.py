"""Is the implementation that ``lower --comm`` asks for refused by the command's options alone? Then nothing is built.

The blocks are read from the model's modules on device meta; the pass's own judge decides. With ``--dynamic`` the answer is
given only where it is the same for few and for many tokens; then T is a symbol of the command's range.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from moe_lowering.cli.arguments import Request
from moe_lowering.cli.explain_models import Block, Gate, size_of, spec_of
from moe_lowering.cli.model_check import NAMES
from moe_lowering.cli.models import Plan
from moe_lowering.deployment import Deployment
from moe_lowering.layers import MoE, is_experts_module
from moe_lowering.limits import Prover
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.choosing import Policy
from moe_lowering.passes.judging import free_tokens, judge
from moe_lowering.report.records import BlockReport, LoweringReport, Verdict


def refused(request: Request, made: Plan, skeleton: nn.Module, deployment: Deployment) -> LoweringReport | None:
    """The report of a command whose implementation is refused for every block; None when the graph has to be seen."""
    if request.comm == "auto":
        return None
    reports = []
    for name, module in skeleton.named_modules():
        block = _block(module, made, request)
        if block is None:
            continue
        spec = spec_of(block, deployment, request.batch * request.lengths[0], request.quant)
        if request.ep == 1 and request.quant == "none":  # weights stay as the model has them
            spec = dataclasses.replace(spec, weights_contiguous=getattr(module, "is_transposed", True))
        counts = (spec.tokens, 1, request.max_tokens) if request.dynamic else (spec.tokens,)
        if any(_choice(request, spec, deployment, tokens)[0] is not None for tokens in counts):
            return None
        tokens = free_tokens(1, request.max_tokens) if request.dynamic else spec.tokens
        _, reason, verdicts = _choice(request, spec, deployment, tokens)
        reports.append(BlockReport(name, None, reason, (), (), verdicts))
    return LoweringReport(tuple(reports), (), 0, 0, 0.0) if reports else None


def _choice(
    request: Request, spec: BlockSpec, deployment: Deployment, tokens: Any
) -> tuple[str | None, str, dict[str, Verdict]]:
    """(the implementation if it is legal, why, all verdicts) for T = ``tokens``."""
    verdicts = judge(spec, deployment, tokens, Prover(), torch_npu=True).verdicts
    return (*Policy(request.comm).choose(verdicts, spec, deployment, spec.tokens), verdicts)


def _block(module: Any, made: Plan, request: Request) -> Block | None:
    """What an experts module computes; None of any other module, and where that is not known."""
    from moe_lowering.integrations.transformers import form_of

    if isinstance(module, MoE):
        _, limit, alpha = module._factors
        gate = Gate(module.activation, module.interleaved, module.w13_bias is not None)
        sizes, top_k = tuple(module.w13.shape), module.top_k
        factors = limit or 0.0, alpha or 0.0
    elif is_experts_module(module) and (form := form_of(module)).unrecognised == "":
        gate = Gate(form.activation, form.interleaved, module.has_bias)
        w13 = module.gate_up_proj
        sizes = tuple(w13.shape if module.is_transposed else w13.transpose(-2, -1).shape)
        top_k, factors = size_of(made.config, NAMES["topk"]), (form.limit, form.alpha)
    else:
        return None
    experts, hidden, width = sizes
    if not top_k or experts != made.experts:
        return None
    return Block(made.name, hidden, width // 2, experts, top_k, request.dtype, gate, *factors, ())
