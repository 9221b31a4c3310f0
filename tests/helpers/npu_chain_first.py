"""MoE layers of one rank by older operators: the first version of init_routing, and token_permute."""

from __future__ import annotations

from typing import Any

import npu_chain_layers as chains
import torch
from torch import Tensor


class Old(chains.Layer):
    """Rows in 16 bits, or quantised after they were routed. ``numbering``, ``counting``: who makes row_idx and the groups."""

    def __init__(
        self, quantisation: str = "none", activation: str = "swiglu", *, numbering: str = "", counting: str = "",
        kind: int = 1, shared: bool = False, **changes: Any,
    ) -> None:  # fmt: skip
        super().__init__(quantisation, activation, **changes)
        self.numbering, self.counting, self.kind, self.shared = numbering, counting, kind, shared
        self.register_buffer("w_shared", chains.numbers(5, chains.HIDDEN, chains.HIDDEN, scale=0.03).bfloat16())

    def mlp(self, rows: Tensor, groups: Tensor, kind: int) -> Tensor:
        scale = rows
        if self.quantisation in chains.INT8:
            rows, scale = chains.npu().npu_dynamic_quant(rows)
        return self.change("out", self.experts(rows, scale, groups, kind))


class FirstRouting(Old):
    """init_routing > compute_expert_tokens > experts > finalize_routing by column."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.register_buffer("gating", chains.numbers(6, chains.HIDDEN, chains.EXPERTS).bfloat16())

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, weights) of the router, in ATen."""
        weights, ids = (x @ self.gating).float().softmax(-1).topk(chains.TOP_K)
        return ids.to(torch.int32), weights

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        tokens, top_k = ids.shape
        if self.numbering == "softmax":
            weights, ids, number = chains.npu().npu_moe_gating_top_k_softmax(
                x @ self.gating, self.change("finished", None), top_k
            )
        else:
            number = torch.arange(tokens * top_k, dtype=torch.int32).view(top_k, tokens).t().contiguous()
        number = self.change("number", number)
        rows, places, experts = chains.npu().npu_moe_init_routing(x, number, ids, self.change("active", tokens))
        sums = chains.npu().npu_moe_compute_expert_tokens(experts, chains.EXPERTS)
        sums = self.change("sums", sums).to(torch.int64)
        out = self.mlp(self.change("rows", rows), sums, self.changes.get("told", 0))
        added = x @ self.w_shared if self.shared else None
        back = [out, added, None, None, self.change("weights", weights.bfloat16()), self.change("places", places), ids]
        y = chains.npu().npu_moe_finalize_routing(*back, *self.change("mode", (0,)))
        return (y, self.changes["returned"](rows, places, sums, out)) if "returned" in self.changes else y


class Permuted(Old):
    """token_permute > experts, in groups that ATen counts > token_unpermute."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        chosen = self.change("counted", ids)
        if self.counting == "one_hot":
            counts = torch.nn.functional.one_hot(chosen.view(-1).long(), chains.EXPERTS).sum(0)
        else:
            counts = torch.histc(chosen.float(), chains.EXPERTS, 0, self.change("most", chains.EXPERTS)).to(torch.int64)
        groups = counts.cumsum(0) if self.kind == 0 else counts
        rows, places = chains.npu().npu_moe_token_permute(x, ids, self.change("kept", None))
        out = self.mlp(self.change("rows", rows), groups, self.changes.get("told", self.kind))
        weights, places = self.change("weights", weights.bfloat16()), self.change("places", places)
        y = chains.npu().npu_moe_token_unpermute(out, places, weights)
        return (y, self.changes["returned"](rows, places, groups, out)) if "returned" in self.changes else y
