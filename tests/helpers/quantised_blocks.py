"""Blocks with quantised weights on one rank: the chains of operators that they become, their weights and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_lowering import moe_experts

EXPERTS, TOP_K, HIDDEN, INNER, TOKENS = 4, 2, 64, 128, 11


FUSED, DEQUANT = "npu.npu_grouped_matmul_swiglu_quant_v2", "npu.npu_dequant_swiglu_quant"


MATMUL, SWIGLU, QUANT = "npu.npu_grouped_matmul", "npu.npu_swiglu", "npu.npu_dynamic_quant"


JOINED = "npu.npu_swiglu_quant"


CHAINS = {
    "fused": [QUANT, FUSED, MATMUL],
    "dequant": [QUANT, MATMUL, DEQUANT, MATMUL],
    "joined": [QUANT, MATMUL, JOINED, MATMUL],
    "plain": [QUANT, MATMUL, SWIGLU, QUANT, MATMUL],
    "activation": [QUANT, MATMUL, QUANT, MATMUL],  # composed of ATen operators
}


OPERATORS = {name for chain in CHAINS.values() for name in chain}


def given(inner: int = INNER, hidden: int = HIDDEN, seed: int = 0) -> dict[str, Tensor]:
    """int8 weights [E, K, N] and float32 scales that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, rows, columns in (("w13", hidden, 2 * inner), ("w2", inner, hidden)):
        whole = torch.randint(-127, 128, (EXPERTS, rows, columns), generator=generator)
        found[name] = whole.to(torch.int8)
        scale = (torch.rand(EXPERTS, columns, generator=generator) + 0.5) / (64 * rows**0.5)
        found[f"{name}_scale"] = scale.bfloat16().float()
    return found


def inputs(hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, hidden, generator=generator).to(dtype)
    ids = torch.rand(TOKENS, EXPERTS - 1, generator=generator).argsort(1)[:, :TOP_K].int()  # none for the last expert
    return x, torch.rand(TOKENS, TOP_K, generator=generator) + 0.1, ids


def block(weights: dict[str, Any], **options: Any) -> Any:
    def run(x: Tensor, routing: Tensor, ids: Tensor) -> Tensor:
        return moe_experts(x, routing, ids, quantisation="w8a8", **weights, **options)

    return run
