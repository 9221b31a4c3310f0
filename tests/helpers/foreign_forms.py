"""MoE layers that others' projects write, form by form, each with what it computes in the words of ``reference.moe``.

``FORMS`` is the table: tests, negative twins and the fuzzer run over it, so that a form joins them by a line here.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import reference
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lowering import simulator

simulator.enable()
importlib.import_module("transformers.integrations.moe")  # registers transformers::grouped_mm_fallback

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 6, 16, 8, 4, 2


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A layer: a function of x [T, H], weights [T, k], ids [T, k] and named tensors.

    Attributes:
        form: the name that the report has for it.
        tensors: shapes of the named tensors.
        expected: from the named tensors what ``reference.moe`` takes: w13 [E, H, 2I], w2 [E, I, H], options.
        base: the result is added to x times this tensor [H, H].
    """

    form: str
    function: Callable[..., Any]
    tensors: dict[str, tuple[int, ...]]
    expected: Callable[[dict[str, Tensor]], dict[str, Any]]
    dtype: torch.dtype = torch.bfloat16
    top_k: int = TOP_K
    weights_dtype: torch.dtype | None = None
    base: str = ""

    def make(self, seed: int = 0, tokens: int = TOKENS) -> dict[str, Tensor]:
        """x, weights, ids and the named tensors."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        scores = torch.rand(tokens, EXPERTS, generator=generator)
        weights, ids = scores.topk(self.top_k, -1)
        made = {"x": random(tokens, HIDDEN), "weights": weights.to(self.weights_dtype or self.dtype), "ids": ids}
        return made | {name: random(*shape) for name, shape in self.tensors.items()}

    def reference(self, made: dict[str, Tensor]) -> Tensor:
        options = self.expected(made)
        x, weights = made["x"], made["weights"]
        if options.pop("weigh_input", False):
            x, weights = x.double() * weights.double(), torch.ones_like(weights)
        y = reference.moe(x, weights, made["ids"], **options)
        return y + made["x"].double() @ made[self.base].double() if self.base else y


# ---------------------------------------------------------------------------------------------------------- pieces of them


def halves(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def oai(h: Tensor) -> Tensor:
    gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def clamped(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=0.5)) * up.clamp(min=-0.5, max=0.5)


def gelu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.gelu(gate) * up


def gelu_tanh(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return up * F.gelu(gate, approximate="tanh")


def softcapped(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return torch.tanh(gate / 2.5) * 2.5 * torch.sigmoid(gate) * (torch.tanh(up / 0.7) * 0.7)


def clamped_after(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate).clamp(max=0.5) * up.clamp(min=-0.5, max=0.5)


def in_float32(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(h.dtype)


def product(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    if weight.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weight, offs=offs)
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, offs)


def order(ids: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sort(ids.reshape(-1))


def offsets(ids: Tensor, most: int = EXPERTS - 1) -> Tensor:
    return torch.cumsum(torch.histc(ids.float(), bins=EXPERTS, min=0, max=most), dim=0, dtype=torch.int32)


COUNTS = {
    "one_hot": lambda ids: F.one_hot(ids.view(-1), EXPERTS).sum(0),
    "one_hot of two dimensions": lambda ids: F.one_hot(ids, EXPERTS).sum(dim=(0, 1)),
    "compared": lambda ids: (ids.view(-1, 1) == torch.arange(EXPERTS)).sum(0),
    "scatter_add": lambda ids: torch.zeros(EXPERTS, dtype=torch.int64).scatter_add(
        0, ids.view(-1), torch.ones_like(ids.view(-1))
    ),
    "index_add": lambda ids: torch.zeros(EXPERTS).index_add(0, ids.view(-1), torch.ones(ids.numel())),
}


def counted(count: Callable[[Tensor], Tensor]) -> Any:
    """Rows counted in another way than by a histogram."""

    def forward(x: Tensor, weights: Tensor, ids: Tensor, **t: Tensor) -> Tensor:
        _, perm = order(ids)
        offs = count(ids).cumsum(0).to(torch.int32)
        y = product(halves(product(x[perm // ids.shape[-1]], t["w13"], offs)), t["w2"], offs)
        return back(y * weights.reshape(-1)[perm].unsqueeze(-1), perm, ids)

    return forward


def back(rows: Tensor, perm: Tensor, ids: Tensor) -> Tensor:
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0))
    return rows[inverse].view(*ids.shape, -1).sum(dim=1)


# ------------------------------------------------------------------------------------------------------------ transformers


def grouped(gate: Callable[[Tensor], Tensor] = halves, transposed: bool = False, biased: bool = False) -> Any:
    """As transformers' ``grouped_mm_experts_forward``."""

    def forward(x: Tensor, weights: Tensor, ids: Tensor, **t: Tensor) -> Tensor:
        sorted_ids, perm = order(ids)
        offs = offsets(sorted_ids)
        w13, w2 = (t[name] if transposed else t[name].transpose(-2, -1) for name in ("w13", "w2"))
        h = product(x[perm // ids.shape[-1]].to(w13.dtype), w13, offs)
        if biased:
            h = h.add_(t["w13_bias"][sorted_ids])
        y = product(gate(h), w2, offs)
        if biased:
            y = y.add_(t["w2_bias"][sorted_ids])
        return back(y * weights.reshape(-1)[perm].unsqueeze(-1), perm, ids).to(x.dtype)

    return forward


def batched(gate: Callable[[Tensor], Tensor] = halves, transposed: bool = False, biased: bool = False) -> Any:
    """As transformers' ``batched_mm_experts_forward``."""

    def linear(rows: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        if transposed:
            out = torch.bmm(rows.unsqueeze(1), w).squeeze(1)
        else:
            out = torch.bmm(w, rows.unsqueeze(-1)).squeeze(-1)
        return out if b is None else out.add_(b)

    def forward(x: Tensor, weights: Tensor, ids: Tensor, **t: Tensor) -> Tensor:
        rows, flat = x.repeat_interleave(ids.size(-1), dim=0), ids.reshape(-1)
        h = linear(rows, t["w13"][flat], t["w13_bias"][flat] if biased else None)
        y = linear(gate(h), t["w2"][flat], t["w2_bias"][flat] if biased else None)
        y = y * weights.reshape(-1).unsqueeze(-1)
        return y.view(*ids.shape, x.shape[-1]).sum(dim=1).to(x.dtype)

    return forward


# ------------------------------------------------------------------------------------------------- torchtitan, gpt-fast


def titan_rows(x: Tensor, perm: Tensor, top_k: int) -> Tensor:
    index = (perm // top_k).reshape(-1, 1).expand(-1, x.shape[-1])
    return torch.gather(x, dim=0, index=index)


def titan_experts(rows: Tensor, offs: Tensor, t: dict[str, Tensor]) -> Tensor:
    h = F.silu(product(rows, t["w1"].transpose(-2, -1), offs)) * product(rows, t["w3"].transpose(-2, -1), offs)
    return product(h, t["w2"].transpose(-2, -1), offs)


def titan_scatter(x: Tensor, weights: Tensor, ids: Tensor, **t: Tensor) -> Tensor:
    """Weights after the experts; into the result of a shared expert."""
    top_k = ids.shape[-1]
    perm = torch.argsort(ids.view(-1), stable=True)
    rows = titan_rows(x, perm, top_k)
    y = titan_experts(rows, offsets(ids.view(-1), EXPERTS), t)
    y = (y.to(torch.float32) * weights.view(-1)[perm].reshape(-1, 1)).to(x.dtype)
    index = (perm // top_k).reshape(-1, 1).expand(-1, x.shape[-1])
    return (x @ t["shared"]).scatter_add(dim=0, index=index, src=y)


def titan_bmm(x: Tensor, weights: Tensor, ids: Tensor, **t: Tensor) -> Tensor:
    """Unsorted by index_put, then a product with the weights."""
    perm = torch.argsort(ids.view(-1), stable=True)
    y = titan_experts(x[perm // ids.shape[-1]], offsets(ids.view(-1), EXPERTS), t)
    unsorted = torch.zeros((ids.numel(), x.shape[-1]), dtype=x.dtype)
    unsorted[perm] = y
    unsorted = unsorted.reshape(-1, ids.shape[-1], x.shape[-1])
    out = torch.bmm(weights.reshape(-1, 1, ids.shape[-1]), unsorted.float()).to(x.dtype).squeeze(1)
    return x @ t["shared"] + out


def titan_before(x: Tensor, weights: Tensor, ids: Tensor, **t: Tensor) -> Tensor:
    """Weights before the experts; equal to weights after them for no activation, so k must be 1."""
    top_k = ids.shape[-1]
    perm = torch.argsort(ids.view(-1), stable=True)
    rows = titan_rows(x, perm, top_k)
    rows = (rows.to(torch.float32) * weights.view(-1)[perm].reshape(-1, 1)).to(x.dtype)
    y = titan_experts(rows, offsets(ids.view(-1), EXPERTS), t)
    index = (perm // top_k).reshape(-1, 1).expand(-1, x.shape[-1])
    return torch.zeros_like(x).scatter_add(dim=0, index=index, src=y)


def index_add(x: Tensor, weights: Tensor, ids: Tensor, **t: Tensor) -> Tensor:
    sorted_ids, perm = torch.sort(ids.view(-1), stable=True)
    token = torch.div(perm, ids.shape[-1], rounding_mode="floor")
    y = product(halves(product(x.index_select(0, token), t["w13"], offsets(sorted_ids))), t["w2"], offsets(sorted_ids))
    y = y * weights.reshape(-1).index_select(0, perm)[:, None]
    return torch.zeros_like(x).index_add(0, token, y)


def argsort_back(x: Tensor, weights: Tensor, ids: Tensor, **t: Tensor) -> Tensor:
    """The way back by a second argsort, and weights applied after it."""
    perm = ids.flatten().argsort()
    offs = offsets(ids)
    y = product(halves(product(x[perm // ids.shape[-1]], t["w13"], offs)), t["w2"], offs)
    y = y[perm.argsort()].view(*ids.shape, -1)
    return (y * weights.unsqueeze(-1)).sum(1)


def gpt_fast(x: Tensor, weights: Tensor, ids: Tensor, **t: Tensor) -> Tensor:
    x1 = F.silu(torch.einsum("ti,taoi -> tao", x, t["w1"][ids]))
    x3 = torch.einsum("ti, taoi -> tao", x, t["w3"][ids])
    outs = torch.einsum("tao, taio -> tai", (x1 * x3), t["w2"][ids])
    return torch.einsum("tai,ta -> ti", outs, weights)


# ------------------------------------------------------------------------------------------------------------- the table

NK = {"w13": (EXPERTS, 2 * INTERMEDIATE, HIDDEN), "w2": (EXPERTS, HIDDEN, INTERMEDIATE)}  # as transformers stores them
KN = {"w13": (EXPERTS, HIDDEN, 2 * INTERMEDIATE), "w2": (EXPERTS, INTERMEDIATE, HIDDEN)}
UNGATED = {"w13": (EXPERTS, INTERMEDIATE, HIDDEN), "w2": (EXPERTS, HIDDEN, INTERMEDIATE)}
UNGATED_KN = {
    "w13": (EXPERTS, HIDDEN, INTERMEDIATE),
    "w2": (EXPERTS, INTERMEDIATE, HIDDEN),
    "w13_bias": (EXPERTS, INTERMEDIATE),
    "w2_bias": (EXPERTS, HIDDEN),
}
BIASES = {"w13_bias": (EXPERTS, 2 * INTERMEDIATE), "w2_bias": (EXPERTS, HIDDEN)}
APART = {
    "w1": (EXPERTS, INTERMEDIATE, HIDDEN),
    "w3": (EXPERTS, INTERMEDIATE, HIDDEN),
    "w2": (EXPERTS, HIDDEN, INTERMEDIATE),
}
SHARED = {"shared": (HIDDEN, HIDDEN)}


def nk(**options: Any) -> Any:
    return lambda t: {"w13": t["w13"].transpose(1, 2), "w2": t["w2"].transpose(1, 2), **options}


def kn(**options: Any) -> Any:
    return lambda t: {"w13": t["w13"], "w2": t["w2"], **{n: t[n] for n in BIASES if n in t}, **options}


def apart(t: dict[str, Tensor]) -> dict[str, Any]:
    return {"w13": torch.cat([t["w1"], t["w3"]], 1).transpose(1, 2), "w2": t["w2"].transpose(1, 2)}


OAI = {"activation": "swiglu_oai", "limit": 7.0, "alpha": 1.702, "interleaved": True}
FLOAT = torch.float32
G, B = "grouped_mm", "gathered_weights"
FORMS = {
    "grouped_mm": Foreign(G, grouped(), NK, nk()),
    "grouped_mm, float32": Foreign(G, grouped(), NK, nk(), FLOAT),
    "grouped_mm, float32 weights of tokens": Foreign(G, grouped(), NK, nk(), weights_dtype=FLOAT),
    "grouped_mm, k = 1": Foreign(G, grouped(), NK, nk(), top_k=1),
    "grouped_mm, transposed, biased, gpt-oss": Foreign(G, grouped(oai, True, True), KN | BIASES, kn(**OAI)),
    "grouped_mm, clamped": Foreign(G, grouped(clamped), NK, nk(activation="swiglu_clamp", limit=0.5), FLOAT),
    "grouped_mm, gelu": Foreign(G, grouped(gelu), NK, nk(activation="gelu"), FLOAT),
    "grouped_mm, gelu_tanh": Foreign(G, grouped(gelu_tanh), NK, nk(activation="gelu_tanh"), FLOAT),
    "grouped_mm, gate in float32": Foreign(G, grouped(in_float32), NK, nk()),
    "grouped_mm, clamps after": Foreign(
        G, grouped(clamped_after), NK, nk(activation="swiglu_clamp_after", limit=0.5), FLOAT
    ),
    "grouped_mm, softcap": Foreign(
        G, grouped(softcapped), NK, nk(activation="swiglu_softcap", limit=2.5, alpha=0.7), FLOAT
    ),
    "grouped_mm, relu": Foreign(G, grouped(F.relu), UNGATED, nk(activation="relu"), FLOAT),
    "grouped_mm, relu2, biased": Foreign(
        G, grouped(lambda h: torch.square(F.relu(h)), True, True), UNGATED_KN, kn(activation="relu2"), FLOAT
    ),
    "grouped_mm, silu": Foreign(G, grouped(F.silu), UNGATED, nk(activation="silu"), FLOAT),
    "grouped_mm, gelu alone": Foreign(G, grouped(F.gelu), UNGATED, nk(activation="gelu_ungated"), FLOAT),
    "grouped_mm, gelu_tanh alone": Foreign(
        G, grouped(lambda h: F.gelu(h, approximate="tanh")), UNGATED, nk(activation="gelu_tanh_ungated"), FLOAT
    ),
    "index_add": Foreign(G, index_add, KN, kn(), FLOAT),
    "argsort back": Foreign(G, argsort_back, KN, kn(), FLOAT),
    **{f"counted by {name}": Foreign(G, counted(count), KN, kn(), FLOAT) for name, count in COUNTS.items()},
    "titan, scatter": Foreign(G, titan_scatter, APART | SHARED, apart, weights_dtype=FLOAT, base="shared"),
    "titan, bmm": Foreign(G, titan_bmm, APART | SHARED, apart, weights_dtype=FLOAT, base="shared"),
    "titan, before, k = 1": Foreign(G, titan_before, APART, lambda t: apart(t) | {"weigh_input": True}, FLOAT, top_k=1),
    "batched_mm": Foreign(B, batched(), NK, nk()),
    "batched_mm, float32": Foreign(B, batched(), NK, nk(), FLOAT),
    "batched_mm, k = 1": Foreign(B, batched(), NK, nk(), FLOAT, top_k=1),
    "batched_mm, transposed, biased, gpt-oss": Foreign(B, batched(oai, True, True), KN | BIASES, kn(**OAI), FLOAT),
    "gpt-fast": Foreign(B, gpt_fast, APART, apart),
    "gpt-fast, float32": Foreign(B, gpt_fast, APART, apart, FLOAT),
}
