"""MoE layers that are not written with the generic operators, and layers that look alike and are no MoE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 6, 32, 16, 8, 2


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


W13, W2 = _random(EXPERTS, HIDDEN, 2 * INTERMEDIATE), _random(EXPERTS, INTERMEDIATE, HIDDEN)
ROUTER, X, HEAD = _random(EXPERTS, HIDDEN), _random(TOKENS, HIDDEN), _random(50, HIDDEN)
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
    "gathered, routed elsewhere": ("foreign.gathered_weights", gathered, (X, _random(TOKENS, TOP_K), IDS)),
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


def latent_keys(q: Tensor) -> Tensor:
    """Keys that are the values too, of which the best are chosen."""
    chosen = W2[(q @ W2.mean(1).t()).topk(2)[1]].flatten(1, 2)
    return attention(F.silu(q)[:, None], chosen, chosen)


def embedded_words(words: Tensor) -> Tensor:
    x = F.embedding(words[:, 0], HEAD)
    return gated(x @ W13[0]) @ W2[0]


def most_likely(x: Tensor) -> Tensor:
    """A sampler's threshold, and two words that end a text."""
    logits = x @ HEAD.t()
    kept = logits.masked_fill(logits < logits.topk(5)[0][:, -1:], float("-inf")).softmax(-1)
    return kept[:, 2] + kept[:, 3]


def pruned(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """The best tokens of each text, all through one matrix."""
    texts = x.view(2, -1, HIDDEN)
    best = texts.mean(-1).topk(2)[1]
    return torch.stack([gated(text[best[b]] @ w13) @ w2 for b, text in enumerate(texts.unbind())])


def sparse_code(x: Tensor) -> Tensor:
    """The largest of a hidden layer, as sparse autoencoders have it."""
    h = F.relu(x @ W13[0])
    return (h * torch.zeros_like(h).scatter(1, h.topk(4)[1], 1.0)) @ W13[0].t()


def reordered(x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return (F.silu(x[order] @ W13[0]) * x[order]) @ W13[1]


NO_MOE = {
    "attention to chosen keys that are values": (latent_keys, (X,)),
    "embedded words": (embedded_words, (IDS,)),
    "most likely words": (most_likely, (X,)),
    "the best tokens of each text": (pruned, (X, *MATRICES[0])),
    "a sparse code": (sparse_code, (X,)),
    "tokens in another order": (reordered, (X,)),
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
