"""More MoE layers as inference code for Ascend writes them: what differs from ``npu_chain_layers`` in one thing."""

from __future__ import annotations

from typing import Any

import npu_chain_layers as chains
import torch
from torch import Tensor


class Special(chains.Mc2):
    """MC2 with experts past the others' that give nothing, and such that give the token itself."""

    def __init__(self, *args: Any, zero: int = 0, copies: int = 0, **more: Any) -> None:
        super().__init__(*args, **more)
        self.zero, self.copies = zero, copies

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor | None = None) -> Any:
        numbers = {"zero_expert_num": self.zero, "copy_expert_num": self.copies}
        sent, back = dict(numbers), {**numbers, "ori_x": self.change("copied", x)}
        for name, changes in (("dispatch", sent), ("combine", back)):
            changes.update(self.own_changes.get(name, {}))
        self.changes = {**self.own_changes, "dispatch": sent, "combine": back}
        return super().forward(x, ids, weights, mask)

    @property
    def own_changes(self) -> dict[str, Any]:
        if not hasattr(self, "_own_changes"):
            self._own_changes = self.changes
        return self._own_changes

    def inputs(self, rank: int, tokens: int = 6) -> tuple[Tensor, Tensor, Tensor]:
        """As ``npu_chain_layers.inputs``, with k = 4 of all ids."""
        x, _, _ = chains.inputs(rank, tokens)
        drawn = chains.numbers(200 + rank, tokens, chains.EXPERTS + self.zero + self.copies).argsort(-1)
        ids = drawn[:, :4].to(torch.int32)
        return x, ids, chains.numbers(300 + rank, tokens, 4).softmax(-1)

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """In float64: the experts by ``npu_chain_layers.reference`` with weight 0 for others' ids, and the copies one by one."""
        experts = ids < chains.EXPERTS
        out = chains.reference(self, x, torch.where(experts, ids, 0), torch.where(experts, weights, 0.0))
        for token, chosen in enumerate(ids.tolist()):
            for choice, expert in enumerate(chosen):
                if expert >= chains.EXPERTS + self.zero:
                    out[token] += weights[token, choice].double() * x[token].double()
        return out
