"""Layers that look like MoE layers and are none: what ``foreign_layers`` has, with one thing missing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from foreign_layers import (
    EXPERTS,
    HEAD,
    HIDDEN,
    IDS,
    MATRICES,
    ROUTER,
    W2,
    W13,
    X,
    gated,
    normed,
    random_tensor,
)
from torch import Tensor


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
    "states of a recurrent layer": (
        recurrent,
        (X, torch.arange(6), random_tensor(9, HIDDEN, 4), random_tensor(9, 16, 8)),
    ),
    "words that end a text": (ended, (X,)),
    "means of classes": (class_means, (X,)),
    "used codes and words": (used_codes, (X, IDS)),
    "maxima before block-diagonal weights": (pooled, (X,)),
    "dense MLP": (lambda x: gated(x @ W13[0]) @ W2[0], (X,)),
}
