"""MoE layers that are not written with the generic operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 6, 32, 16, 8, 2


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


W13, W2 = random_tensor(EXPERTS, HIDDEN, 2 * INTERMEDIATE), random_tensor(EXPERTS, INTERMEDIATE, HIDDEN)
ROUTER, X, HEAD = random_tensor(EXPERTS, HIDDEN), random_tensor(TOKENS, HIDDEN), random_tensor(50, HIDDEN)
MATRICES = tuple(zip(W13.clone().unbind(), W2.clone().unbind(), strict=True))
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


def gathered_by(w13: Tensor, w2: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Of matrices of each slot."""
    h = gated(torch.einsum("th,tkhi->tki", x, w13))
    return torch.einsum("tki,tkih,tk->th", h, w2, weights)


def by_other_ids(x: Tensor) -> Tensor:
    weights, ids = routed(x)
    return gathered_by(W13[ids], W2[(ids + 1).flip(-1) % EXPERTS], x, weights)


def by_choice(x: Tensor) -> Tensor:
    """One choice after the other."""
    weights, ids = routed(x)
    return sum(gathered_by(W13[ids[:, k, None]], W2[ids[:, k, None]], x, weights[:, k, None]) for k in range(TOP_K))


def embedded(x: Tensor) -> Tensor:
    """Matrices that are stored as lines of a table."""
    weights, ids = routed(x)
    w13, w2 = (F.embedding(ids, w.flatten(1)).view(*ids.shape, *w.shape[1:]) for w in (W13, W2))
    return gathered_by(w13, w2, x, weights)


def taken(x: Tensor) -> Tensor:
    weights, ids = routed(x)
    w13, w2 = (
        w.gather(0, ids.view(-1, 1, 1).expand(-1, *w.shape[1:])).view(*ids.shape, *w.shape[1:]) for w in (W13, W2)
    )
    return gathered_by(w13, w2, x, weights)


def side_by_side(x: Tensor) -> Tensor:
    """All matrices of an expert in one tensor."""
    weights, ids = routed(x)
    w13, w2 = torch.cat([W13, W2.transpose(1, 2)], -1)[ids].split([2 * INTERMEDIATE, INTERMEDIATE], -1)
    return gathered_by(w13, w2.transpose(-1, -2), x, weights)


def normed(x: Tensor, ids: Tensor) -> Tensor:
    """No pointwise operator between the products."""
    h = gated(F.layer_norm(torch.einsum("th,tkhi->tki", x, W13[ids]), (2 * INTERMEDIATE,)))
    return torch.einsum("tki,tkih->tkh", h, W2[ids]).sum(1)


def grouped(x: Tensor) -> Tensor:
    _, ids = routed(x)
    offsets = torch.histc(ids.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32)
    rows = x[ids.view(-1).argsort(stable=True) // TOP_K].bfloat16()
    h = torch._grouped_mm(rows, W13.bfloat16(), offs=offsets)
    return torch._grouped_mm(gated(h), W2.bfloat16(), offs=offsets)


def batched(x: Tensor) -> Tensor:
    h = torch.bmm(x.expand(EXPERTS, *x.shape), W13)
    return (torch.bmm(gated(h), W2) * scattered(x).t()[..., None]).sum(0)


def broadcast(x: Tensor) -> Tensor:
    return torch.einsum("te,eth->th", scattered(x), gated(x @ W13) @ W2)


def hidden_weighed(x: Tensor) -> Tensor:
    h = gated(torch.einsum("th,ehi->tei", x, W13)) * scattered(x)[..., None]
    return torch.einsum("tei,eih->th", h, W2)


def one_product(x: Tensor) -> Tensor:
    """The experts' columns side by side in one dense product."""
    h = F.silu(x @ W13.transpose(0, 1).reshape(HIDDEN, -1)).view(-1, EXPERTS, 2 * INTERMEDIATE)
    return (h * scattered(x)[..., None]).flatten(1) @ torch.cat([W2, W2], 1).flatten(0, 1)


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


def masked(x: Tensor) -> Tensor:
    _, ids = routed(x)
    y = torch.zeros_like(x)
    for e in range(EXPERTS):
        rows = (ids == e).any(-1)
        y[rows] += gated(x[rows] @ W13[e]) @ W2[e]
    return y


def masked_slots(x: Tensor) -> Tensor:
    """The mask is made anew to write."""
    weights, ids = routed(x)
    rows, slots = x.repeat_interleave(TOP_K, 0), ids.view(-1)
    y = torch.zeros_like(rows)
    for e in range(EXPERTS):
        y[slots == e] = gated(rows[slots == e] @ W13[e]) @ W2[e]
    return (y.view(*ids.shape, -1) * weights[..., None]).sum(1)


def chained(x: Tensor) -> Tensor:
    ids, y = (x @ ROUTER.t()).argmax(-1, keepdim=True), torch.zeros_like(x)
    for e in range(EXPERTS):
        y = torch.where(ids == e, gated(x @ W13[e]) @ W2[e], y)
    return y


def kept(x: Tensor) -> Tensor:
    """The scores below the last chosen one."""
    logits = x @ ROUTER.t()
    return logits.masked_fill(logits < logits.topk(TOP_K)[0][:, -1:], float("-inf")).softmax(-1)


def above_the_last(x: Tensor) -> Tensor:
    weights = kept(x)
    return sum(weights[:, e, None] * (gated(x @ W13[e]) @ W2[e]) for e in range(EXPERTS))


def above_the_kth(x: Tensor) -> Tensor:
    logits = x @ ROUTER.t()
    weights = torch.where(logits >= logits.kthvalue(EXPERTS - 1, -1, keepdim=True)[0], logits, -torch.inf).softmax(-1)
    return (torch.bmm(gated(torch.bmm(x.expand(EXPERTS, *x.shape), W13)), W2) * weights.t()[..., None]).sum(0)


def straight_through(x: Tensor) -> Tensor:
    scores = (x @ ROUTER.t()).softmax(-1)
    hard = torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0) - scores + scores
    return sum(hard[:, e, None] * (gated(x @ W13[e]) @ W2[e]) for e in range(EXPERTS))


