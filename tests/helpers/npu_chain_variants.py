"""More MoE layers as inference code for Ascend writes them: what differs from ``npu_chain_layers`` in one thing."""

from __future__ import annotations

import dataclasses
from typing import Any

import npu_chain_layers as chains
import torch
import torch.distributed as dist
from torch import Tensor


class Special(chains.Mc2):
    """MC2 with experts past the others' that give nothing, such that give the token itself, and such that mix it with numbers."""

    def __init__(self, *args: Any, zero: int = 0, copies: int = 0, const: int = 0, **more: Any) -> None:
        super().__init__(*args, **more)
        self.zero, self.copies, self.const = zero, copies, const
        for seed, name in enumerate(("alpha_1", "alpha_2", "v"), 20):
            self.register_buffer(name, chains.numbers(seed, const, chains.HIDDEN).bfloat16() if const else None)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor | None = None) -> Any:
        numbers = {"zero_expert_num": self.zero, "copy_expert_num": self.copies, "const_expert_num": self.const}
        sent, back = dict(numbers), {**numbers, "ori_x": self.change("copied", x)}
        back |= {f"const_expert_{name}": getattr(self, name) for name in ("alpha_1", "alpha_2", "v")}
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
        drawn = chains.numbers(200 + rank, tokens, chains.EXPERTS + self.zero + self.copies + self.const).argsort(-1)
        ids = drawn[:, :4].to(torch.int32)
        return x, ids, chains.numbers(300 + rank, tokens, 4).softmax(-1)

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """In float64: the experts by ``npu_chain_layers.reference`` with weight 0 for others' ids, and the rest one by one."""
        experts = ids < chains.EXPERTS
        out = chains.reference(self, x, torch.where(experts, ids, 0), torch.where(experts, weights, 0.0))
        for token, chosen in enumerate(ids.tolist()):
            for choice, expert in enumerate(chosen):
                past = expert - chains.EXPERTS - self.zero
                if past < 0:
                    continue
                given = x[token].double()
                if past >= self.copies:
                    line = past - self.copies
                    given = self.alpha_1[line].double() * given + self.alpha_2[line].double() * self.v[line].double()
                out[token] += weights[token, choice].double() * given
        return out


class First(chains.Mc2):
    """By the first versions of dispatch and combine, which have fewer arguments."""

    def dispatch(self, *args: Any, comm_alg: str = "", **more: Any) -> Any:
        return chains.npu().npu_moe_distribute_dispatch(*args, **more)

    def combine(self, *args: Any, **more: Any) -> Any:
        return chains.npu().npu_moe_distribute_combine(*args, **more)


