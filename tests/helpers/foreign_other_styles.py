"""More styles of code bases that nobody wrote for this package, and near misses of them: ``OTHER_STYLES``, as ``STYLES``.

Written anew after DeepSeek-V2's ``moe_infer``, vLLM's Pallas path and ``expert_map``, MegaBlocks, ScatterMoE, JetMoE, gpt-oss's
reference, tutel, fairseq, Grok, llama4 and torchtitan.
"""

from __future__ import annotations

from collections.abc import Callable

import reference
import torch
import torch.nn.functional as F
from foreign_forms import EXPERTS, HIDDEN
from foreign_styles import Routed, Style
from torch import Tensor, nn

_CAPACITY = 4


class DeepSeekV2(Style):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        counts = ids.new_zeros(ids.shape[0], EXPERTS)
        counts.scatter_(1, ids, 1)
        order = ids.view(-1).argsort()
        rows = self.mlp(x[order // ids.shape[1]], counts.sum(0).cumsum(0).int())
        back = torch.empty_like(rows)
        back[order] = rows
        return back.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1)).sum(1).type(x.dtype)


class VllmPallas(Style):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        flat = ids.flatten()
        order = flat.argsort()
        tokens = torch.arange(len(x)).repeat_interleave(self.top_k)[order]
        ones = torch.ones_like(flat, dtype=torch.int32)
        counts = torch.zeros(EXPERTS, dtype=torch.int32).scatter_add_(0, flat, ones)
        rows = self.mlp(x[tokens], counts.cumsum(0, dtype=torch.int32))[order.argsort()].reshape(*ids.shape, -1)
        return (rows * weights.unsqueeze(-1).to(x.dtype)).sum(-2)


class ScatterMoE(Style):
    """Its counts are of the ids in order, as MegaBlocks' are."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        values, order = torch.sort(ids.flatten())
        rows = self.mlp(x[order // self.top_k], torch.bincount(values, minlength=EXPERTS).cumsum(-1).int())
        back = torch.empty_like(rows).scatter(0, order.unsqueeze(1).expand(-1, HIDDEN), rows)
        return torch.bmm(weights.unsqueeze(1).to(x.dtype), back.view(*ids.shape, -1)).squeeze(1)


class JetMoe(Style):
    """Ones in bfloat16, and Granite's."""

    def counts(self, ones: Tensor) -> Tensor:
        return ones.long().sum(0)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        ones = torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter(1, ids, 1)
        _, order = ids.flatten().sort(0)
        tokens = order.div(self.top_k, rounding_mode="trunc")
        rows = self.mlp(x[tokens], self.counts(ones).cumsum(0).int())
        rows = rows * weights.flatten()[order].to(x.dtype)[:, None]
        return torch.zeros(len(x), HIDDEN, dtype=x.dtype).index_add(0, tokens, rows)


class CountsRounded(JetMoe):
    """Summed in bfloat16, which holds no number of tokens above 256."""

    def counts(self, ones: Tensor) -> Tensor:
        return ones.sum(0).float()


