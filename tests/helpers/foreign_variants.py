"""MoE layers put together from pieces, each piece in the ways that models spell it: ``compose`` draws one of each.

What a layer computes does not depend on how its pieces are spelled, so one reference serves all. A spelling that the rules do
not know is refused with a code; one that they know is raised, and right.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from foreign_forms import (
    APART,
    BIASES,
    EXPERTS,
    FLOAT,
    HIDDEN,
    INTERMEDIATE,
    KN,
    NK,
    Foreign,
    apart,
    kn,
    nk,
    product,
)
from foreign_twins import scores
from torch import Tensor

Spelled = dict[str, Callable[..., Any]]


def tokens_of(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[0]).repeat_interleave(ids.shape[1])


def stored(perm: Tensor, values: Tensor) -> Tensor:
    made = torch.empty_like(values)
    made[perm] = values
    return made


def added_up(rows: Tensor) -> Tensor:
    total = rows[:, 0]
    for at in range(1, rows.shape[1]):
        total = total + rows[:, at]
    return total


# (ids) -> the same ids, as a router may have chosen them
CHOICES: Spelled = {
    "given": lambda ids: ids,
    "topk": lambda ids: scores(ids).topk(ids.shape[1], -1)[1],
    "of a sort": lambda ids: scores(ids).sort(-1, descending=True)[1][:, : ids.shape[1]],
    "of an argsort": lambda ids: scores(ids).argsort(-1, descending=True).narrow(-1, 0, ids.shape[1]),
    "along the first axis": lambda ids: scores(ids).t().topk(ids.shape[1], 0)[1].t(),
    "of more dimensions": lambda ids: scores(ids).view(2, -1, EXPERTS).topk(ids.shape[1], -1)[1].view(ids.shape),
    "flat": lambda ids: scores(ids).topk(ids.shape[1])[1].view(-1).clone().view(ids.shape),
    "flat, through a table": lambda ids: torch.arange(EXPERTS)[scores(ids).topk(ids.shape[1])[1].view(-1)].view(
        ids.shape
    ),
    "turned twice": lambda ids: scores(ids).topk(ids.shape[1])[1].flip(-1).to(torch.int32).flip(-1),
    "the best of more": lambda ids: scores(ids).topk(EXPERTS)[1].split([ids.shape[1], EXPERTS - ids.shape[1]], -1)[0],
    "one of several layers": lambda ids: torch.stack([scores(ids)] * 2).topk(ids.shape[1], -1)[1][1],
    "gathered in another order": lambda ids: (
        scores(ids)
        .topk(ids.shape[1])[1]
        .gather(1, torch.arange(ids.shape[1], 0, -1).expand(ids.shape).float().argsort(-1, descending=True))
    ),
}


# (ids) -> (ids in order, permutation)
ORDERS: Spelled = {
    "sort": lambda ids: torch.sort(ids.reshape(-1)),
    "sort, stable": lambda ids: torch.sort(ids.view(-1), stable=True),
    "argsort": lambda ids: _with_ids(ids, ids.flatten().argsort()),
    "argsort, stable": lambda ids: _with_ids(ids, torch.argsort(ids.view(-1), stable=True)),
    "argsort of int32": lambda ids: _with_ids(ids, ids.to(torch.int32).view(-1).argsort(stable=True)),
    "argsort of floats": lambda ids: _with_ids(ids, ids.float().view(-1).argsort(stable=True)),
    "argsort along a dimension": lambda ids: _with_ids(ids, ids.reshape(-1).argsort(dim=0)),
    "lowest of topk": lambda ids: torch.topk(ids.view(-1), ids.numel(), largest=False),
}


def _with_ids(ids: Tensor, perm: Tensor) -> tuple[Tensor, Tensor]:
    return ids.view(-1)[perm], perm


# (ids in any order, ids in order) -> offsets
ENDS: Spelled = {
    "histc": lambda ids, ordered: torch.histc(ordered.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32),
    "histc, unsorted": lambda ids, o: torch.histc(ids.float(), EXPERTS, 0, EXPERTS).cumsum(0, dtype=torch.int32),
    "one_hot": lambda ids, o: F.one_hot(ids.view(-1), EXPERTS).sum(0).cumsum(0).to(torch.int32),
    "one_hot, by token": lambda ids, o: F.one_hot(ids, EXPERTS).sum(1).sum(0).cumsum(0).to(torch.int32),
    "one_hot, int32": lambda ids, o: F.one_hot(ids, EXPERTS).sum((0, 1), dtype=torch.int32).cumsum(0).int(),
    "one_hot, turned": lambda ids, o: F.one_hot(ids, EXPERTS).permute(2, 1, 0).sum((-1, -2)).cumsum(0).int(),
    "compared": lambda ids, o: (ids.view(-1, 1) == torch.arange(EXPERTS)).sum(0).cumsum(0).to(torch.int32),
    "compared, turned": lambda ids, o: (torch.arange(EXPERTS)[:, None] == ids.view(1, -1)).sum(-1).cumsum(0).int(),
    "scatter_add": lambda ids, o: (
        ids.new_zeros(EXPERTS).scatter_add(0, ids.view(-1), torch.ones_like(ids.view(-1))).cumsum(0).int()
    ),
    "scatter, by token": lambda ids, o: (
        ids.new_zeros((ids.shape[0], EXPERTS)).scatter(1, ids, 1).sum(0).cumsum(0).to(torch.int32)
    ),
    "searchsorted": lambda ids, o: torch.searchsorted(o, torch.arange(EXPERTS), right=True).to(torch.int32),
    "searchsorted, the next": lambda ids, o: torch.searchsorted(o, torch.arange(1, EXPERTS + 1)).int(),
    "compared, at most": lambda ids, o: (ids.view(-1, 1) <= torch.arange(EXPERTS)).sum(0).to(torch.int32),
    "bucketize": lambda ids, o: torch.bucketize(torch.arange(EXPERTS), o, right=True).to(torch.int32),
    "a leading zero": lambda ids, o: F.pad(
        torch.histc(ids.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32), (1, 0)
    )[1:],
}


# (x, permutation, ids) -> rows
ROWS: Spelled = {
    "index": lambda x, perm, ids: x[perm // ids.shape[1]],
    "div": lambda x, perm, ids: x[torch.div(perm, ids.shape[1], rounding_mode="floor")],
    "index_select": lambda x, perm, ids: x.index_select(0, perm // ids.shape[1]),
    "gather": lambda x, perm, ids: x.gather(0, (perm // ids.shape[1])[:, None].expand(-1, x.shape[1])),
    "embedding": lambda x, perm, ids: F.embedding(perm // ids.shape[1], x),
    "repeated": lambda x, perm, ids: x.repeat_interleave(ids.shape[1], 0)[perm],
    "expanded": lambda x, perm, ids: x[:, None].expand(-1, ids.shape[1], -1).reshape(-1, x.shape[1])[perm],
    "tokens looked up": lambda x, perm, ids: x[tokens_of(ids)[perm]],
    "tokens expanded": lambda x, perm, ids: x[
        torch.arange(ids.shape[0]).unsqueeze(1).expand(-1, ids.shape[1]).reshape(-1)[perm]
    ],
    "tokens by take": lambda x, perm, ids: torch.take_along_dim(x, (perm // ids.shape[1])[:, None], 0),
}


# (rows [N, 2I]) -> (gate, up)
HALVES: Spelled = {
    "chunk": lambda h: h.chunk(2, -1),
    "split": lambda h: h.split(INTERMEDIATE, -1),
    "slice": lambda h: (h[..., :INTERMEDIATE], h[..., INTERMEDIATE:]),
    "narrow": lambda h: (h.narrow(-1, 0, INTERMEDIATE), h.narrow(-1, INTERMEDIATE, INTERMEDIATE)),
    "unflatten": lambda h: h.unflatten(-1, (2, INTERMEDIATE)).unbind(-2),
    "view": lambda h: (h.view(-1, 2, INTERMEDIATE)[:, 0], h.view(-1, 2, INTERMEDIATE)[:, 1]),
    "tensor_split": lambda h: torch.tensor_split(h, 2, -1),
}


# (gate, up)
GATES: Spelled = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "up first": lambda gate, up: up * F.silu(gate),
    "sigmoid": lambda gate, up: gate * torch.sigmoid(gate) * up,
    "sigmoid, up first": lambda gate, up: (up * gate) * gate.sigmoid(),
    "float": lambda gate, up: (F.silu(gate.float()) * up.float()).to(gate.dtype),
    "gate in float": lambda gate, up: F.silu(gate.float()).to(gate.dtype) * up,
    "exp": lambda gate, up: gate / (1 + torch.exp(-gate)) * up,
    "times one": lambda gate, up: F.silu(gate) * up * 1.0,
    "halved and doubled": lambda gate, up: F.silu(gate) * 0.5 * (up * 2),
    "tanh": lambda gate, up: 0.5 * gate * (1 + torch.tanh(gate * 0.5)) * up,
    "addcmul": lambda gate, up: torch.addcmul(torch.zeros_like(up), F.silu(gate), up),
}


# (weights, permutation) -> a number for each row
SCALES: Spelled = {
    "index": lambda weights, perm: weights.reshape(-1)[perm].unsqueeze(-1),
    "index of columns": lambda weights, perm: weights.reshape(-1, 1)[perm],
    "index_select": lambda weights, perm: weights.flatten().index_select(0, perm)[:, None],
    "gather": lambda weights, perm: weights.view(-1).gather(0, perm).view(-1, 1),
    "take": lambda weights, perm: torch.take(weights, perm)[:, None],
    "by token": lambda weights, perm: weights[perm // weights.shape[1], perm % weights.shape[1]][:, None],
}


# (rows with their weights in order, permutation, ids, x) -> y
BACKS: Spelled = {
    "index_put": lambda y, perm, ids, x: y[stored(perm, torch.arange(len(perm)))].view(*ids.shape, -1).sum(1),
    "second argsort": lambda y, perm, ids, x: y[perm.argsort()].view(*ids.shape, -1).sum(dim=1),
    "second sort": lambda y, perm, ids, x: y[torch.sort(perm)[1]].reshape(*ids.shape, -1).sum(1),
    "stored": lambda y, perm, ids, x: stored(perm, y).view(*ids.shape, -1).sum(dim=-2),
    "scatter of places": lambda y, perm, ids, x: (
        y[torch.zeros_like(perm).scatter(0, perm, torch.arange(len(perm)))].view(*ids.shape, -1).sum(1)
    ),
    "scatter of rows": lambda y, perm, ids, x: (
        torch.zeros_like(y).scatter(0, perm[:, None].expand_as(y), y).view(*ids.shape, -1).sum(1)
    ),
    "index_copy": lambda y, perm, ids, x: torch.zeros_like(y).index_copy(0, perm, y).view(*ids.shape, -1).sum(1),
    "index_add of slots": lambda y, perm, ids, x: torch.zeros_like(y).index_add(0, perm, y).view(*ids.shape, -1).sum(1),
    "index_add": lambda y, perm, ids, x: torch.zeros_like(x).index_add(0, perm // ids.shape[1], y.to(x.dtype)),
    "index_add of tokens": lambda y, perm, ids, x: torch.zeros_like(x).index_add(
        0, tokens_of(ids)[perm], y.to(x.dtype)
    ),
    "scatter_add": lambda y, perm, ids, x: torch.zeros_like(x).scatter_add(
        0, (perm // ids.shape[1])[:, None].expand_as(y), y.to(x.dtype)
    ),
    "scatter_reduce": lambda y, perm, ids, x: torch.zeros_like(x).scatter_reduce(
        0, (perm // ids.shape[1])[:, None].expand_as(y), y.to(x.dtype), "sum"
    ),
    "index_put, accumulated": lambda y, perm, ids, x: torch.zeros_like(x).index_put(
        (perm // ids.shape[1],), y.to(x.dtype), accumulate=True
    ),
    "added one by one": lambda y, perm, ids, x: added_up(y[perm.argsort()].view(*ids.shape, -1)),
    "a product of ones": lambda y, perm, ids, x: torch.einsum("tkh->th", y[perm.argsort()].view(*ids.shape, -1)),
    "columns first": lambda y, perm, ids, x: y[perm.argsort()].view(*ids.shape, -1).transpose(1, 2).sum(-1),
    "kept dimension": lambda y, perm, ids, x: y[perm.argsort()].view(*ids.shape, -1).sum(1, keepdim=True).squeeze(1),
    "mean": lambda y, perm, ids, x: y[perm.argsort()].view(*ids.shape, -1).mean(1) * ids.shape[1],
    "float sum": lambda y, perm, ids, x: y[perm.argsort()].view(*ids.shape, -1).float().sum(1).to(x.dtype),
}


# (rows without their weights in order, permutation, ids, weights) -> y: weights after the way back
WEIGHED_BACKS: Spelled = {
    "multiplied": lambda y, ids, weights: (y * weights.unsqueeze(-1)).sum(1),
    "multiplied from the left": lambda y, ids, weights: (weights[..., None] * y).sum(dim=1),
    "bmm": lambda y, ids, weights: torch.bmm(weights.unsqueeze(1), y).squeeze(1),
    "matmul": lambda y, ids, weights: (weights.unsqueeze(-2) @ y).squeeze(-2),
    "einsum": lambda y, ids, weights: torch.einsum("tkh,tk->th", y, weights),
    "einsum, turned": lambda y, ids, weights: torch.einsum("tk,tkh->th", weights, y),
    "flat": lambda y, ids, weights: (y.view(ids.numel(), -1) * weights.view(-1, 1)).view(*ids.shape, -1).sum(1),
}


# (x, y) -> what is done afterwards
AFTER: Spelled = {
    "nothing": lambda x, y, shared: y,
    "cast": lambda x, y, shared: y.to(x.dtype),
    "residual": lambda x, y, shared: x + y,
    "shared": lambda x, y, shared: y + x @ shared,
    "shared, behind": lambda x, y, shared: x @ shared + y,
    "shared, fused": lambda x, y, shared: torch.addmm(y, x, shared),
    "scaled": lambda x, y, shared: y * 2.5,
    "three dimensions": lambda x, y, shared: y.view(2, -1, y.shape[-1]),
    "doubled": lambda x, y, shared: y + y,
}


AFTERWARDS: Spelled = {
    "residual": lambda x, y, shared: x + y,
    "shared": lambda x, y, shared: y + x @ shared,
    "shared, behind": lambda x, y, shared: y + x @ shared,
    "shared, fused": lambda x, y, shared: y + x @ shared,
    "scaled": lambda x, y, shared: y * 2.5,
    "three dimensions": lambda x, y, shared: y.view(2, -1, y.shape[-1]),
    "doubled": lambda x, y, shared: 2 * y,
}


# where weights are multiplied with
WHERE = ("rows", "rows in float32", "back", "activation", "first rows")


WEIGHTS = ("joined", "joined, turned", "biased", "apart")


PIECES: dict[str, Any] = {
    "choice": CHOICES,
    "order": ORDERS,
    "ends": ENDS,
    "rows": ROWS,
    "halves": HALVES,
    "gate": GATES,
    "scale": SCALES,
    "back": BACKS,
    "weighed": WEIGHED_BACKS,
    "after": AFTER,
    "where": WHERE,
    "weights": WEIGHTS,
    "k": ("2", "1", "3"),
}


def compose(draw: random.Random, **fixed: str) -> tuple[Foreign, dict[str, str]]:
    """A layer of grouped products, and which spelling each of its pieces has."""
    chosen = {name: fixed.get(name) or draw.choice(list(table)) for name, table in PIECES.items()}

    def forward(x: Tensor, weights: Tensor, ids: Tensor, shared: Tensor, **t: Tensor) -> Tensor:
        ids = CHOICES[chosen["choice"]](ids).contiguous()
        ordered, perm = ORDERS[chosen["order"]](ids)
        offs = ENDS[chosen["ends"]](ids, ordered)
        rows = ROWS[chosen["rows"]](x, perm, ids)
        scale = SCALES[chosen["scale"]](weights, perm)
        if chosen["where"] == "first rows":
            rows = rows * scale
        act = _first(chosen, rows, offs, ordered, t)
        if chosen["where"] == "activation":
            act = act * scale
        w2 = t["w2"] if chosen["weights"] in ("joined, turned", "biased") else t["w2"].transpose(-2, -1)
        y = product(act, w2, offs)
        if chosen["weights"] == "biased":
            y = y + t["w2_bias"][ordered]
        if chosen["where"] == "rows":
            y = y * scale
        elif chosen["where"] == "rows in float32":
            y = (y.float() * scale).to(x.dtype)
        if chosen["where"] == "back":
            y = WEIGHED_BACKS[chosen["weighed"]](y[perm.argsort()].view(*ids.shape, -1), ids, weights)
        else:
            y = BACKS[chosen["back"]](y, perm, ids, x)
        return AFTER[chosen["after"]](x, y, shared)

    shapes, expected = {
        "joined": (NK, nk()), "joined, turned": (KN, kn()), "biased": (KN | BIASES, kn()), "apart": (APART, apart),
    }[chosen["weights"]]  # fmt: skip
    layer = Foreign(
        "grouped_mm", forward, {**shapes, "shared": (HIDDEN, HIDDEN)}, expected, FLOAT, top_k=int(chosen["k"])
    )
    return layer, chosen


def _first(chosen: dict[str, str], rows: Tensor, offs: Tensor, ordered: Tensor, t: dict[str, Tensor]) -> Tensor:
    gated = GATES[chosen["gate"]]
    if chosen["weights"] == "apart":
        pair = (product(rows, t[name].transpose(-2, -1), offs) for name in ("w1", "w3"))
        return gated(*pair)  # type: ignore[no-any-return]
    h = product(rows, t["w13"] if chosen["weights"] != "joined" else t["w13"].transpose(-2, -1), offs)
    if chosen["weights"] == "biased":
        h = h + t["w13_bias"][ordered]
    return gated(*HALVES[chosen["halves"]](h))  # type: ignore[no-any-return]
