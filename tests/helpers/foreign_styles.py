"""MoE layers in the style of code bases that nobody wrote for this package: a router in front, and each way to move rows.

``STYLES`` has what becomes of each: ``""`` for a block, or the code or the words of the report that leave it. Written anew
after torchtitan, gpt-fast, Mixtral's, DeepSeek's and Qwen2's remote code, GShard, Switch, MindSpeed and vllm-ascend 0.7 to 0.9.
"""

from __future__ import annotations

from collections.abc import Callable

import reference
import torch
import torch.nn.functional as F
from foreign_forms import EXPERTS, HIDDEN, INTERMEDIATE
from torch import Tensor, nn

from moe_lowering import simulator

simulator.enable()

Routed = tuple[Tensor, Tensor]


class Style(nn.Module):
    """Experts of w1, w3 [E, H, I] and w2 [E, I, H] in bfloat16; ``forward`` is the style."""

    defined = slice(None)  # tokens whose result does not come from memory that no operator wrote

    def __init__(self, route: Callable[[Style, Tensor], Routed] | None = None, top_k: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return nn.Buffer((torch.randn(*shape, generator=generator) * shape[-2] ** -0.5).bfloat16())

        self.w1, self.w3 = drawn(EXPERTS, HIDDEN, INTERMEDIATE), drawn(EXPERTS, HIDDEN, INTERMEDIATE)
        self.w2, self.gating, self.bias = (
            drawn(EXPERTS, INTERMEDIATE, HIDDEN),
            drawn(HIDDEN, EXPERTS),
            drawn(1, EXPERTS),
        )
        self.table = nn.Buffer(torch.tensor([2, 0, 3, 1]))
        self.top_k, self.routed = top_k, route or softmax_first

    def counted(self, flat: Tensor) -> Tensor:
        return torch.histc(flat.float(), EXPERTS, 0, EXPERTS - 1)

    def order(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(slots in order of experts, where the rows of each end)."""
        flat = ids.reshape(-1)
        return torch.argsort(flat, stable=True), self.counted(flat).cumsum(0).to(torch.int32)

    def mlp(self, rows: Tensor, ends: Tensor) -> Tensor:
        gate, up = (F.grouped_mm(rows, w, offs=ends) for w in (self.w1, self.w3))
        return F.grouped_mm(F.silu(gate) * up, self.w2, offs=ends)

    def expected(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        return reference.moe(x, weights, ids, w13=torch.cat([self.w1, self.w3], -1), w2=self.w2)


def softmax_first(layer: Style, x: Tensor) -> Routed:
    weights, ids = F.softmax(x @ layer.gating, -1, dtype=torch.float32).topk(layer.top_k, -1)
    return weights / weights.sum(-1, keepdim=True), ids


def biased(layer: Style, x: Tensor) -> Routed:
    scores = (x @ layer.gating).float().sigmoid()
    ids = (scores + layer.bias).topk(layer.top_k, -1)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


def of_another(layer: Style, x: Tensor) -> Routed:
    """The weights are the largest of another tensor than the ids are of."""
    weights = F.softmax(x @ layer.gating.flip(1), -1, dtype=torch.float32).topk(layer.top_k, -1)[0]
    return weights, softmax_first(layer, x)[1]


def masked(layer: Style, x: Tensor) -> Routed:
    weights, ids = softmax_first(layer, x)
    return torch.where((torch.arange(len(x)) < 4).unsqueeze(1), weights, 0.0), ids


def scaled_by_expert(layer: Style, x: Tensor) -> Routed:
    weights, ids = softmax_first(layer, x)
    return weights * layer.bias[0][ids], ids


def placed(layer: Style, x: Tensor) -> Routed:
    """Where an expert is stored, by a table (EPLB)."""
    weights, ids = softmax_first(layer, x)
    return weights, layer.table[ids]


def renumbered(layer: Style, x: Tensor) -> Routed:
    weights, ids = softmax_first(layer, x)
    return weights, (ids + 1) % EXPERTS


class IndexAdd(Style):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        order, ends = self.order(ids)
        tokens = order // self.top_k
        rows = self.mlp(x[tokens], ends) * weights.reshape(-1)[order].unsqueeze(1).to(x.dtype)
        return torch.zeros_like(x).index_add_(0, tokens, rows)


class Bincount(IndexAdd):
    def counted(self, flat: Tensor) -> Tensor:
        return torch.bincount(flat, minlength=EXPERTS)


class ScatterAdd(Style):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        order, ends = self.order(ids)
        rows = self.mlp(x.repeat_interleave(self.top_k, 0)[order], ends) * weights.reshape(-1, 1)[order].to(x.dtype)
        places = (order // self.top_k).reshape(-1, 1).expand(-1, HIDDEN)
        return torch.zeros_like(x).scatter_add_(0, places, rows)


class Unsorted(Style):
    """Back by a second sort; weights in a batched product."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        order, ends = self.order(ids)
        rows = self.mlp(x[torch.div(order, self.top_k, rounding_mode="floor")], ends)
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), rows[torch.argsort(order)].view(*ids.shape, -1)).squeeze(1)


