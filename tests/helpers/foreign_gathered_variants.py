"""MoE layers of gathered weights put together from pieces, as ``foreign_variants`` does it: ``compose_gathered``."""

from __future__ import annotations

import random
from typing import Any

import torch
from foreign_forms import (
    APART,
    FLOAT,
    HIDDEN,
    KN,
    NK,
    Foreign,
    apart,
    kn,
    nk,
)
from foreign_variants import AFTER, CHOICES, GATES, HALVES, WEIGHED_BACKS, Spelled, tokens_of
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------- gathered weights

# (rows of slots [T, k, H], matrices [T, k, H, N]) -> [T, k, N]
GATHERED: Spelled = {
    "einsum": lambda rows, w: torch.einsum("tkh,tkhn->tkn", rows, w),
    "matmul": lambda rows, w: (rows.unsqueeze(-2) @ w).squeeze(-2),
    "bmm": lambda rows, w: torch.bmm(rows.flatten(0, 1).unsqueeze(1), w.flatten(0, 1)).view(*rows.shape[:2], -1),
    "column": lambda rows, w: (w.transpose(-1, -2) @ rows.unsqueeze(-1)).squeeze(-1),
    "sum": lambda rows, w: (rows.unsqueeze(-1) * w).sum(-2),
    "baddbmm": lambda rows, w: torch.baddbmm(
        torch.zeros(rows.shape[0] * rows.shape[1], 1, w.shape[-1]),
        rows.flatten(0, 1).unsqueeze(1),
        w.flatten(0, 1),
    ).view(*rows.shape[:2], -1),
}


# (matrices [E, K, N], ids [T, k]) -> [T, k, K, N]
GATHERS: Spelled = {
    "index": lambda w, ids: w[ids],
    "flat": lambda w, ids: w[ids.view(-1)].view(*ids.shape, *w.shape[1:]),
    "index_select": lambda w, ids: w.index_select(0, ids.flatten()).view(*ids.shape, *w.shape[1:]),
}


TOKEN_ROWS: Spelled = {
    "expanded": lambda x, ids: x[:, None].expand(-1, ids.shape[1], -1),
    "repeated": lambda x, ids: x.repeat_interleave(ids.shape[1], 0).view(*ids.shape, -1),
    "stacked": lambda x, ids: torch.stack([x] * ids.shape[1], 1),
    "looked up": lambda x, ids: x[tokens_of(ids)].view(*ids.shape, -1),
}


GATHERED_PIECES: dict[str, Any] = {
    "choice": CHOICES,
    "rows": TOKEN_ROWS,
    "gather": GATHERS,
    "first": GATHERED,
    "second": GATHERED,
    "halves": HALVES,
    "gate": GATES,
    "weighed": WEIGHED_BACKS,
    "after": AFTER,
    "where": ("back", "activation", "rows"),
    "k": ("2", "1", "3"),
    "weights": ("joined", "joined, turned", "apart"),
}


def compose_gathered(draw: random.Random, **fixed: str) -> tuple[Foreign, dict[str, str]]:
    """A layer of gathered matrices, and which spelling each of its pieces has."""
    chosen = {name: fixed.get(name) or draw.choice(list(table)) for name, table in GATHERED_PIECES.items()}

    def forward(x: Tensor, weights: Tensor, ids: Tensor, shared: Tensor, **t: Tensor) -> Tensor:
        ids = CHOICES[chosen["choice"]](ids).contiguous()

        def matrices(name: str) -> Tensor:
            w = t[name] if chosen["weights"] == "joined, turned" else t[name].transpose(-2, -1)
            return GATHERS[chosen["gather"]](w, ids)  # type: ignore[no-any-return]

        rows = TOKEN_ROWS[chosen["rows"]](x, ids)
        if chosen["weights"] == "apart":
            gate, up = (GATHERED[chosen["first"]](rows, matrices(name)) for name in ("w1", "w3"))
        else:
            h = GATHERED[chosen["first"]](rows, matrices("w13"))
            gate, up = (each.view(*ids.shape, -1) for each in HALVES[chosen["halves"]](h.flatten(0, 1)))
        act = GATES[chosen["gate"]](gate, up)
        if chosen["where"] == "activation":
            act = act * weights[..., None]
        y = GATHERED[chosen["second"]](act, matrices("w2"))
        if chosen["where"] == "rows":
            y = weights.unsqueeze(-1) * y
        y = WEIGHED_BACKS[chosen["weighed"]](y, ids, weights) if chosen["where"] == "back" else y.sum(1)
        return AFTER[chosen["after"]](x, y, shared)  # type: ignore[no-any-return]

    shapes, expected = {"joined": (NK, nk()), "joined, turned": (KN, kn()), "apart": (APART, apart)}[chosen["weights"]]
    layer = Foreign(
        "gathered_weights", forward, {**shapes, "shared": (HIDDEN, HIDDEN)}, expected, FLOAT, top_k=int(chosen["k"])
    )
    return layer, chosen
