"""Whole layers of random spellings, router and experts, of which one piece may be twisted: ``compose_module``.

The tables have, for each piece of a router, spellings that routers have and twists of them that compute something else. What a
layer computes is what its graph as traced computes: a twist is left, or is another layer that is lowered as what it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from foreign_forms import EXPERTS, HIDDEN
from foreign_gathered_variants import GATHERED_PIECES, compose_gathered
from foreign_variants import PIECES, compose
from torch import Tensor

Spelled = dict[str, Callable[..., Any]]
Table = tuple[Spelled, Spelled]  # as routers have it, and twisted

# logits [T, E] -> scores
SCORES: Table = (
    {
        "softmax": lambda logits: logits.softmax(-1),
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
        "by hand": lambda logits: logits.exp() / logits.exp().sum(-1, keepdim=True),
        "turned": lambda logits: logits.t().softmax(0).t(),
        "cooler": lambda logits: (torch.tanh(logits / 3) * 3).softmax(-1),
    },
    {
        "over tokens": lambda logits: logits.softmax(0),
        "twice": lambda logits: logits.softmax(-1).softmax(-1),
        "softplus": lambda logits: F.softplus(logits, threshold=1).sqrt(),
        "reversed": lambda logits: logits.softmax(-1).flip(-1),
        "by halves": lambda logits: torch.cat([half.softmax(-1) for half in logits.chunk(2, -1)], -1),
        "in 16 bits": lambda logits: logits.bfloat16().sigmoid().float(),
    },
)


def in_groups(scores: Tensor, fill: float, best: Callable[[Tensor], Tensor], interleaved: bool = False) -> Tensor:
    """Scores of the better half of two groups."""
    grouped = scores.view(-1, 2, EXPERTS // 2)
    mask = torch.zeros(scores.shape[0], 2).scatter(1, best(grouped).topk(1)[1], 1.0)
    mask = mask.repeat(1, 2) if interleaved else mask.unsqueeze(-1).expand(-1, 2, EXPERTS // 2).reshape(scores.shape)
    return scores.masked_fill(mask == 0, fill)


# (scores, bias [E]) -> what is chosen by
CHOSEN_BY: Table = (
    {
        "scores": lambda scores, bias: scores,
        "biased": lambda scores, bias: scores + bias,
        "groups": lambda scores, bias: in_groups(scores, 0.0, lambda grouped: grouped.amax(-1)),
        "groups, biased": lambda scores, bias: in_groups(
            scores + bias, float("-inf"), lambda grouped: grouped.topk(2)[0].sum(-1)
        ),
    },
    {
        "minus the bias": lambda scores, bias: scores - bias,
        "by token": lambda scores, bias: scores + scores.sum(0, keepdim=True),
        "means of groups": lambda scores, bias: in_groups(scores, 0.0, lambda grouped: grouped.mean(-1)),
        "groups that alternate": lambda scores, bias: in_groups(scores, 0.0, lambda g: g.amax(-1), interleaved=True),
        "groups filled with one": lambda scores, bias: in_groups(scores, 1.0, lambda grouped: grouped.amax(-1)),
        "groups filled with zero, biased": lambda scores, bias: in_groups(scores + bias, 0.0, lambda g: g.amax(-1)),
    },
)
# (what is chosen by, k) -> ids
CHOICE: Table = (
    {
        "topk": lambda by, k: by.topk(k)[1],
        "topk, unsorted": lambda by, k: by.topk(k, sorted=False)[1],
        "argsort": lambda by, k: by.argsort(-1, descending=True)[:, :k],
    },
    {
        "smallest": lambda by, k: by.topk(k, largest=False)[1],
        "from the second on": lambda by, k: by.topk(k + 1)[1][:, 1:],
        "of the next token": lambda by, k: by.topk(k)[1].roll(1, 0),
        "renumbered": lambda by, k: (by.topk(k)[1] + 1) % EXPERTS,
        "mirrored": lambda by, k: EXPERTS - 1 - by.topk(k)[1],
        "bits": lambda by, k: by.topk(k)[1] ^ 1,
        "clamped": lambda by, k: by.topk(k)[1].clamp(max=EXPERTS - 2),
        "halved": lambda by, k: by.topk(k)[1] // 2,
    },
)
# (scores, what is chosen by, ids, logits) -> weights
TAKEN: Table = (
    {
        "gather": lambda scores, by, ids, logits: scores.gather(-1, ids),
        "index": lambda scores, by, ids, logits: scores[torch.arange(len(scores))[:, None], ids],
        "softmax of the chosen": lambda scores, by, ids, logits: logits.gather(-1, ids).softmax(-1),
    },
    {
        "biased": lambda scores, by, ids, logits: by.gather(-1, ids),
        "logits": lambda scores, by, ids, logits: logits.gather(-1, ids),
        "softmax of scores": lambda scores, by, ids, logits: scores.gather(-1, ids).softmax(-1),
        "of other ids": lambda scores, by, ids, logits: scores.gather(-1, ids.flip(-1)),
        "of another token": lambda scores, by, ids, logits: scores.roll(1, 0).gather(-1, ids),
        "in order": lambda scores, by, ids, logits: scores.topk(ids.shape[-1])[0],
        "squares": lambda scores, by, ids, logits: scores.gather(-1, ids) ** 2,
    },
)
# weights -> weights
NORM: Table = (
    {
        "none": lambda w: w,
        "sum": lambda w: w / w.sum(-1, keepdim=True),
        "sum, epsilon": lambda w: w / (w.sum(-1, keepdim=True) + 1e-20),
        "scaled": lambda w: w / w.sum(-1, keepdim=True) * 2.5,
    },
    {
        "a large epsilon": lambda w: w / (w.sum(-1, keepdim=True) + 0.1),
        "two epsilons": lambda w: w / (w.sum(-1, keepdim=True) + 0.1 + 0.1),
        "clamped": lambda w: w / w.sum(-1, keepdim=True).clamp(min=0.7),
        "over tokens": lambda w: w / w.sum(0, keepdim=True),
        "largest": lambda w: w / w.amax(-1, keepdim=True),
        "scaled before": lambda w: w * 2.5 / w.sum(-1, keepdim=True),
        "sum after": lambda w: w / w.sum(-1, keepdim=True) + 0.1,
        "running": lambda w: w.cumsum(-1),
        "threshold": lambda w: torch.where(w > 0.3, w, 0.0),
        "every other token": lambda w: w * (torch.arange(len(w)) % 2 == 0)[:, None],
    },
)
ROUTER: dict[str, Table] = {"scores": SCORES, "chosen by": CHOSEN_BY, "choice": CHOICE, "taken": TAKEN, "norm": NORM}


def compose_module(draw: random.Random) -> tuple[Callable[..., Any], dict[str, Tensor], dict[str, str]]:
    """A layer with its router, its tensors, and which spelling each of its pieces has; a twisted one begins with ``~``."""
    make, pieces = draw.choice(((compose, PIECES), (compose_gathered, GATHERED_PIECES)))
    plain = {name: next(iter(table)) for name, table in pieces.items()} | {"k": draw.choice("12")}
    for name in draw.sample([*plain], 3):  # most layers of more would be left for the sake of one
        del plain[name]
    layer, chosen = make(draw, **plain)
    twisted = draw.choice([*ROUTER, ""])
    spelled: Spelled = {}
    for piece, (usual, twists) in ROUTER.items():
        table = twists if piece == twisted else usual
        how = draw.choice([*table] + [next(iter(usual))] * 3 * (piece != twisted))
        spelled[piece], chosen[f"router: {piece}"] = table[how], f"~{how}" if piece == twisted else how
    made = layer.make(draw.randrange(1000))
    generator = torch.Generator().manual_seed(draw.randrange(1000))
    made |= {
        "gating": torch.randn(HIDDEN, EXPERTS, generator=generator),
        "bias": torch.randn(EXPERTS, generator=generator) / 4,
    }
    del made["weights"], made["ids"]

    def forward(x: Tensor, gating: Tensor, bias: Tensor, **tensors: Tensor) -> Any:
        logits = x @ gating
        scores = spelled["scores"](logits)
        by = spelled["chosen by"](scores, bias)
        ids = spelled["choice"](by, layer.top_k)
        weights = spelled["norm"](spelled["taken"](scores, by, ids, logits))
        return layer.function(x=x, weights=weights, ids=ids, **tensors)

    return forward, made, chosen