class EmptyLike(Style):
    """DeepSeek's ``moe_infer``."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        order, ends = self.order(ids)
        rows = self.mlp(x[order // self.top_k], ends)
        back = torch.empty_like(rows)
        back[order] = rows
        return self.summed(back.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1))).type(x.dtype)

    def summed(self, rows: Tensor) -> Tensor:
        return rows.sum(1)


class Mean(EmptyLike):
    def summed(self, rows: Tensor) -> Tensor:
        return rows.mean(1)


class Searched(Style):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        values, order = ids.flatten().sort()
        ends = torch.searchsorted(values, torch.arange(EXPERTS), right=True).to(torch.int32)
        rows = self.mlp(x.index_select(0, order // self.top_k), ends)
        back = torch.zeros_like(rows).index_copy(0, order, rows).view(*ids.shape, -1)
        return (back * weights.unsqueeze(2)).sum(1).to(x.dtype)


class OtherCounts(Style):
    """The rows of one router's ids, the counts of another's."""

    def forward(self, x: Tensor) -> Tensor:
        _, ids = self.routed(self, x)
        order, _ = self.order(ids)
        _, ends = self.order(((x + 0.5) @ self.gating).topk(self.top_k, -1)[1])
        rows = self.mlp(x[order // self.top_k], ends)
        return torch.zeros_like(x).index_add_(0, order // self.top_k, rows)


class GptFast(Style):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        w1, w3, w2 = (w.transpose(1, 2)[ids] for w in (self.w1, self.w3, self.w2))
        hidden = F.silu(torch.einsum("ti,taoi->tao", x, w1)) * torch.einsum("ti,taoi->tao", x, w3)
        return torch.einsum("tai,ta->ti", torch.einsum("tao,taio->tai", hidden, w2), weights.to(x.dtype))


class Broadcast(Style):
    """Gathered matrices, tokens spread over the choices."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        rows = x[:, None, None, :].expand(-1, self.top_k, -1, -1).reshape(-1, 1, HIDDEN)
        w1, w3, w2 = (w[ids.reshape(-1)] for w in (self.w1, self.w3, self.w2))
        rows = torch.matmul(F.silu(torch.matmul(rows, w1)) * torch.matmul(rows, w3), w2)
        return (rows.view(*ids.shape, -1) * weights.unsqueeze(-1).to(x.dtype)).sum(1)


