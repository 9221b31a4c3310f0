"""Layers that differ from one of ``foreign_forms`` in one thing, and are no expert layer that ``grouped_mlp`` has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from foreign_forms import APART, EXPERTS, FLOAT, NK, Foreign, halves, nk, offsets, order, product, titan_before
from torch import Tensor

# What may leave the range of experts, or name one twice for a token.
IDS: dict[str, Callable[[Tensor], Tensor]] = {
    "ids past the last": lambda ids: ids + 1,
    "ids masked": lambda ids: ids.masked_fill(ids == 0, EXPERTS),
    "ids clamped": lambda ids: ids.clamp(0, EXPERTS - 2),
    "ids of two choices": lambda ids: torch.cat([ids[:, :1], ids[:, :1].flip(0)], -1),
    "ids chosen by a condition": lambda ids: torch.where(ids > 2, ids, ids.flip(0)),
    "best ids of two heads": lambda ids: heads(ids).argmax(-1),
    "largest of two heads": lambda ids: heads(ids).max(-1)[1],
    "chosen by two heads": lambda ids: heads(ids).topk(1, -1)[1].view(ids.shape),
    "chosen among tokens": lambda ids: scores(ids).topk(ids.shape[0], 0)[1][:, : ids.shape[1]] % EXPERTS,
    "chosen along tokens": lambda ids: (
        scores(ids).view(-1, 2, EXPERTS).topk(2, 1)[1].reshape(-1, EXPERTS)[:, : ids.shape[1]]
    ),
    "one choice repeated": lambda ids: ids[:, :1].repeat(1, ids.shape[1]),
    "looked up in one place": lambda ids: ids.gather(1, torch.zeros_like(ids)),
    "chosen twice from a choice": lambda ids: ids[:, torch.arange(ids.shape[1]) // 2],
    "read by other tokens": lambda ids: ids.t().reshape(ids.shape),
    "through a table of choices": lambda ids: scores(ids)[:EXPERTS].argmax(-1)[ids],
    "through a bool": lambda ids: (ids > 0).long(),
}


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "halved": lambda act: act * 0.5,
    "through infinity": lambda act: act * 1e39 * 1e-39,
    "through zero": lambda act: act / 1e46 * 1e46,
}


def scores(ids: Tensor) -> Tensor:
    """[T, E]: the scores by which ``topk`` chooses ids, in their order."""
    ranks = torch.arange(ids.shape[1], 0, -1, dtype=torch.float32).expand(ids.shape)
    return torch.zeros(ids.shape[0], EXPERTS).scatter(1, ids, ranks)


def heads(ids: Tensor) -> Tensor:
    """[T, k, E]: scores of k heads, each of which chooses one id."""
    return F.one_hot(ids, EXPERTS).float()


def _changed_ids(ids: Tensor, change: str) -> Tensor:
    return IDS[change](ids) if change in IDS else ids


def grouped(change: str = "") -> Callable[..., Any]:
    """transformers' ``grouped_mm``, with one change."""

    def forward(x: Tensor, weights: Tensor, ids: Tensor, **t: Tensor) -> Any:
        ids = _changed_ids(ids, change)
        top_k = ids.shape[-1]
        other = (ids + 1) % EXPERTS
        sorted_ids, perm = order(other) if change == "sorted by other ids" else order(ids)
        if change == "descending":
            sorted_ids, perm = torch.sort(ids.reshape(-1), descending=True)
        counted = order(ids)[0] if change == "sorted by other ids" else sorted_ids
        offs = offsets(counted, EXPERTS - 2 if change == "bins" else EXPERTS - 1)
        if change == "no running sum":
            offs = torch.histc(counted.float(), EXPERTS, 0, EXPERTS - 1).to(torch.int32)
        if change == "counts shifted by one":
            shifted = torch.histc(counted.float(), EXPERTS, 0, EXPERTS - 1).roll(1)
            offs = shifted.cumsum(0, dtype=torch.int32)
        by = {"another k": top_k + 1}.get(change, top_k)
        place = perm.roll(1) if change == "rows off by one" else perm
        rows = x[place // by]
        if change == "rows activated":
            rows = F.relu(rows)
        h = product(rows, t["w13"].transpose(-2, -1), offs)
        if change == "relu between":
            h = F.relu(h)
        if change == "exchanged":
            h = torch.cat([h.chunk(2, -1)[1], h.chunk(2, -1)[0]], -1)
        if change == "up and gate":
            gate, up = h.chunk(2, -1)
            act = gate * F.silu(up)
        elif change == "no up":
            act = F.silu(h.chunk(2, -1)[0])
        elif change == "tanh":
            act = torch.tanh(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]
        elif change in NUMBERS:
            act = NUMBERS[change](halves(h))
        else:
            act = halves(h)
        y = product(act, t["w2"].transpose(-2, -1), offs)
        if change == "relu after":
            y = F.relu(y)
        flat = weights.reshape(-1)
        index = {"weights of other slots": perm.flip(0), "weights not sorted": torch.arange(perm.numel())}.get(
            change, perm
        )
        y = y * flat[index].unsqueeze(-1)
        if change == "weights twice":
            y = y * flat[perm].unsqueeze(-1)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.numel())
        if change == "way back by the permutation":
            inverse = perm
        if change == "way back off by one":
            inverse = inverse.roll(1)
        back = y[inverse].view(*ids.shape, -1)
        if change == "mean":
            return back.mean(dim=1)
        if change == "largest":
            return back.amax(dim=1)
        out = back.transpose(0, 1).reshape(*ids.shape, -1).sum(dim=1) if change == "turned" else back.sum(dim=1)
        returned = {"rows returned": rows, "products returned": h, "permutation returned": perm, "slots returned": back}
        return (out, returned[change]) if change in returned else out

    return forward


