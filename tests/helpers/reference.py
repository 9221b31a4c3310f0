"""Independent references: float64, loops over tokens and experts, no grouping, nothing shared with the package.

What they compute is written down in docs/architecture.md; they follow that text, not the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Largest max|a - b| / max|reference| of a correct result. float32 sums over a few hundred terms; a 16-bit type rounds
# three stages and the result, each by at most half a unit in the last place (2**-8 for bfloat16, 2**-11 for float16).
BOUNDS = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|; 0 for empty tensors; infinite when a value is not finite or shapes differ."""
    if actual.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    error = (actual.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    if not math.isfinite(error):
        return math.inf
    return error / largest if largest else (0.0 if error == 0.0 else math.inf)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """``actual`` is of ``dtype`` and as near to ``expected`` as that dtype allows."""
    assert actual.dtype == dtype, f"dtype is {actual.dtype}, expected {dtype}"
    error = relative_error(actual, expected)
    assert error <= BOUNDS[dtype], f"relative error {error:.2e}, allowed {BOUNDS[dtype]:.0e}"


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    scale: float,
    epsilon: float = 1e-20,
) -> tuple[Tensor, Tensor]:
    """Weights (float64) and ids of the router, token by token, in plain Python."""
    experts = logits.shape[-1]
    rows = logits.double().reshape(math.prod(logits.shape[:-1]), experts).tolist()
    extra = [0.0] * experts if bias is None else bias.double().tolist()
    weights, ids = [], []
    for row in rows:
        scores = _scores(row, scoring)
        choice = [s + e for s, e in zip(scores, extra, strict=True)]
        per_group = experts // num_groups
        groups = [choice[g * per_group : (g + 1) * per_group] for g in range(num_groups)]
        values = [max(g) if group_score == "max" or num_groups == 1 else sum(sorted(g)[-2:]) for g in groups]
        best = sorted(range(num_groups), key=lambda g: (-values[g], g))[:topk_groups]
        allowed = [e for e in range(experts) if e // per_group in best]
        chosen = sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]
        total = sum(scores[e] for e in chosen) + epsilon if renormalize else 1.0
        weights.append([scores[e] / total * scale for e in chosen])
        ids.append(chosen)
    shape = (*logits.shape[:-1], top_k)
    return torch.tensor(weights, dtype=torch.float64).reshape(shape), torch.tensor(ids, dtype=torch.int32).reshape(
        shape
    )


def _scores(row: list[float], scoring: str) -> list[float]:
    if scoring == "softmax":
        powers = [math.exp(value - max(row)) for value in row]
        return [power / sum(powers) for power in powers]
    if scoring == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in row]
    return [math.sqrt(math.log1p(math.exp(value))) for value in row]


def gated(hidden: Tensor, activation: str, limit: float, alpha: float, interleaved: bool) -> Tensor:
    """The activation of one row [2I], or [I] where it has no gate, in float64: [I]."""
    if activation in ("relu", "relu2"):
        positive = torch.where(hidden > 0, hidden, torch.zeros_like(hidden))
        return positive if activation == "relu" else positive * positive
    if activation == "silu":
        return hidden / (1 + torch.exp(-hidden))
    if activation in ("gelu_ungated", "gelu_tanh_ungated"):  # as with a gate whose other half is one
        pair = torch.cat([hidden, torch.ones_like(hidden)])
        return gated(pair, activation.removesuffix("_ungated"), 0.0, 0.0, False)
    half = hidden.numel() // 2
    if interleaved:
        gate, up = hidden[torch.arange(half) * 2], hidden[torch.arange(half) * 2 + 1]
    else:
        gate, up = hidden[:half], hidden[half:]
    if activation in ("swiglu_clamp", "swiglu_oai"):
        gate = torch.minimum(gate, torch.full_like(gate, limit))
        up = torch.maximum(torch.minimum(up, torch.full_like(up, limit)), torch.full_like(up, -limit))
    if activation == "swiglu_softcap":
        return limit * torch.tanh(gate / limit) / (1 + torch.exp(-gate)) * alpha * torch.tanh(up / alpha)
    if activation == "swiglu_clamp_after":
        gate = gate / (1 + torch.exp(-gate))
        gate = torch.minimum(gate, torch.full_like(gate, limit))
        return gate * torch.maximum(torch.minimum(up, torch.full_like(up, limit)), torch.full_like(up, -limit))
    if activation in ("swiglu", "swiglu_clamp"):
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "swiglu_oai":
        return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)
    if activation == "gelu":
        return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
    if activation != "gelu_tanh":
        raise ValueError(f"reference: no formula for activation {activation!r}")
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def expert(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    activation: str = "swiglu",
    limit: float = 0.0,
    alpha: float = 1.702,
    interleaved: bool = False,
) -> Tensor:
    """One expert on one token [H], in float64."""
    hidden = x.double() @ w13.double()
    if w13_bias is not None:
        hidden = hidden + w13_bias.double()
    out = gated(hidden, activation, limit, alpha, interleaved) @ w2.double()
    return out if w2_bias is None else out + w2_bias.double()


def moe(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    w13: Sequence[Tensor] | Tensor,
    w2: Sequence[Tensor] | Tensor,
    *,
    w13_bias: Sequence[Tensor] | Tensor | None = None,
    w2_bias: Sequence[Tensor] | Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "swiglu",
    limit: float = 0.0,
    alpha: float = 1.702,
    interleaved: bool = False,
) -> Tensor:
    """y [..., H] in float64; ``w13`` and the rest hold all experts, indexed by global id."""
    width = x.shape[-1]
    tokens = math.prod(x.shape[:-1])
    out = torch.zeros(tokens, width, dtype=torch.float64)
    flat_x, flat_ids = x.reshape(tokens, width), ids.reshape(tokens, ids.shape[-1])
    flat_weights = weights.reshape(tokens, ids.shape[-1]).double()
    keep = [True] * tokens if mask is None else mask.reshape(tokens).tolist()
    for token in range(tokens):
        if not keep[token]:
            continue
        for choice, chosen in enumerate(flat_ids[token].tolist()):
            first = None if w13_bias is None else w13_bias[chosen]
            second = None if w2_bias is None else w2_bias[chosen]
            result = expert(
                flat_x[token], w13[chosen], w2[chosen], first, second, activation, limit, alpha, interleaved
            )
            out[token] += flat_weights[token, choice] * result
    return out.reshape(x.shape)