class GptOss(Style):
    """The reference's einsums, with its own order of router and softmax; silu in the place of its gate."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        w1, w3, w2 = (w.transpose(1, 2)[ids, ...] for w in (self.w1, self.w3, self.w2))
        hidden = F.silu(torch.einsum("beck,bk->bec", w1, x)) * torch.einsum("beck,bk->bec", w3, x)
        return torch.einsum("bec,be->bc", torch.einsum("beck,bek->bec", w2, hidden), weights.to(x.dtype))


class PaddedBins(Style):
    """MegaBlocks' and torchtitan's: each expert's rows begin at a multiple of four."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        flat = ids.flatten()
        order, counts = flat.argsort(stable=True), torch.bincount(flat, minlength=EXPERTS)
        padded = (counts + 3) // 4 * 4
        chosen = flat[order]
        place = torch.arange(flat.numel()) - (counts.cumsum(0) - counts)[chosen] + (padded.cumsum(0) - padded)[chosen]
        rows = torch.zeros(flat.numel() + 4 * EXPERTS, HIDDEN, dtype=x.dtype)
        rows = self.mlp(rows.index_copy(0, place, x[order // self.top_k]), padded.cumsum(0).int())[place]
        return torch.zeros_like(x).index_add(0, order // self.top_k, rows * weights.flatten()[order, None].to(x.dtype))


class ChoicesFirst(Style):
    """Slots numbered by choice, then by token, and read as if by token."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        order, ends = self.order(ids.t())
        rows = self.mlp(x[order // self.top_k], ends) * weights.reshape(-1)[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, order // self.top_k, rows)


def in_buffers(weights: Tensor, ids: Tensor) -> Tensor:
    """GShard's ``combine`` [T, E, C], which drops what has no place."""
    chosen = F.one_hot(ids, EXPERTS)
    place = (chosen.transpose(0, 1).reshape(-1, EXPERTS).cumsum(0) - 1).view(ids.shape[1], -1, EXPERTS).transpose(0, 1)
    kept = (place < _CAPACITY) & (chosen > 0)
    places = F.one_hot(place.clamp(0, _CAPACITY - 1), _CAPACITY).to(weights.dtype)
    return torch.einsum("tke,tkec->tec", kept * weights.unsqueeze(-1), places)


class Fairseq(Style):
    def forward(self, x: Tensor) -> Tensor:
        combine = in_buffers(*self.routed(self, x)).to(x.dtype)
        rows = torch.einsum("sec,sm->ecm", (combine > 0).to(x.dtype), x)
        parts = [
            (F.silu(part @ self.w1[e]) * (part @ self.w3[e])) @ self.w2[e] for e, part in enumerate(rows.unbind(0))
        ]
        return torch.einsum("sec,ecm->sm", combine, torch.stack(parts))


class Tutel(Style):
    """A place in a buffer for each slot, and one line for all that is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        flat = ids.t().reshape(-1)
        chosen = F.one_hot(flat, EXPERTS)
        place = ((chosen.cumsum(0) - 1) * chosen).sum(-1)
        place = torch.where(place < _CAPACITY, flat * _CAPACITY + place, EXPERTS * _CAPACITY)
        rows = torch.zeros(EXPERTS * _CAPACITY + 1, HIDDEN, dtype=x.dtype).index_put((place,), x.repeat(self.top_k, 1))
        rows = rows[:-1].view(EXPERTS, _CAPACITY, HIDDEN)
        rows = torch.bmm(F.silu(torch.bmm(rows, self.w1)) * torch.bmm(rows, self.w3), self.w2).view(-1, HIDDEN)
        rows = torch.cat([rows, x.new_zeros(1, HIDDEN)])[place].view(self.top_k, -1, HIDDEN)
        return (rows * weights.t().unsqueeze(-1).to(x.dtype)).sum(0)


class PickedAfterwards(Style):
    """Grok's: all experts for every token, of which the chosen are picked."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(self, x)
        hidden = F.silu(torch.einsum("th,ehi->tei", x, self.w1)) * torch.einsum("th,ehi->tei", x, self.w3)
        rows = torch.einsum("tei,eih->teh", hidden, self.w2).gather(1, ids.unsqueeze(-1).expand(-1, -1, HIDDEN))
        return (rows * weights.unsqueeze(-1).to(x.dtype)).sum(1)


class Llama4(Style):
    """All experts for every token, whose scores, 0 of what was not chosen, weigh what goes into them."""

    def scores(self, x: Tensor) -> Tensor:
        values, ids = torch.topk(x @ self.gating, self.top_k, 1)
        return torch.full((len(x), EXPERTS), -torch.inf, dtype=x.dtype).scatter_(1, ids, values).float().sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x).to(x.dtype).t().reshape(-1, 1)
        return self.experts(x.repeat(EXPERTS, 1) * scores).view(EXPERTS, *x.shape).sum(0)

    def experts(self, rows: Tensor) -> Tensor:
        gate_up = torch.bmm(rows.view(EXPERTS, -1, HIDDEN), torch.cat([self.w1, self.w3], -1))
        gate, up = gate_up.chunk(2, -1)
        return torch.bmm(up * F.silu(gate), self.w2)


class Llama4Grouped(Llama4):
    """The same in grouped products, of as many rows each."""

    def experts(self, rows: Tensor) -> Tensor:
        return self.mlp(rows, torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (len(rows) // EXPERTS))


class Llama4Gathered(Llama4):
    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(EXPERTS).expand(len(x), EXPERTS)
        rows = x.unsqueeze(1) * self.scores(x).unsqueeze(-1).to(x.dtype)
        w1, w3, w2 = self.w1[ids], self.w3[ids], self.w2[ids]
        hidden = F.silu(torch.einsum("teh,tehi->tei", rows, w1)) * torch.einsum("teh,tehi->tei", rows, w3)
        return torch.einsum("tei,teih->teh", hidden, w2).sum(1)


class ScaledBefore(Style):
    """One choice, and x times its score in front of the routing."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = (x @ self.gating).float().sigmoid().topk(1, 1)
        order, ends = self.order(ids)
        rows = self.mlp((x * weights.to(x.dtype))[order], ends)
        return torch.empty_like(rows).index_copy(0, order, rows)


class Gathered(Style):
    """Matrices gathered by ids that ``own`` makes of the chosen ones, with weights that ``own`` masks."""

    def __init__(self, own: Callable[[Gathered, Tensor, Tensor], Routed], top_k: int = 2, experts: int = 2) -> None:
        super().__init__(top_k=top_k)
        self.own = own
        self.map = nn.Buffer(torch.tensor([-1, 0, -1, 1] if experts == 2 else [0, -1, 2, 3]))
        self.given = nn.Buffer(torch.tensor([[0, 3], [3, 1], [2, 1], [1, 0], [2, 3], [-1, -1]]))
        for name in ("w1", "w3", "w2"):
            setattr(self, name, nn.Buffer(getattr(self, name)[-experts:].clone()))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.own(self, *self.routed(self, x))
        w1, w3, w2 = (w[ids] for w in (self.w1, self.w3, self.w2))
        hidden = F.silu(torch.einsum("th,tkhi->tki", x, w1)) * torch.einsum("th,tkhi->tki", x, w3)
        rows = torch.einsum("tki,tkih->tkh", hidden, w2)
        return (rows * weights.unsqueeze(-1).to(x.dtype)).sum(1)

    def expected(self, x: Tensor) -> Tensor:
        weights, ids = self.own(self, *self.routed(self, x))
        return reference.moe(x, weights, ids, w13=torch.cat([self.w1, self.w3], -1), w2=self.w2)


def by_map(layer: Gathered, weights: Tensor, ids: Tensor) -> Routed:
    """vLLM's: -1 of another rank's expert, which is the last one of this rank's by its number, times zero."""
    own = layer.map[ids]
    return torch.where(own >= 0, weights, 0.0), own


def by_clamped_map(layer: Gathered, weights: Tensor, ids: Tensor) -> Routed:
    own = layer.map[ids]
    return torch.where(own == -1, 0.0, weights), own.clamp(min=0)


def by_map_without(layer: Gathered, weights: Tensor, ids: Tensor) -> Routed:
    own = layer.map[ids]
    return torch.where(own == -1, 0.0, weights), own


def by_map_of_given(layer: Gathered, weights: Tensor, ids: Tensor) -> Routed:
    """As in a graph of the experts alone: what chose the ids is not in it."""
    return weights, layer.map[layer.given]


def by_map_and_ids(layer: Gathered, weights: Tensor, ids: Tensor) -> Routed:
    """The weights are masked by the ids, so that nothing tests what the map says."""
    return weights * ((ids == 1) | (ids == 3)), layer.map[ids]


def by_literal(*numbers: int) -> Callable[[Gathered, Tensor, Tensor], Routed]:
    """Another number for each expert, by a table that the model writes."""
    return lambda layer, weights, ids: (weights, torch.tensor(numbers)[ids])


def of_literal(*pair: int) -> Callable[[Gathered, Tensor, Tensor], Routed]:
    """The same experts for each token."""
    return lambda layer, weights, ids: (weights, torch.tensor([pair] * 6))


def with_padding(layer: Gathered, weights: Tensor, ids: Tensor) -> Routed:
    """Ids from outside, -1 of tokens that are none."""
    return torch.where(layer.given > -1, weights, 0.0), layer.given


class Padded(Style):
    """Ids from outside, the number of experts for padding, whose weights are zero."""

    defined = slice(5)  # grouped_mm writes no rows behind the last group, and zero times those may be NaN

    def __init__(self, own: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.own = own
        self.given = nn.Buffer(torch.tensor([[0, 3], [3, 1], [2, 1], [1, 0], [2, 3], [EXPERTS, EXPERTS]]))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.where(self.own(self.given), self.routed(self, x)[0], 0.0)
        order, ends = self.order(self.given)
        rows = self.mlp(x[order // self.top_k], ends) * weights.reshape(-1)[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, order // self.top_k, rows)


def from_outside(layer: Gathered, weights: Tensor, ids: Tensor) -> Routed:
    """The same ids without such a token, and nothing that tests them."""
    return weights, layer.given[:5].repeat(2, 1)[:6]


class Counted(Padded):
    """All are experts, which is counted beside the layer: no test that the layer reads."""

    defined = slice(None)

    def __init__(self) -> None:
        super().__init__(lambda ids: torch.ones_like(ids, dtype=torch.bool))
        self.given = nn.Buffer(torch.tensor([[0, 3], [3, 1], [2, 1], [1, 0], [2, 3], [3, 2]]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), ((self.given >= 0) & (self.given < EXPERTS)).sum()  # type: ignore[return-value]


OTHER_STYLES: dict[str, tuple[Callable[[], Style], str]] = {
    "deepseek-v2": (DeepSeekV2, ""),
    "vllm, pallas": (VllmPallas, ""),
    "scattermoe": (ScatterMoE, ""),
    "jetmoe": (JetMoe, ""),
    "jetmoe, counts rounded": (CountsRounded, "raise.offsets"),
    "gpt-oss, einsum": (GptOss, ""),
    "padded bins": (PaddedBins, "raise.offsets"),
    "slots by choice": (ChoicesFirst, "raise.offsets"),
    "fairseq": (Fairseq, "foreign.expert_loop"),
    "tutel": (Tutel, "foreign.stacked_weights"),
    "picked afterwards": (PickedAfterwards, "foreign.stacked_weights"),
    "llama4": (Llama4, "foreign.stacked_weights"),
    "llama4, grouped": (Llama4Grouped, "raise.dense"),
    "llama4, gathered": (Llama4Gathered, "raise.dense"),
    "x scaled, k = 1": (lambda: ScaledBefore(top_k=1), "raise.no_weights"),
    "a map of experts": (lambda: Gathered(by_map), "raise.expert_map"),
    "a map as long as the experts": (lambda: Gathered(by_map, experts=4), "raise.expert_map"),
    "a map, clamped": (lambda: Gathered(by_clamped_map), "raise.expert_map"),
    "a map that nothing tests": (lambda: Gathered(by_map_and_ids), "raise.expert_map"),
    "a map that nothing tests, k = 1": (lambda: Gathered(by_map_and_ids, top_k=1), "raise.expert_map"),
    "a map, compared with -1": (lambda: Gathered(by_map_without, experts=4), "raise.expert_map"),
    "a map of ids from outside": (lambda: Gathered(by_map_of_given), "raise.expert_map"),
    "a literal table": (lambda: Gathered(by_literal(2, 0, 3, 1), experts=4), ""),
    "a literal table, one expert twice": (lambda: Gathered(by_literal(2, 0, 2, 1), experts=4), "raise.expert_map"),
    "a literal table, one expert twice, k = 1": (lambda: Gathered(by_literal(2, 0, 2, 1), top_k=1, experts=4), ""),
    "a literal table, from the end": (lambda: Gathered(by_literal(2, -1, 0, 1), experts=4), "raise.expert_map"),
    "a literal table, from the end, k = 1": (
        lambda: Gathered(by_literal(2, -1, 0, 1), top_k=1, experts=4),
        "raise.expert_map",
    ),
    "literal ids": (lambda: Gathered(of_literal(3, 1), experts=4), ""),
    "literal ids, from the end": (lambda: Gathered(of_literal(-1, 1), experts=4), "raise.ids_range"),
    "literal ids, one twice": (lambda: Gathered(of_literal(1, 1), experts=4), "raise.ids_range"),
    "ids with padding": (lambda: Gathered(with_padding, experts=4), "raise.ids_range"),
    "ids past the experts, below": (lambda: Padded(lambda ids: ids < EXPERTS), "raise.ids_range"),
    "ids past the experts, at most": (lambda: Padded(lambda ids: ids <= EXPERTS - 1), "raise.ids_range"),
    "ids past the experts, not equal": (lambda: Padded(lambda ids: ids != EXPERTS), "raise.ids_range"),
    "ids past the experts, by half": (lambda: Padded(lambda ids: ids.float() < EXPERTS - 0.5), "raise.ids_range"),
    "ids past the experts, shifted": (lambda: Padded(lambda ids: ids + 1 <= EXPERTS), "raise.ids_range"),
    "ids past the experts, a tensor": (
        lambda: Padded(lambda ids: ids != torch.full_like(ids, EXPERTS)),
        "raise.ids_range",
    ),
    "ids from outside": (lambda: Gathered(from_outside, experts=4), ""),
}
