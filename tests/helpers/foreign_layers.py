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


def chained(x: Tensor) -> Tensor:
    ids, y = (x @ ROUTER.t()).argmax(-1, keepdim=True), torch.zeros_like(x)
    for e in range(EXPERTS):
        y = torch.where(ids == e, gated(x @ W13[e]) @ W2[e], y)
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
    "gathered, routed elsewhere": ("foreign.gathered_weights", gathered, (X, _random(TOKENS, TOP_K), IDS)),
    "gathered, with a norm": ("foreign.gathered_weights", lambda x: normed(x, routed(x)[1]), (X,)),
    "all experts at once": ("foreign.stacked_weights", batched, (X,)),
    "with a capacity": ("foreign.stacked_weights", capacity, (X,)),
    "a column per expert": ("foreign.expert_loop", columns, (X,)),
    "ids compared": ("foreign.expert_loop", compared, (X,)),
    "rows picked": ("foreign.expert_loop", picked, (X,)),
    "rows masked": ("foreign.expert_loop", masked, (X,)),
    "a where per expert": ("foreign.expert_loop", chained, (X,)),
    "results stacked": ("foreign.expert_loop", stacked, (X,)),
    "one_hot leaves": ("foreign.routing_alone", one_hot, (X,)),
    "one_hot of given ids leaves": ("foreign.routing_alone", hit, (IDS,)),
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


def capped_scores(q: Tensor) -> Tensor:
    """An activation before the softmax."""
    ids = (q @ W2.mean(1).t()).topk(2)[1]
    keys, values = (W2[ids].flatten(1, 2) for _ in range(2))
    scores = torch.tanh(torch.bmm(q[:, None], keys.transpose(1, 2)) / 30) * 30
    return torch.bmm(scores.softmax(-1), values)


def block_diagonal(x: Tensor) -> Tensor:
    return torch.bmm(gated(torch.bmm(x.expand(EXPERTS, *x.shape), W13)), W2).sum(0)


def classifier(x: Tensor) -> Tensor:
    return F.one_hot((x @ ROUTER.t()).argmax(-1), EXPERTS)


def recurrent(x: Tensor, slots: Tensor, windows: Tensor, states: Tensor) -> tuple[Tensor, ...]:
    """A decode step of Mamba 2: the states of a batch's sequences lie in a cache, at ``slots``."""
    window = torch.cat([windows[slots][:, :, 1:], x[:, :, None]], -1)
    inner, write, read = F.silu((window * W13[:, :, 0][0, :, None]).sum(-1)).split(
        [HIDDEN // 2, HIDDEN // 4, HIDDEN // 4], -1
    )
    state = states[slots] * 0.9 + inner[:, :, None] * write[:, None, :]
    windows[slots] = window
    return torch.bmm(state, read[:, :, None]), windows, states.index_copy(0, slots, state)


def ended(x: Tensor) -> tuple[Tensor, ...]:
    """Two words end a text: a batch's rows that have ended are filled up."""
    logits = x @ HEAD.t()
    word = logits.argmax(-1)
    done = (word == 2) | (word == 3)
    return torch.where(done, 0, word), logits * ~done[:, None]


def class_means(x: Tensor) -> Tensor:
    h = x @ W13[0]
    classes = (h @ W13[0].t() @ ROUTER.t()).argmax(-1)
    return torch.stack([(h * (classes == e)[:, None]).mean(0) for e in range(EXPERTS)])


def used_codes(x: Tensor, words: Tensor) -> tuple[Tensor, ...]:
    codes = F.one_hot((x @ HEAD.t()).argmax(-1), 50).float()
    return codes @ HEAD, codes.mean(0), codes.sum(0) > 0, F.one_hot(words, 50).sum(1) > 0


def pooled(x: Tensor) -> Tensor:
    return block_diagonal(x.view(2, -1, HIDDEN).max(1)[0])


NO_MOE = {
    "sampler": (sampler, (X,)),
    "LoRA": (lora, (X, IDS[:, 0])),
    "attention": (attention, (W2, W2, W2)),
    "paged attention": (paged, (X, IDS)),
    "attention to chosen keys": (chosen_keys, (X,)),
    "attention to chosen keys, capped": (capped_scores, (X,)),
    "adapters with a norm, of given ids": (normed, (X, IDS)),
    "block-diagonal weights": (block_diagonal, (X,)),
    "classifier": (classifier, (X,)),
    "states of a recurrent layer": (recurrent, (X, torch.arange(6), _random(9, HIDDEN, 4), _random(9, 16, 8))),
    "words that end a text": (ended, (X,)),
    "means of classes": (class_means, (X,)),
    "used codes and words": (used_codes, (X, IDS)),
    "maxima before block-diagonal weights": (pooled, (X,)),
    "dense MLP": (lambda x: gated(x @ W13[0]) @ W2[0], (X,)),
}
