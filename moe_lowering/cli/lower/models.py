"""Models that ``lower`` builds from a config, without a download.

Their weights are random, biases and correction biases too: many models start those at zero, where a lowering that left them
out would go unnoticed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lowering.cli.lower.configs import (
    FULL_OWN_LAYERS,
    SMALL,
    SMALL_LAYERS,
    config_of,
    num_experts_of,
    refuse_uneven,
)
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.cli.usage import UsageError
from moe_lowering.families import small_models
from moe_lowering.layers.moe import MoE
from moe_lowering.model_configs.check import OWN, OWN_SIZES
from moe_lowering.model_configs.errors import ModelError
from moe_lowering.model_configs.presets import PRESETS

OWN_SCALE = 2.5  # DeepSeek-V3's routed_scaling_factor
NOISE = 0.1  # standard deviation of what is added to one-dimensional parameters (norms, biases, sinks)
SEED = 20


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """What to build: a transformers config, or None for this package's own MoE; and its name in the report."""

    name: str
    config: Any
    layers: int
    vocabulary: int
    experts: int


class MoeStack(nn.Module):
    """A decoder without attention: embedding, ``layers`` times x + MoE(norm(x)), norm, output projection.

    Its router is DeepSeek-V3's (sigmoid, correction bias, groups), so ``route`` is lowered with all that it can do.
    """

    def __init__(
        self, hidden: int, intermediate: int, experts: int, top_k: int, layers: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SMALL.vocabulary, hidden, dtype=dtype)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, eps=1e-6, dtype=dtype) for _ in range(layers))
        self.layers = nn.ModuleList(
            MoE(
                hidden,
                intermediate,
                experts,
                top_k,
                scoring="sigmoid",
                selection_bias=True,
                scale=OWN_SCALE,
                num_groups=SMALL.groups,
                topk_groups=SMALL.topk_groups,
                dtype=dtype,
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(hidden, SMALL.vocabulary, bias=False, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x)


def plan_model(request: LowerRequest) -> ModelPlan:
    """What a command's MODEL means.

    Raises:
        UsageError: an unknown model, an unreadable config.json, a type without a causal LM, experts that the ranks
            cannot share equally.
    """
    if request.model == OWN:
        small = SMALL.experts
        layers = request.layers or (FULL_OWN_LAYERS if request.fake else SMALL_LAYERS)
        result = ModelPlan(OWN, None, layers, SMALL.vocabulary, OWN_SIZES["experts"] if request.fake else small)
    else:
        config = config_of(request)
        layers = int(config.num_hidden_layers)
        name = request.model if request.model in PRESETS else config.model_type
        result = ModelPlan(name, config, layers, int(config.vocab_size), num_experts_of(config))
    refuse_uneven(request, result.name, result.experts)
    return result


def build(plan: ModelPlan, dtype: torch.dtype, *, fake: bool = False) -> nn.Module:
    """The model in inference form, its experts on the generic operators.

    Raises:
        UsageError: transformers cannot build it.
    """
    if plan.config is None:
        size = OWN_SIZES if fake else dataclasses.asdict(SMALL)
        sizes = (size["hidden"], size["intermediate"], size["experts"], size["top_k"])
        return MoeStack(*sizes, plan.layers, dtype).eval().requires_grad_(False)
    try:
        return small_models.build(plan.config, dtype)
    except ModelError as error:
        raise UsageError(f"argument MODEL: {error}") from error


def skeleton(plan: ModelPlan, dtype: torch.dtype = torch.bfloat16, *, fake: bool = False) -> nn.Module:
    """The model without data, on device meta: what it is made of, and how large it is."""
    with torch.device("meta"):
        return build(plan, dtype, fake=fake)


def available_memory() -> int | None:
    """Bytes of memory that are free, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return None


def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The output that is compared; ``model`` may be compiled. The attention mask of ones is what a tokenizer gives."""
    if isinstance(getattr(model, "_orig_mod", model), MoeStack):
        return model(input_ids)
    return small_models.result(model, input_ids)


def randomise(model: nn.Module, seed: int = SEED) -> None:
    """Weights of standard deviation 1/sqrt(inputs); noise on norms, biases, sinks and the router's correction bias.

    Many models start biases, correction biases and even router weights at zero, where a lowering that forgot them would
    look right. What is equal on every rank comes from ``seed`` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    buffers = ((name, b) for name, b in model.named_buffers() if name.endswith("bias"))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() == 1 or name.endswith("bias"):
                tensor.add_((noise * NOISE).to(tensor.dtype))
            else:
                tensor.copy_(noise.mul_(_inputs(model, name, tensor) ** -0.5))


def _inputs(model: nn.Module, name: str, weight: Tensor) -> int:
    """How many inputs an output of this weight sums over."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Embedding):
        return 1
    k_first = isinstance(owner, MoE) or getattr(owner, "is_transposed", False)
    return weight.shape[-2 if weight.dim() == 3 and k_first else -1]


def input_ids(plan: ModelPlan, request: LowerRequest, length: int, rank: int) -> Tensor:
    """Tokens of one rank, [batch, length]; other ranks have others."""
    generator = torch.Generator().manual_seed(SEED + 1 + rank)
    return torch.randint(3, plan.vocabulary, (request.batch, length), generator=generator)
