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
        products = []
        for name in ("w1", "w3"):
            x, more = layer.change(name, rows), {}
            if dequantises:
                more = {"output_dtype": 3}
            elif how in chains.INT8:
                scale = layer.of(name, "scale")
                more = {
                    "scale": [scale.bfloat16() if how == "w8a8" else scale],
                    "per_token_scale": [row_scale],
                    "output_dtype": chains.BF16,
                }
                more |= {"bias": [layer.of(name, "offset")]} if how == "w4a8" else {}
            products.append(layer.matmul(x, name, layer.change(f"groups of {name}", groups), kind, **more))
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
        more = {}
        if scale is not None:
            more = {"scale": [layer.w2_scale], "per_token_scale": [scale], "output_dtype": chains.BF16}
            more |= {"bias": [layer.w2_offset]} if how == "w4a8" else {}
        out = layer.matmul(hidden, "w2", groups, kind, **more)
        return out + 0 * products[0][:, :1] if layer.changes.get("read again") else out

    def of(self, name: str, what: str) -> Tensor:
        tensor: Tensor = getattr(self, f"{name}_{what}")
        return tensor


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
