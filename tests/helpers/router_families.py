"""Routers of transformers' families, each of its own class with toy sizes, in front of a few tiny experts."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from moe_lowering import moe_experts

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 6, 16, 8, 32, 4
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_KS = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token", "moe_top_k", "top_k")
SIZES = {
    "hidden_size": HIDDEN,
    "norm_topk_prob": True,
    "n_group": 4,
    "topk_group": 2,
    "zero_expert_num": 0,
    **dict.fromkeys(_EXPERT_COUNTS, EXPERTS),
    **dict.fromkeys(_TOP_KS, TOP_K),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A router's class, and what becomes of it in float32 and in bfloat16: "" for the operator, or the code of the reason.

    ``soc``: on which the operator computes it.
    """

    router: str
    float32: str = ""
    bfloat16: str = ""
    soc: str = "A3"
    config: str = ""

    def expected(self, dtype: torch.dtype) -> str:
        return self.float32 if dtype is torch.float32 else self.bfloat16


def make_router(name: str, family: Family, dtype: torch.dtype) -> nn.Module:
    """A router of the family with random weights, its parameters in ``dtype``, its buffers in float32."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    kind = getattr(module, family.router)
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    config = _config(name, family, parameters)
    needed = [p for p in parameters if p.default is p.empty]
    router = kind(config) if len(needed) == 1 else kind(config, 0)
    generator = torch.Generator().manual_seed(1)
    for _, tensor in [*router.named_parameters(), *router.named_buffers()]:
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
    for _, tensor in router.named_parameters():
        tensor.data = tensor.data.to(dtype)
    return router.eval().requires_grad_(False)


def _config(name: str, family: Family, parameters: list[Any]) -> Any:
    kinds = [p.annotation for p in parameters if inspect.isclass(p.annotation) and "Config" in p.annotation.__name__]
    if family.config or not kinds:
        module = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
        expected = family.config or f"{name}_config"
        kinds = [getattr(module, each) for each in dir(module) if _plain(each) == _plain(expected)]
    config = kinds[0]()
    for size, value in SIZES.items():
        if size in dir(config):
            setattr(config, size, value)
    return config


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def num_experts_of(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"w13": (EXPERTS, HIDDEN, 2 * INTERMEDIATE), "w2": (EXPERTS, INTERMEDIATE, HIDDEN)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def trace_layer(
    router: nn.Module, dtype: torch.dtype, x: Tensor
) -> tuple[GraphModule, tuple[Any, ...], tuple[Tensor, ...]]:
    """(graph, its arguments, the eager result): experts' result, weights, ids and logits of a layer."""
    wants = inspect.signature(router.forward).parameters
    extra = [torch.linspace(-0.2, 0.2, EXPERTS) for name in ("expert_bias", "e_score_correction_bias") if name in wants]
    state = {**dict(router.named_parameters()), **dict(router.named_buffers()), **num_experts_of(dtype)}

    def layer(state: dict[str, Tensor], x: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        rest = dict(state)
        w13, w2 = rest.pop("w13"), rest.pop("w2")
        made = functional_call(router, rest, (x, *extra))
        chosen = [each for each in made if each.shape[-1] == TOP_K]
        ids = next(each for each in chosen if not each.is_floating_point())
        weights = next(each for each in chosen if each.is_floating_point())
        return moe_experts(x.reshape(-1, HIDDEN), weights, ids, w13, w2), weights, ids, made[0]

    arguments = (state, x, *extra)
    with torch.no_grad():
        graph = make_fx(functionalize(layer), tracing_mode="fake")(*arguments)
        return graph, arguments, layer(*arguments)
