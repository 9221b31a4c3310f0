"""MoE layers of torch_npu operators whose experts' products are written otherwise than in ``npu_chain_layers``.

``Apart``: gate and up are two grouped matmuls of the same rows, as code that keeps a checkpoint's w1 and w3 has them (Mixtral's
names). ``Ungated``: one product, an activation of all of it, the other product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import npu_chain_first as first
import npu_chain_layers as chains
import npu_chain_spellings as spelled
import npu_chain_variants as variants
import torch
from torch import Tensor
from torch.nn.functional import silu

_LISTS = ("w13", "w13_scale", "w13_offset")


def of_halves(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def up_in_front(gate: Tensor, up: Tensor) -> Tensor:
    return up * silu(gate)


def joined(gate: Tensor, up: Tensor) -> Tensor:
    return chains.npu().npu_swiglu(torch.cat([gate, up], dim=-1))


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)


def clipped(gate: Tensor, up: Tensor) -> Tensor:
    return chains.npu().npu_clipped_swiglu(torch.cat([gate, up], 1), alpha=1.0, limit=0.5, bias=0.0, interleaved=False)


class Apart:
    """Before a layer of ``npu_chain_layers``: w13 as w1 and w3. ``act`` makes [N, I] of both products."""

    def __init__(self, *args: Any, act: Callable[[Tensor, Tensor], Tensor] = of_halves, **more: Any) -> None:
        super().__init__(*args, **more)
        self.act = act
        for name in _LISTS:
            whole = getattr(self, name, None)
            if isinstance(whole, Tensor):
                for half, part in zip(("w1", "w3"), whole.chunk(2, -1), strict=True):
                    self.register_buffer(name.replace("w13", half), part.contiguous())  # type: ignore[attr-defined]

    def experts(self, rows: Tensor, row_scale: Tensor, groups: Tensor, kind: int = 1) -> Tensor:
        """rows [N, H] -> [N, H] in bfloat16."""
        layer: Any = self
        how = layer.quantisation
        dequantises = how == "w8a8" and self.act is joined
        made = {}
        for name in layer.changes.get("order", ("w1", "w3")):
            x, of_name = layer.change(name, rows), layer.change(f"groups of {name}", groups)
            if dequantises:
                made[name] = layer.matmul(x, name, of_name, kind, output_dtype=3)
            else:
                made[name] = self.product(x, row_scale, name, of_name, kind)
        products = [made["w1"], made["w3"]]
        if dequantises:
            sums = torch.cat(layer.change("sums", products), -1)
            hidden, scale = chains.npu().npu_dequant_swiglu_quant(
                sums, weight_scale=layer.w13_scale, activation_scale=row_scale, group_index=groups, quant_mode=1,
                activate_left=True,
            )  # fmt: skip
        else:
            hidden = layer.act(*layer.change("products", products))
            scale = None
            if how in chains.INT8:
                hidden, scale = chains.npu().npu_dynamic_quant(hidden)
        out = self.product(hidden, scale, "w2", groups, kind)
        return out + 0 * products[0][:, :1] if layer.changes.get("read again") else out

    def product(self, rows: Tensor, row_scale: Tensor | None, name: str, groups: Tensor, kind: int) -> Tensor:
        """Rows, which may be int8 with scales, times a weight of the layer."""
        layer: Any = self
        how, more = layer.quantisation, {}
        if how in chains.INT8:
            scale = getattr(self, f"{name}_scale")
            more = {"scale": [scale.bfloat16() if how == "w8a8" else scale], "per_token_scale": [row_scale]}
            more |= {
                "output_dtype": chains.BF16,
                **({"bias": [getattr(self, f"{name}_offset")]} if how == "w4a8" else {}),
            }
        made: Tensor = layer.matmul(rows, name, groups, kind, **more)
        return made


class Ungated(Apart):
    """Before a layer of ``npu_chain_layers``: its experts have w1 and no w3. ``plain``: the activation, of all columns."""

    def __init__(self, *args: Any, plain: Callable[[Tensor], Tensor] = torch.relu, **more: Any) -> None:
        super().__init__(*args, **more)
        self.plain = plain

    def experts(self, rows: Tensor, row_scale: Tensor, groups: Tensor, kind: int = 1) -> Tensor:
        """rows [N, H] -> [N, H] in bfloat16."""
        layer: Any = self
        hidden = self.plain(self.product(rows, row_scale, "w1", groups, kind))
        scale = row_scale
        if layer.quantisation in chains.INT8:
            hidden, scale = chains.npu().npu_dynamic_quant(hidden)
        return self.product(hidden, scale, "w2", groups, kind)

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """[T, H] in float64, token by token."""
        whole: chains.Weights = self.whole  # type: ignore[attr-defined]
        first = whole.dense13.chunk(2, -1)[0]
        out = torch.zeros(len(x), chains.HIDDEN, dtype=torch.float64)
        for token, chosen in enumerate(ids.tolist()):
            for choice, expert in enumerate(chosen):
                hidden = self.plain(x[token].double() @ first[expert])
                out[token] += weights[token, choice].double() * (hidden @ whole.dense2[expert])
        return out


class Mc2Apart(Apart, chains.Mc2):
    pass


class GatheredApart(Apart, variants.Gathered):
    pass


class SpelledApart(Apart, spelled.Spelled):
    pass


class PermutedApart(Apart, first.Permuted):
    pass


class FirstApart(Apart, first.FirstRouting):
    pass


class SpelledUngated(Ungated, spelled.Spelled):
    pass


class Mc2Ungated(Ungated, chains.Mc2):
    pass
