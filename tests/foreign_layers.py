"""MoE layers that are not written with the generic operators, and layers that look alike and are no MoE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 6, 32, 16, 8, 2


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


W13, W2 = _random(EXPERTS, HIDDEN, 2 * INTERMEDIATE), _random(EXPERTS, INTERMEDIATE, HIDDEN)
ROUTER, X, HEAD = _random(EXPERTS, HIDDEN), _random(TOKENS, HIDDEN), _random(50, HIDDEN)
IDS = torch.arange(TOKENS * TOP_K).reshape(TOKENS, TOP_K) % EXPERTS


def routed(x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = (x @ ROUTER.t()).softmax(-1).topk(TOP_K, -1)
    return weights / weights.sum(-1, keepdim=True), ids


def scattered(x: Tensor) -> Tensor:
    weights, ids = routed(x)
    return torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, weights)


def gated(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def gathered(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    h = gated(torch.einsum("th,tkhi->tki", x, W13[ids]))
    return torch.einsum("tkh,tk->th", torch.einsum("tki,tkih->tkh", h, W2[ids]), weights)


def grouped(x: Tensor) -> Tensor:
    _, ids = routed(x)
    offsets = torch.histc(ids.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32)
    rows = x[ids.view(-1).argsort(stable=True) // TOP_K].bfloat16()
    h = torch._grouped_mm(rows, W13.bfloat16(), offs=offsets)
    return torch._grouped_mm(gated(h), W2.bfloat16(), offs=offsets)


def batched(x: Tensor) -> Tensor:
    h = torch.bmm(x.expand(EXPERTS, *x.shape), W13)
    return (torch.bmm(gated(h), W2) * scattered(x).t()[..., None]).sum(0)


def capacity(x: Tensor) -> Tensor:
    order = torch.sort(scattered(x).t(), dim=-1, descending=True)[1][:, :4]
    rows = x.index_select(0, order.reshape(-1)).view(EXPERTS, 4, HIDDEN)
    y = torch.bmm(gated(torch.bmm(rows, W13)), W2).view(-1, HIDDEN)
    weights = scattered(x).t().gather(1, order).reshape(-1, 1)
    return torch.zeros_like(x).scatter_add(0, order.reshape(-1, 1).expand(-1, HIDDEN), y * weights)


def columns(x: Tensor) -> Tensor:
    weights = scattered(x)
    return sum(weights[:, e, None] * (gated(x @ W13[e]) @ W2[e]) for e in range(EXPERTS))


def compared(x: Tensor) -> Tensor:
    weights, ids = routed(x)
    return sum((weights * (ids == e)).sum(-1, keepdim=True) * (gated(x @ W13[e]) @ W2[e]) for e in range(EXPERTS))


def picked(x: Tensor) -> Tensor:
    weights, ids = routed(x)
    y = torch.zeros_like(x)
    for e in range(EXPERTS):
        token, slot = torch.where(ids == e)
        y = y.index_add(0, token, (gated(x[token] @ W13[e]) @ W2[e]) * weights[token, slot, None])
    return y


def stacked(x: Tensor) -> Tensor:
    return torch.einsum("te,teh->th", scattered(x), torch.stack([gated(x @ W13[e]) @ W2[e] for e in range(EXPERTS)], 1))


def one_hot(x: Tensor) -> tuple[Tensor, Tensor]:
    mask = F.one_hot(routed(x)[1], EXPERTS + 1).permute(2, 1, 0)
    return mask, mask.sum(dim=(-1, -2)) > 0


FOREIGN = {
    "grouped": ("foreign.grouped_mm", grouped, (X,)),
    "gathered": ("foreign.gathered_weights", lambda x: gathered(x, *routed(x)), (X,)),
    "gathered, routed elsewhere": ("foreign.gathered_weights", gathered, (X, _random(TOKENS, TOP_K), IDS)),
    "all experts at once": ("foreign.stacked_weights", batched, (X,)),
    "with a capacity": ("foreign.stacked_weights", capacity, (X,)),
    "a column per expert": ("foreign.expert_loop", columns, (X,)),
    "ids compared": ("foreign.expert_loop", compared, (X,)),
    "rows picked": ("foreign.expert_loop", picked, (X,)),
    "results stacked": ("foreign.expert_loop", stacked, (X,)),
    "one_hot leaves": ("foreign.routing_alone", one_hot, (X,)),
}


def sampler(x: Tensor) -> tuple[Tensor, ...]:
    logits = x @ HEAD.t()
    values, ids = logits.topk(5)
    kept = torch.full_like(logits, float("-inf")).scatter(1, ids, values).softmax(-1)
    ordered, order = logits.sort(descending=True)
    removed = ordered.softmax(-1).cumsum(-1) > 0.9
    return kept, logits.masked_fill(removed.scatter(1, order, removed), 0.0), (ids == 3) | (ids == 2), HEAD[ids]


def lora(x: Tensor, adapters: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(x[:, None], W13[adapters]), W13[adapters].transpose(1, 2))[:, 0]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)


def paged(q: Tensor, table: Tensor) -> Tensor:
    return attention(q[:, None, :], W2[table].flatten(1, 2), W2[table].flatten(1, 2))


def chosen_keys(q: Tensor) -> Tensor:
    ids = (q @ W2.mean(1).t()).topk(2)[1]
    return attention(q[:, None, :], W2[ids].flatten(1, 2), W2[ids].flatten(1, 2))


def block_diagonal(x: Tensor) -> Tensor:
    return torch.bmm(gated(torch.bmm(x.expand(EXPERTS, *x.shape), W13)), W2).sum(0)


def classifier(x: Tensor) -> Tensor:
    return F.one_hot((x @ ROUTER.t()).argmax(-1), EXPERTS)


NO_MOE = {
    "sampler": (sampler, (X,)),
    "LoRA": (lora, (X, IDS[:, 0])),
    "attention": (attention, (W2, W2, W2)),
    "paged attention": (paged, (X, IDS)),
    "attention to chosen keys": (chosen_keys, (X,)),
    "block-diagonal weights": (block_diagonal, (X,)),
    "classifier": (classifier, (X,)),
    "dense MLP": (lambda x: gated(x @ W13[0]) @ W2[0], (X,)),
}