GROUPED = {
    "sorted by other ids": "raise.offsets raise.rows raise.ids_range",
    "descending": "raise.offsets",
    "bins": "raise.offsets",
    "no running sum": "raise.offsets",
    "counts shifted by one": "raise.offsets",
    "another k": "raise.rows",
    "rows off by one": "raise.rows",
    "rows activated": "raise.rows",
    "relu between": "raise.operation",
    "exchanged": "raise.operation",
    "up and gate": "raise.gate raise.activation",
    "no up": "raise.gate",
    "tanh": "raise.operation raise.activation",
    "halved": "raise.activation",
    "through infinity": "raise.operation",
    "through zero": "raise.operation",
    "relu after": "raise.operation",
    "weights of other slots": "raise.weights",
    "weights not sorted": "raise.operation raise.weights",
    "weights twice": "raise.weights_twice",
    "way back by the permutation": "raise.operation raise.way_back raise.sum",
    "way back off by one": "raise.operation",
    "mean": "raise.operation",
    "largest": "raise.operation",
    "turned": "raise.operation raise.way_back raise.sum",
    "rows returned": "raise.read_outside",
    "products returned": "raise.read_outside",
    "permutation returned": "raise.read_outside",
    "slots returned": "raise.read_outside",
    **dict.fromkeys(IDS, "raise.ids_range raise.mask"),
    "chosen by two heads": "raise.rows",
}


def batched(change: str = "") -> Callable[..., Any]:
    """transformers' ``batched_mm``, with one change."""

    def forward(x: Tensor, weights: Tensor, ids: Tensor, **t: Tensor) -> Any:
        ids = _changed_ids(ids, change)
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(ids.size(-1), dim=0)
        if change == "tokens in turn":
            rows = x.repeat(ids.size(-1), 1)
        h = torch.bmm(t["w13"][flat], rows.unsqueeze(-1)).squeeze(-1)
        if change == "relu between":
            h = F.relu(h)
        act = halves(h) if change != "up and gate" else h.chunk(2, -1)[0] * F.silu(h.chunk(2, -1)[1])
        scale = weights.reshape(-1)
        if change == "weights in front":
            act = (act.float() * scale.unsqueeze(-1)).to(x.dtype)
        w2 = t["w2"][flat.flip(0) if change == "other ids" else flat]
        y = torch.bmm(w2, act.unsqueeze(-1)).squeeze(-1)
        y = y * scale.unsqueeze(-1) if change != "weights in front" else y
        if change == "weights twice":
            y = y * scale.unsqueeze(-1)
        y = y.view(*ids.shape, x.shape[-1])
        out = y.sum(dim=0 if change == "over tokens" else 1)
        return (out, act) if change == "interior returned" else out

    return forward


BATCHED = {
    "tokens in turn": "raise.rows raise.operation",
    "relu between": "raise.operation",
    "up and gate": "raise.gate raise.activation",
    "weights twice": "raise.weights_twice",
    "over tokens": "raise.sum",
    "interior returned": "raise.read_outside",
    **dict.fromkeys(IDS, "raise.ids_range raise.mask"),
    "chosen by two heads": "raise.rows",
}

TWINS = {
    **{
        f"grouped, {change}": (Foreign("", grouped(change), NK, nk(), FLOAT), codes)
        for change, codes in GROUPED.items()
    },
    **{
        f"batched, {change}": (Foreign("", batched(change), NK, nk(), FLOAT), codes)
        for change, codes in BATCHED.items()
    },
    "batched, weights in front, float16": (
        Foreign("", batched("weights in front"), NK, nk(), torch.float16),
        "raise.dtype",
    ),
    "titan, before, k = 2": (Foreign("", titan_before, APART, nk(), FLOAT), "raise.weigh_input"),
}