def experts_choose(x: Tensor, mats: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    weights, tokens = (x @ ROUTER.t()).softmax(-1).t().topk(3, -1)
    y = torch.zeros_like(x)
    for e, (w13, w2) in enumerate(mats):
        y = y.index_add(0, tokens[e], (gated(x[tokens[e]] @ w13) @ w2) * weights[e, :, None])
    return y


def stacked(x: Tensor) -> Tensor:
    return torch.einsum("te,teh->th", scattered(x), torch.stack([gated(x @ W13[e]) @ W2[e] for e in range(EXPERTS)], 1))


def one_hot(x: Tensor) -> tuple[Tensor, Tensor]:
    mask = F.one_hot(routed(x)[1], EXPERTS + 1).permute(2, 1, 0)
    return mask, mask.sum(dim=(-1, -2)) > 0


def hit(ids: Tensor) -> tuple[Tensor, Tensor]:
    mask = F.one_hot(ids, EXPERTS + 1).permute(2, 1, 0)
    return mask, mask.sum(dim=(-1, -2)) > 0


FOREIGN = {
    "grouped": ("foreign.grouped_mm", grouped, (X,)),
    "gathered": ("foreign.gathered_weights", lambda x: gathered(x, *routed(x)), (X,)),
    "gathered, routed elsewhere": ("foreign.gathered_weights", gathered, (X, random_tensor(TOKENS, TOP_K), IDS)),
    "gathered, with a norm": ("foreign.gathered_weights", lambda x: normed(x, routed(x)[1]), (X,)),
    "gathered by other ids": ("foreign.gathered_weights", by_other_ids, (X,)),
    "gathered choice by choice": ("foreign.gathered_weights", by_choice, (X,)),
    "lines of a table": ("foreign.gathered_weights", embedded, (X,)),
    "gathered by gather": ("foreign.gathered_weights", taken, (X,)),
    "all matrices in one": ("foreign.gathered_weights", side_by_side, (X,)),
    "products that broadcast": ("foreign.stacked_weights", broadcast, (X,)),
    "weights between the products": ("foreign.stacked_weights", hidden_weighed, (X,)),
    "one dense product": ("foreign.stacked_weights", one_product, (X,)),
    "above the kth": ("foreign.stacked_weights", above_the_kth, (X,)),
    "above the last of a top-k": ("foreign.expert_loop", above_the_last, (X,)),
    "straight through": ("foreign.expert_loop", straight_through, (X,)),
    "experts choose, stacked": ("foreign.expert_loop", lambda x: experts_choose(x, [*zip(W13, W2, strict=True)]), (X,)),
    "experts choose": ("foreign.expert_loop", experts_choose, (X, MATRICES)),
    "all experts at once": ("foreign.stacked_weights", batched, (X,)),
    "with a capacity": ("foreign.stacked_weights", capacity, (X,)),
    "a column per expert": ("foreign.expert_loop", columns, (X,)),
    "ids compared": ("foreign.expert_loop", compared, (X,)),
    "rows picked": ("foreign.expert_loop", picked, (X,)),
    "rows masked": ("foreign.expert_loop", masked, (X,)),
    "slots masked twice": ("foreign.expert_loop", masked_slots, (X,)),
    "a where per expert": ("foreign.expert_loop", chained, (X,)),
    "results stacked": ("foreign.expert_loop", stacked, (X,)),
    "one_hot leaves": ("foreign.routing_alone", one_hot, (X,)),
    "one_hot of given ids leaves": ("foreign.routing_alone", hit, (IDS,)),
}
