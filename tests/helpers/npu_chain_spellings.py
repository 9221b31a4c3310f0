"""MoE layers as inference code for Ascend writes them, each in one thing spelled otherwise than in ``npu_chain_layers``.

Tables of what is said otherwise: how groups are made, activations in ATen, experts in fewer operators, ways back. Twins beside
them differ from one in what they compute. Spellings after vllm-ascend, sglang and omni-infer, written anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import npu_chain_layers as chains
import npu_chain_variants as variants
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import gelu, pad, silu

PREFIX_SUMS, COUNTS = 0, 1
WIDTH = chains.INTERMEDIATE

# what the routing counts, what becomes of it, and as what the matmuls read that
Grouped = tuple[int, Callable[[Tensor], Tensor], int]
GROUPS: dict[str, Grouped] = {
    "a running sum": (COUNTS, lambda g: torch.cumsum(g.to(torch.int64), 0), PREFIX_SUMS),
    "differences behind the first": (PREFIX_SUMS, lambda g: torch.cat([g[:1], torch.diff(g, dim=0)]), COUNTS),
    "differences of a zero and the sums": (PREFIX_SUMS, lambda g: torch.diff(g, prepend=g.new_zeros(1)), COUNTS),
    "less the sums before": (PREFIX_SUMS, lambda g: g - pad(g[:-1], (1, 0)), COUNTS),
    "less a zero and the sums": (PREFIX_SUMS, lambda g: g - torch.cat([torch.zeros(1, dtype=g.dtype), g[:-1]]), COUNTS),
    "the first by its number": (PREFIX_SUMS, lambda g: torch.cat([g[0].unsqueeze(0), g[1:] - g[:-1]]), COUNTS),
    "through int32": (COUNTS, lambda g: g.int().view(-1).long(), COUNTS),
}
GROUP_TWINS: dict[str, Grouped] = {
    "a running sum as counts": (COUNTS, lambda g: g.cumsum(0), COUNTS),
    "a running sum of sums": (PREFIX_SUMS, lambda g: g.cumsum(0), PREFIX_SUMS),
    "differences of counts": (COUNTS, lambda g: torch.cat([g[:1], torch.diff(g)]), COUNTS),
    "differences behind the second": (PREFIX_SUMS, lambda g: torch.cat([g[1:2], torch.diff(g)]), COUNTS),
    "differences from the first": (PREFIX_SUMS, lambda g: torch.cat([g[:1], g[1:] - g[:1]]), COUNTS),
    "the second by its number": (PREFIX_SUMS, lambda g: torch.cat([g[1].unsqueeze(0), g[1:] - g[:-1]]), COUNTS),
    "less the sums behind": (PREFIX_SUMS, lambda g: g - pad(g[1:], (1, 0)), COUNTS),
    "differences of a one and the sums": (PREFIX_SUMS, lambda g: torch.diff(g, prepend=g.new_ones(1)), COUNTS),
    "differences the other way": (PREFIX_SUMS, lambda g: torch.cat([g[:1], g[:-1] - g[1:]]), COUNTS),
    "less the sums before, padded behind": (PREFIX_SUMS, lambda g: g - pad(g[:-1], (0, 1)), COUNTS),
    "through int8": (COUNTS, lambda g: g.to(torch.int8).long(), COUNTS),
}


def oai(hidden: Tensor) -> Tensor:
    gate, up = hidden[..., ::2].clamp(max=7.0), hidden[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def in_float32(hidden: Tensor) -> Tensor:
    gate, up = hidden.float().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).type_as(hidden)


def halves(hidden: Tensor) -> tuple[Tensor, Tensor]:
    return hidden[:, :WIDTH], hidden[:, WIDTH:]


ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "float32": ("swiglu", in_float32),
    "up first": ("swiglu", lambda h: (halves(h)[1] * silu(halves(h)[0])).contiguous()),
    "the gate in float32": ("swiglu", lambda h: silu(h[:, :WIDTH].float()).to(h.dtype) * h[:, WIDTH:]),
    "gpt-oss": ("swiglu_oai", oai),
    "gelu in float32": ("gelu_tanh", lambda h: (gelu(h[:, :WIDTH].float(), approximate="tanh") * h[:, WIDTH:]).type_as(h)),
}  # fmt: skip
ACTIVATION_TWINS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "the gate twice": ("raise.activation", lambda h: silu(halves(h)[0]) * halves(h)[0]),
    "the second half first": ("raise.gate_second", lambda h: silu(halves(h)[1].float()).to(h.dtype) * halves(h)[0]),
    "relu of up": ("raise.activation", lambda h: silu(halves(h)[0]) * halves(h)[1].relu()),
    "doubled": ("raise.activation", lambda h: in_float32(h) * 2),
    "in float16": ("raise.dtype", lambda h: in_float32(h.half()).type_as(h)),
    "another alpha for each half": ("raise.activation", lambda h: (h[:, 1::2] + 2) * silu(h[:, ::2])),
    "a third and two": ("raise.activation", lambda h: pad(silu(h[:, :40]) * h[:, 40:80], (0, WIDTH - 40))),
    "rolled columns": ("raise.activation", lambda h: in_float32(h).roll(1, -1)),
    "one row of all": ("raise.activation", lambda h: in_float32(h) * halves(h)[0].amax()),
}


def experts_only(weights: Tensor, ids: Tensor) -> Tensor:
    return weights * (ids < chains.EXPERTS)


class Spelled(chains.Layer):
    """All experts here, by init_routing_v2. ``back``: finalize_routing's drop_pad_mode, or None for unpermute."""

    def __init__(
        self, quantisation: str = "none", activation: str = "swiglu", groups: Grouped = (1, chains.same, 1),
        act: Any = None, back: int | None = None, fused: str = "", zero: int = 0, **changes: Any,
    ) -> None:  # fmt: skip
        super().__init__(quantisation, activation, **changes)
        self.groups, self.act, self.back, self.fused, self.zero = groups, act, back, fused, zero

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counted, group, kind = self.groups
        rows, index, counts, scale = chains.npu().npu_moe_init_routing_v2(
            x, ids, active_num=ids.numel(), expert_num=chains.EXPERTS + self.zero, expert_tokens_num_type=counted,
            expert_tokens_num_flag=True, active_expert_range=[0, chains.EXPERTS],
            quant_mode=1 if self.quantisation in chains.INT8 else -1,
        )  # fmt: skip
        if self.changes.get("views"):
            rows, scale = rows.unsqueeze(0).view(-1, chains.HIDDEN), scale.unsqueeze(-1).squeeze(-1)
        out = self.joined(rows, scale, counts) if self.fused else self.experts(rows, scale, group(counts), kind)
        if self.zero:
            weights = self.changes.get("masked", experts_only)(weights, ids)
        weights = weights.to(out.dtype)
        if self.back is None:
            return chains.npu().npu_moe_token_unpermute(out, index.abs(), weights)
        if self.back == 3:
            out = out.unsqueeze(1)
        index = self.change("index", index)
        return chains.npu().npu_moe_finalize_routing(out, None, None, None, weights, index, ids, self.back)

    def gate(self, hidden: Tensor) -> Tensor:
        return super().gate(hidden) if self.act is None else self.act(hidden)

    def joined(self, rows: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
        """The first matmul, SwiGLU and quantisation in one operator."""
        sums = self.change("sums", counts.cumsum(-1))
        if self.fused == "first":
            rows, scale, rest = chains.npu().npu_grouped_matmul_swiglu_quant(
                rows, self.w13, sums, self.w13_scale, scale
            )
            rows = self.changes["rest"](rows, rest) if "rest" in self.changes else rows
        else:
            given = (sums, {}) if self.fused == "second" else (counts, {"group_list_type": 1})
            rows, scale = chains.npu().npu_grouped_matmul_swiglu_quant_v2(
                rows, [self.w13], [self.w13_scale], scale, given[0], **given[1], **self.changes.get("more", {})
            )
        return self.matmul(rows, "w2", counts, scale=[self.w2_scale], per_token_scale=[scale], output_dtype=chains.BF16)

    def inputs(self, rank: int = 0, tokens: int = 6) -> tuple[Tensor, Tensor, Tensor]:
        x, ids, weights = chains.inputs(rank, tokens)
        if self.zero:
            past = torch.arange(tokens, dtype=torch.int32) % self.zero + chains.EXPERTS
            ids[:, 0] = torch.where(torch.arange(tokens) % 2 == 0, past, ids[:, 0])
        return x, ids, weights

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        own = ids < chains.EXPERTS
        return chains.reference(self, x, torch.where(own, ids, 0), torch.where(own, weights, 0.0))


class Chosen(Spelled):
    """A router in front."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.register_buffer("gating", chains.numbers(6, chains.HIDDEN, chains.EXPERTS, scale=chains.HIDDEN**-0.5))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        weights, ids, _ = chains.npu().npu_moe_gating_top_k(x.float() @ self.gating, 2, renorm=0, norm_type=1)
        return super().forward(x, ids, weights / weights.sum(-1, keepdim=True))


class FirstVersion(chains.Layer):
    """By the first version of init_routing. ``table``: the numbers of slots."""

    def __init__(self, table: Callable[[Tensor], Tensor], **more: Any) -> None:
        super().__init__("none", "swiglu", **more)
        self.table = table

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        npu = chains.npu()
        rows, places, in_order = npu.npu_moe_init_routing(x, self.table(ids), ids, len(x))
        sums = npu.npu_moe_compute_expert_tokens(in_order, chains.EXPERTS).to(torch.int64)
        out = self.experts(rows, None, sums, PREFIX_SUMS)
        return npu.npu_moe_finalize_routing(out, None, None, None, weights.to(out.dtype), places, in_order)


def by_column(ids: Tensor) -> Tensor:
    return torch.arange(ids.numel(), dtype=torch.int32).view(ids.shape[1], -1).permute(1, 0).contiguous()


def by_row(ids: Tensor) -> Tensor:
    return torch.arange(ids.numel(), dtype=torch.int32).view(ids.shape[1], -1).permute(0, 1).reshape(ids.shape)


class InPlace(variants.Gathered):
    """AllGather into tensors that are there for it, of int64 ids; weights of others to zero before a cast. ``own``: the mask."""

    def __init__(self, *args: Any, own: str = "quotient", back: str = "unpermute", **more: Any) -> None:
        super().__init__(*args, back=back, **more)
        self.own = own
        self.register_buffer("stored", self.table_of(chains.EXPERTS // self.ranks))

    def table_of(self, own: int) -> Tensor:
        table = torch.full((chains.EXPERTS,), -1, dtype=torch.int32)
        table[self.rank * own : self.rank * own + own] = torch.arange(own, dtype=torch.int32)
        return table

    def gathered(self, value: Tensor) -> Tensor:
        out = value.new_empty(value.shape[0] * self.ranks, *value.shape[1:])
        dist.all_gather_into_tensor(out, value.contiguous(), group=dist.group.WORLD)
        return out

    def mask(self, ids: Tensor, own: int) -> Tensor:
        if self.own == "quotient":
            return ids // own == self.rank
        if self.own == "neither":
            return ~((ids < self.rank * own) | (ids >= (self.rank + 1) * own))
        if self.own == "table":
            return self.change("table", self.table_of(own))[ids] != -1
        return self.stored[ids] != -1

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        ids = self.change("ids", ids)
        x, ids, weights = self.gathered(x), self.gathered(ids.long()), self.gathered(weights)
        own = chains.EXPERTS // self.ranks
        rows, index, counts, _ = chains.npu().npu_moe_init_routing_v2(
            x, ids.to(torch.int32), expert_num=chains.EXPERTS, expert_tokens_num_type=1, expert_tokens_num_flag=True,
            active_expert_range=[self.rank * own, (self.rank + 1) * own],
        )  # fmt: skip
        out = self.experts(rows, None, counts)
        if self.back == "drop":
            index = self.change("index", index)
            y = chains.npu().npu_moe_finalize_routing(
                out.unsqueeze(1), None, None, None, weights.to(out.dtype), index, ids.int(), 3
            )
        else:
            mine = (weights * self.mask(ids, own).to(weights.dtype)).to(out.dtype)
            y = chains.npu().npu_moe_token_unpermute(out, index.abs(), mine)
        return self.sums(y, "sum")

    def sums(self, y: Tensor, operation: str) -> Tensor:
        mine = y.new_empty(y.shape[0] // self.ranks, y.shape[1])
        dist.reduce_scatter_tensor(mine, y, group=dist.group.WORLD)
        return mine


class InPlaceReduced(InPlace):
    """The same where all ranks have the same tokens."""

    def gathered(self, value: Tensor) -> Tensor:
        return value

    def sums(self, y: Tensor, operation: str) -> Tensor:
        dist.all_reduce(y)
        return y

    def inputs(self, rank: int, tokens: int = 6) -> tuple[Tensor, Tensor, Tensor]:
        return chains.inputs(0, tokens)


class Slots(variants.Special):
    """MC2 with a mask of (token, k) pairs: a slot that is off gives nothing, whatever its id says."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.register_buffer("on", torch.arange(24).view(6, 4) % 3 != 1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor | None = None) -> Any:
        return super().forward(x, ids, weights, self.on)

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().reference(x, ids, torch.where(self.on, weights, 0.0))  # type: ignore[arg-type]


class PrefixSums(chains.Mc2):
    """MC2 whose dispatch gives prefix sums, with every argument of both ends said, and scales behind a view."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor | None = None) -> Any:
        ends = {
            "group_ep": self.group, "ep_world_size": self.ranks, "ep_rank_id": self.rank, "moe_expert_num": chains.EXPERTS,
            "group_tp": "", "tp_world_size": 0, "tp_rank_id": 0, "expert_shard_type": 0, "shared_expert_num": 1,
            "shared_expert_rank_num": 0, "global_bs": 0, "x_active_mask": mask, "comm_alg": "",
        }  # fmt: skip
        eight_bits = self.quantisation == "w8a8"
        given = {"quant_mode": 2 if eight_bits else 0, "expert_token_nums_type": 0, "scales": None, **ends}
        rows, scale, assist, sums, received, _, _ = self.dispatch(x.reshape(-1, chains.HIDDEN), ids.int(), **given)
        if eight_bits:
            rows, scale, _ = chains.npu().npu_grouped_matmul_swiglu_quant(
                rows, self.w13, sums.to(torch.int64), self.w13_scale, scale.reshape(-1)
            )
            more = {"scale": [self.w2_scale], "per_token_scale": [scale], "output_dtype": chains.BF16}
            out = self.matmul(rows, "w2", sums, PREFIX_SUMS, **more)
        else:
            out = self.experts(rows.view(-1, chains.HIDDEN), scale, sums, PREFIX_SUMS)
        weights = weights.to(x.dtype).to(torch.float32).contiguous()
        y = self.combine(out, ids.int(), assist, received, weights, **ends).view(x.shape)
        return (y, self.changes["returned"](sums)) if "returned" in self.changes else y
