"""The sum that ends an MoE layer: for each token its k rows by their weights."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**18  # elements that are worked on at a time, so that their float32 copies stay in cache


def sum_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """y [T, H] of rows [T * k, H], in order of token and choice, and weights [T, k] float32: in float32, rounded once."""
    tokens, top_k = weights.shape
    hidden = rows.shape[1]
    step = max(1, CHUNK // max(1, top_k * hidden))
    if tokens <= step:
        return _sum(rows, weights, hidden)
    starts = range(0, tokens, step)
    return torch.cat([_sum(rows[at * top_k : (at + step) * top_k], weights[at : at + step], hidden) for at in starts])


def _sum(rows: Tensor, weights: Tensor, hidden: int) -> Tensor:
    products = rows.float().view(weights.shape[0], weights.shape[1], hidden)
    return torch.bmm(weights.unsqueeze(1), products).squeeze(1).to(rows.dtype)