class Twice(Style):
    """Two layers that route once, one behind the other."""

    def one(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        order, ends = self.order(ids)
        rows = self.mlp(x[order // self.top_k], ends)[torch.argsort(order)].view(*ids.shape, -1)
        return (rows * weights.unsqueeze(-1).to(x.dtype)).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        y = self.one(x, weights, ids)
        return y + self.one(x + y, weights, ids)

    def expected(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        given = {"w13": torch.cat([self.w1, self.w3], -1), "w2": self.w2}
        y = reference.moe(x, weights, ids, **given)
        return y + reference.moe(x + y.to(x.dtype), weights, ids, **given)


class Looped(Style):
    """Every expert on every token."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        y = torch.zeros_like(x)
        for expert in range(EXPERTS):
            share = (weights * (ids == expert)).sum(-1, keepdim=True).to(x.dtype)
            y = y + share * ((F.silu(x @ self.w1[expert]) * (x @ self.w3[expert])) @ self.w2[expert])
        return y


class OneHot(Style):
    """GShard's dispatch and combine."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        combine = (F.one_hot(ids, EXPERTS) * weights.unsqueeze(-1)).sum(1).to(x.dtype)
        rows = torch.einsum("te,th->eth", (combine > 0).to(x.dtype), x)
        hidden = F.silu(torch.einsum("eth,ehi->eti", rows, self.w1)) * torch.einsum("eth,ehi->eti", rows, self.w3)
        return torch.einsum("te,eth->th", combine, torch.einsum("eti,eih->eth", hidden, self.w2))


class Capacity(Style):
    """Switch: one choice, and a place in a buffer of each expert."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        chosen, tokens = F.one_hot(ids[:, 0], EXPERTS), len(x)
        place = ids[:, 0] * tokens + (chosen.cumsum(0) * chosen).sum(-1) - 1
        rows = torch.zeros(EXPERTS * tokens, HIDDEN, dtype=x.dtype).index_put((place,), x).view(EXPERTS, tokens, HIDDEN)
        hidden = F.silu(torch.bmm(rows, self.w1)) * torch.bmm(rows, self.w3)
        return torch.bmm(hidden, self.w2).view(-1, HIDDEN)[place] * weights.to(x.dtype)


class ExpertsChoose(Style):
    """Each expert takes the tokens that it scores highest."""

    def forward(self, x: Tensor) -> Tensor:
        weights, tokens = F.softmax(x @ self.gating, -1).t().topk(3, -1)
        hidden = F.silu(torch.bmm(x[tokens], self.w1)) * torch.bmm(x[tokens], self.w3)
        rows = torch.bmm(hidden, self.w2) * weights.unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, tokens.reshape(-1), rows.reshape(-1, HIDDEN))


class Weighed(Style):
    """Tokens times their weights before the experts, with two choices."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        order, ends = self.order(ids)
        rows = (x.repeat_interleave(self.top_k, 0) * weights.reshape(-1, 1).to(x.dtype))[order]
        return self.mlp(rows, ends)[torch.argsort(order)].view(*ids.shape, -1).sum(1)


class SortedForNpu(Style):
    """vllm-ascend 0.8: torch_npu's matmuls between a sort and ``index_add_``."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        tokens = torch.arange(len(x)).unsqueeze(1).expand(-1, self.top_k).reshape(-1)
        flat = ids.view(-1).to(torch.int32)
        _, slots = torch.sort(flat)
        counts = torch.zeros(EXPERTS + 1, dtype=torch.int64).scatter_add_(0, flat.long(), torch.ones_like(flat).long())
        rows = self.products(x[tokens[slots]], self.groups(counts[:EXPERTS]))
        rows = rows * weights.view(-1)[slots].to(x.dtype).unsqueeze(1)
        return torch.zeros_like(x).index_add_(0, tokens[slots], rows)

    def groups(self, counts: Tensor) -> tuple[Tensor, int]:
        return counts.cumsum(0), 0

    def products(self, rows: Tensor, groups: tuple[Tensor, int]) -> Tensor:
        given = {"group_list": groups[0], "group_list_type": groups[1], "split_item": 3, "group_type": 0}
        npu = torch.ops.npu
        hidden = npu.npu_grouped_matmul([rows], [torch.cat([self.w1, self.w3], -1)], **given)[0]
        return npu.npu_grouped_matmul([npu.npu_swiglu(hidden)], [self.w2], **given)[0]


class CountedForNpu(SortedForNpu):
    def groups(self, counts: Tensor) -> tuple[Tensor, int]:
        return counts, 1


class MiscountedForNpu(SortedForNpu):
    def groups(self, counts: Tensor) -> tuple[Tensor, int]:
        return counts.roll(1).cumsum(0), 0


class CountsAsSums(SortedForNpu):
    def groups(self, counts: Tensor) -> tuple[Tensor, int]:
        return counts.cumsum(0), 1


STYLES: dict[str, tuple[Callable[[], Style], str]] = {
    "index_add": (IndexAdd, ""),
    "bincount": (Bincount, ""),
    "scatter_add": (lambda: ScatterAdd(masked), ""),
    "unsorted": (lambda: Unsorted(scaled_by_expert), ""),
    "empty_like": (lambda: EmptyLike(biased), ""),
    "searchsorted": (Searched, ""),
    "gpt-fast": (lambda: GptFast(of_another), ""),
    "gathered for each slot": (Broadcast, ""),
    "experts by a table": (lambda: EmptyLike(placed), ""),
    "weights of another top-k": (lambda: IndexAdd(of_another), ""),
    "two layers": (Twice, ""),
    "npu, prefix sums": (SortedForNpu, ""),
    "npu, counts": (lambda: CountedForNpu(biased), ""),
    "npu, other counts": (MiscountedForNpu, "raise.offsets"),
    "npu, sums as counts": (CountsAsSums, "raise.offsets"),
    "a loop over all experts": (Looped, "foreign.expert_loop"),
    "one-hot": (OneHot, "foreign.stacked_weights"),
    "capacities": (lambda: Capacity(top_k=1), "foreign.stacked_weights"),
    "experts choose": (ExpertsChoose, "foreign.stacked_weights"),
    "tokens weighed, k = 2": (Weighed, "raise.weigh_input"),
    "counts of other ids": (OtherCounts, "raise."),
    "ids renumbered": (lambda: IndexAdd(renumbered), "raise.ids_range"),
    "a mean": (Mean, "raise.operation"),
}