class Normed(chains.Mc2):
    """A combine that adds a residual and normalises the sum. ``read``: which results are returned."""

    def __init__(self, *args: Any, read: tuple[int, ...] = (0, 2), **more: Any) -> None:
        super().__init__(*args, shared="", **more)
        self.read = read
        self.register_buffer("gamma", chains.numbers(8, chains.HIDDEN).bfloat16())

    def combine(self, *args: Any, **more: Any) -> Any:
        residual = self.change("residual", torch.full((6, 1, chains.HIDDEN), 0.5, dtype=torch.bfloat16))
        given = {"norm_eps": 1e-5, **more}
        made = chains.npu().npu_moe_distribute_combine_add_rms_norm(*args, residual, self.gamma, **given)
        return tuple(made[at] for at in self.read)

    @staticmethod
    def joined(results: tuple[Tensor, ...]) -> Tensor:
        """[T, the results one behind the other]."""
        return torch.cat([each.squeeze(1).float() for each in results], -1)

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """[T, the results that are read, one behind the other]."""
        total = chains.reference(self, x, ids, weights) + 0.5
        inverse = (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        results = (total * inverse * self.gamma.double(), inverse, total)
        return torch.cat([results[at] for at in self.read], -1)


class WaitingFirst(First, chains.Waiting):
    pass


class WaitingCopies(chains.Waiting):
    numbers = {"copy_expert_num": 2}  # noqa: RUF012 (never written)


class Gathered(chains.Layer):
    """AllGather over the ranks: every token here, the rows of this rank's experts, the sums scattered back."""

    def __init__(self, group: str, *args: Any, back: str = "unpermute", masked: str = "where", **changes: Any) -> None:
        super().__init__(*args, **changes)
        self.group, self.back, self.masked = group, back, masked

    def gathered(self, value: Tensor) -> Tensor:
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(
            value, self.ranks, self.change("group", self.group)
        )
        return torch.ops._c10d_functional.wait_tensor(gathered)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        sent = self.changes.get("sent", torch.Tensor.bfloat16)
        x, ids, weights = self.gathered(x), self.gathered(ids), self.gathered(sent(weights))
        local = chains.EXPERTS // self.ranks
        first, last = self.change("range", (self.rank * local, (self.rank + 1) * local))
        given = {
            "expert_num": chains.EXPERTS, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True,
            "active_expert_range": [self.rank * local, (self.rank + 1) * local],
            "quant_mode": 1 if self.quantisation in chains.INT8 else -1, **self.changes.get("route", {}),
        }  # fmt: skip
        rows, index, counts, scale = chains.npu().npu_moe_init_routing_v2(x, self.change("routed", ids), **given)
        out = self.change("out", self.experts(rows, scale, counts))
        index, compared = self.change("index", index), self.change("compared", ids)
        own = self.change("own", (compared >= first) & (compared < last))
        if self.masked == "where":
            weights = torch.where(own, weights, 0.0)
        elif self.masked == "mul":
            weights = weights * own
        weights = self.change("weights", weights)
        if self.back == "finalize":
            y = chains.npu().npu_moe_finalize_routing(out, None, None, None, weights, index.abs(), None, 2)
        else:
            y = chains.npu().npu_moe_token_unpermute(out, index.abs(), weights)
        y = self.sums(self.change("sums", y), self.change("reduce", "sum"))
        return (y, self.changes["returned"](rows, scale, counts, out)) if "returned" in self.changes else y

    def sums(self, y: Tensor, operation: str) -> Tensor:
        mine = torch.ops._c10d_functional.reduce_scatter_tensor(y, operation, self.ranks, self.group)
        return torch.ops._c10d_functional.wait_tensor(mine)


class Reduced(Gathered):
    """The same where all ranks have the same tokens, and get all sums."""

    def gathered(self, value: Tensor) -> Tensor:
        return value

    def sums(self, y: Tensor, operation: str) -> Tensor:
        mine = torch.ops._c10d_functional.all_reduce(y, operation, self.group)
        return torch.ops._c10d_functional.wait_tensor(mine)

    def inputs(self, rank: int, tokens: int = 6) -> tuple[Tensor, Tensor, Tensor]:
        """Enough for two rows on each rank: the chain as it is written multiplies row 1 by zero, which is undefined without."""
        return chains.inputs(0, tokens * chains.RANKS // 2)


class ReducedShared(Reduced):
    """The same with a part of a shared expert on each rank, which is added to a rank's own sums: by ``skip1`` or behind them."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        shape = (chains.HIDDEN, chains.HIDDEN)
        self.parts = [chains.numbers(50 + rank, *shape, scale=0.02).bfloat16() for rank in range(self.ranks)]
        self.register_buffer("part", self.parts[self.rank])

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        self.beside = self.change("part", x @ self.part)
        return super().forward(x, ids, weights)

    def sums(self, y: Tensor, operation: str) -> Tensor:
        return super().sums(self.change("added", y + self.beside), operation)

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        shared = sum(x.double() @ part.double() for part in self.parts)
        return chains.reference(self, x, ids, weights) + shared


class Sharded(chains.Routed):
    """Experts of which each rank has some columns, all tokens on each: an all_reduce in place adds their sums."""

    def __init__(self, group: str, quantisation: str, activation: str, rank: int, ranks: int, **more: Any) -> None:
        super().__init__(quantisation, activation, **more)
        self.group = group
        self.columns = [chains.make_weights(quantisation, 1 + 10 * part) for part in range(ranks)]
        for field in dataclasses.fields(self.whole):
            if getattr(self, field.name, None) is not None:
                setattr(self, field.name, getattr(self.columns[rank], field.name))
        self.w_shared = self.w_shared / ranks

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        y = super().forward(x, ids, weights)
        dist.all_reduce(y, group=dist.group.WORLD)
        return y

    def inputs(self, rank: int, tokens: int = 6) -> tuple[Tensor, Tensor, Tensor]:
        return chains.inputs(0, tokens)

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros(len(x), 1)
        if self.shared:  # of the other ranks; this one's is added by who calls
            total = (len(self.columns) - 1) * (x.double() @ self.w_shared.double())
        for columns in self.columns:
            self.whole = columns
            total = total + chains.reference(self, x, ids, weights.bfloat16())
        return total


class Chosen(Special):
    """Zero or copy experts among which a router chooses: ``written`` by an operator of torch_npu's or in ATen."""

    def __init__(self, *args: Any, written: str = "npu", **more: Any) -> None:
        super().__init__(*args, **more)
        self.written = written
        width = chains.EXPERTS + self.zero + self.copies + self.const
        self.register_buffer("gating", chains.numbers(6, chains.HIDDEN, width, scale=chains.HIDDEN**-0.5))

    def choose(self, x: Tensor, written: str) -> tuple[Tensor, Tensor]:
        logits = x.float() @ self.gating
        if written == "npu":
            weights, ids, _ = chains.npu().npu_moe_gating_top_k(
                logits, 4, renorm=0, norm_type=0, routed_scaling_factor=1.5
            )
            return weights, ids
        weights, ids = logits.softmax(-1).topk(4)
        return weights * 1.5, ids.to(torch.int32)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor | None = None) -> Any:
        weights, ids = self.choose(x, self.written)
        return super().forward(x, ids, weights)

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        weights, ids = self.choose(x, "aten")
        return super().reference(x, ids, weights)
