"""Layers with a router of ``router_forms`` in front of tiny experts, as graphs that the pass can run on."""

from __future__ import annotations

from typing import Any

import reference
import torch
from router_forms import EXPERTS, Form, Router
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from moe_lowering import Deployment, MoeLowering, moe_experts
from moe_lowering.report.records import LoweringReport

TOKENS, HIDDEN, INTERMEDIATE = 8, 8, 4


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W13, W2 = _random(EXPERTS, HIDDEN, 2 * INTERMEDIATE, seed=1), _random(EXPERTS, INTERMEDIATE, HIDDEN, seed=2)
BIAS = _random(EXPERTS, seed=3) * 0.3


def logits_of(dtype: torch.dtype = torch.float32, ties: bool = False, tokens: int = TOKENS) -> Tensor:
    """Random logits; with ties many of them are equal."""
    logits = 2 * _random(tokens, EXPERTS, seed=4)
    return (logits.round() if ties else logits).to(dtype)


def layer(router: Router) -> Any:
    """(y, weights, ids, what else the router gives) of x, logits, bias and the experts' weights."""

    def compute(x: Tensor, logits: Tensor, bias: Tensor, w13: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        weights, ids, *more = router(logits, bias)
        return moe_experts(x, weights, ids, w13, w2), weights, ids, *more

    return compute


def arguments(logits: Tensor, bias: Tensor = BIAS) -> tuple[Tensor, ...]:
    return _random(logits.shape[0], HIDDEN, seed=5), logits, bias, W13, W2


def trace(router: Router, logits: Tensor, functional: bool = True) -> GraphModule:
    function = layer(router)
    with torch.no_grad():
        return make_fx(functionalize(function) if functional else function, tracing_mode="fake")(*arguments(logits))


def lower(gm: GraphModule, **options: Any) -> LoweringReport:
    lowering = MoeLowering(Deployment(soc="A3"), "allgather", strict=True, **options)
    lowering(gm)
    return lowering.reports[-1]


def expected(form: Form, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in float64 and ids, by a loop over tokens."""
    return reference.route(*form.expected(logits, BIAS))
