"""MoE layers as inference code for Ascend writes them: chains of torch_npu operators, nothing of this package.

Each layer holds this rank's experts, and the experts of all ranks in plain tensors (``whole``) for the reference. ``changes`` is
what a negative twin does otherwise: a function of the layer's own, called at the place that its name says.
Form after hicann/cann-recipes-infer fbc225d (2026-08-21), models/: written anew, at toy sizes.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from quantised_numbers import pack_int4
from torch import Tensor

RANKS = int(os.environ.get("MOE_LOWERING_RANKS", "2"))  # of the tests' pools
# Experts: at least four on each rank, fewer are not for FusedMC2
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 1024, 64, max(8, 4 * RANKS), 2
FORMATS = ("none", "w8a8", "w4a16", "w4a8")
INT8 = ("w8a8", "w4a8")  # formats whose rows are int8
BF16 = 15  # output_dtype


def npu() -> Any:
    return torch.ops.npu


def numbers(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@dataclasses.dataclass
class Weights:
    """Of all experts: ``dense`` in float64 what the quantised ones stand for; the others as the operators take them."""

    w13: Tensor
    w2: Tensor
    dense13: Tensor
    dense2: Tensor
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w13_offset: Tensor | None = None
    w2_offset: Tensor | None = None

    def of(self, first: int, last: int) -> Weights:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Weights(**{name: None if t is None else t[first:last].contiguous() for name, t in fields.items()})


def width_of(quantisation: str) -> int:
    """I: int4 weights want it in 256s with int8 rows."""
    return 256 if quantisation == "w4a8" else INTERMEDIATE


def make_weights(quantisation: str, first: int = 1) -> Weights:
    """Drawn from seeds ``first`` and the next."""
    shapes = ((EXPERTS, HIDDEN, 2 * width_of(quantisation)), (EXPERTS, width_of(quantisation), HIDDEN))
    raw = [numbers(seed, *shape, scale=shape[1] ** -0.5) for seed, shape in enumerate(shapes, first)]
    if quantisation == "none":
        pair = [each.bfloat16() for each in raw]
        return Weights(*pair, *(each.double() for each in pair))
    if quantisation == "w8a8":
        scales = [each.abs().amax(1) / 127 for each in raw]
        scales[1] = scales[1].bfloat16().float()
        ints = [(each / s.unsqueeze(1)).round().clamp(-127, 127) for each, s in zip(raw, scales, strict=True)]
        dense = [i.double() * s.double().unsqueeze(1) for i, s in zip(ints, scales, strict=True)]
        return Weights(*(i.to(torch.int8) for i in ints), *dense, scales[0], scales[1].bfloat16())
    if quantisation == "w4a8":
        scales = [each.abs().amax(1) / 7 for each in raw]
        ints = [(each / s.unsqueeze(1)).round().clamp(-8, 7) for each, s in zip(raw, scales, strict=True)]
        dense = [i.double() * s.double().unsqueeze(1) for i, s in zip(ints, scales, strict=True)]
        bits = [s.view(torch.int32).to(torch.int64) & 0xFFFFFFFF for s in scales]
        return Weights(*(pack_int4(i) for i in ints), *dense, *bits, *(8 * d.sum(1).float() for d in dense))
    made: list[list[Tensor]] = []
    for each in raw:  # groups of 32 lines
        groups = each.unflatten(1, (-1, 32))
        scale = (groups.abs().amax(2) / 7).bfloat16()
        offset = numbers(9, *scale.shape).sign().bfloat16()
        ints = (groups / scale.float().unsqueeze(2) - offset.float().unsqueeze(2)).round().clamp(-8, 7)
        dense = ((ints + offset.float().unsqueeze(2)).double() * scale.double().unsqueeze(2)).flatten(1, 2)
        made.append([pack_int4(ints.flatten(1, 2)), dense, scale, offset])
    (a, da, sa, oa), (b, db, sb, ob) = made
    return Weights(a, b, da, db, sa, sb, oa, ob)


def same(value: Any) -> Any:
    return value


class Layer(torch.nn.Module):
    """What all chains share: this rank's experts, and the twins' changes."""

    def __init__(self, quantisation: str, activation: str, rank: int = 0, ranks: int = 1, **changes: Any) -> None:
        super().__init__()
        self.quantisation, self.activation, self.rank, self.ranks = quantisation, activation, rank, ranks
        self.whole = make_weights(quantisation)
        local = EXPERTS // ranks
        own = self.whole.of(rank * local, (rank + 1) * local)
        for field in dataclasses.fields(own):
            tensor = getattr(own, field.name)
            if tensor is not None and not field.name.startswith("dense"):
                self.register_buffer(field.name, tensor)
        self.register_buffer("smooth_scale_1", None)
        self.register_buffer("smooth_scale_2", None)
        self.whole_smooth: tuple[Tensor | None, Tensor | None] = (None, None)
        self.whole_clip = torch.linspace(0.3, 1.2, EXPERTS) if changes.pop("clipped", False) else None
        own_clip = None if self.whole_clip is None else self.whole_clip[rank * local : (rank + 1) * local].clone()
        self.register_buffer("clip", own_clip)
        self.changes = changes

    def smoothed(self, smooth: float | str | None) -> None:
        """Smooth scales that are all that number; or each its own, of ``tokens``, ``activations`` or ``both``."""
        if smooth is None:
            return
        shapes = ((EXPERTS, HIDDEN), (EXPERTS, width_of(self.quantisation)))
        drawn = [numbers(seed, *shape).abs() + 0.25 for seed, shape in enumerate(shapes, 7)]
        if isinstance(smooth, float):
            drawn, smooth = [torch.full(shape, smooth) for shape in shapes], "both"
        pairs = zip(("tokens", "activations"), drawn, strict=True)
        first, second = self.whole_smooth = tuple(each if smooth in (name, "both") else None for name, each in pairs)  # type: ignore[assignment]
        local = EXPERTS // self.ranks
        self.smooth_scale_1 = first
        self.smooth_scale_2 = None if second is None else second[self.rank * local : (self.rank + 1) * local].clone()

    def change(self, name: str, value: Any) -> Any:
        return self.changes.get(name, same)(value)

    def matmul(self, rows: Tensor, name: str, groups: Tensor, kind: int = 1, **more: Any) -> Tensor:
        given = {
            "group_list": groups, "split_item": 3, "group_type": 0, "group_list_type": kind, **more
        }  # fmt: skip
        if self.quantisation == "w4a16":
            given |= {
                n: [getattr(self, f"{name}_{n.removeprefix('antiquant_')}")]
                for n in ("antiquant_scale", "antiquant_offset")
            }
            given["output_dtype"] = BF16
        return npu().npu_grouped_matmul([rows], [getattr(self, name)], **given)[0]

    def experts(self, rows: Tensor, row_scale: Tensor, groups: Tensor, kind: int = 1) -> Tensor:
        """rows [N, H] -> [N, H] in bfloat16."""
        if self.quantisation == "w8a8":
            hidden = self.matmul(rows, "w13", groups, kind, output_dtype=3, tuning_config=[0])
            hidden = self.change("between", hidden)
            hidden, scale = npu().npu_dequant_swiglu_quant(
                hidden, weight_scale=self.w13_scale, activation_scale=row_scale, group_index=groups, quant_mode=1,
                **{"activate_left": True, "quant_scale": self.smooth_scale_2, **self.changes.get("dequant", {})},
            )  # fmt: skip
            groups = self.change("second_groups", groups)
            return self.matmul(
                hidden, "w2", groups, kind, scale=[self.w2_scale], per_token_scale=[scale], output_dtype=BF16
            )
        if self.quantisation == "w4a8":
            hidden = self.scaled(rows, "w13", row_scale, groups)
            if self.clip is not None:
                hidden = self.change("between", hidden)
                given = [hidden, self.change("second_groups", groups), self.change("alpha", self.clip)]
                how = {"activate_left": True, **self.changes.get("clips", {})}
                rows, row_scale = torch.ops.custom.npu_swiglu_clip_quant(*given, **how)
            elif "joined" in self.changes:
                how = {"activate_left": True, "quant_mode": 1, "dst_type": torch.int8, **self.changes["joined"]}
                rows, row_scale = npu().npu_swiglu_quant(hidden, **how)
            else:
                rows, row_scale = npu().npu_dynamic_quant(self.change("between", self.gate(hidden)))
            return self.scaled(rows, "w2", row_scale, groups)
        hidden = self.change("between", self.matmul(rows, "w13", groups, kind))
        groups = self.change("second_groups", groups)
        return self.matmul(self.gate(hidden), "w2", groups, kind)

    def scaled(self, rows: Tensor, name: str, row_scale: Tensor, groups: Tensor) -> Tensor:
        """By int4 weights, whose bias stands where ``w4a16`` has its offset."""
        scale, bias = self.change("scale", getattr(self, f"{name}_scale")), getattr(self, f"{name}_offset")
        more = {"scale": [scale], "bias": [bias], "per_token_scale": [row_scale], "output_dtype": BF16}
        return self.matmul(rows, name, groups, **self.change("scaled", more))

    def gate(self, hidden: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return npu().npu_swiglu(hidden)
        gate, up = self.change("halves", hidden.split(width_of(self.quantisation), -1))
        if self.activation == "gelu_tanh":
            return torch.nn.functional.gelu(gate, approximate="tanh") * up
        if self.activation == "swiglu_clamp_after":
            return torch.nn.functional.silu(gate).clamp(max=0.5) * up.clamp(-0.5, 0.5)
        if self.activation == "swiglu_clamp":
            return torch.nn.functional.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)
        raise ValueError(self.activation)


class Mc2(Layer):
    """Decode with MC2: dispatch_v2 > experts > combine_v2."""

    def __init__(
        self, group: str, *args: Any, shared: str = "added", smooth: float | str | None = None, **changes: Any
    ) -> None:
        super().__init__(*args, **changes)
        self.group, self.shared = group, shared
        self.register_buffer("w_shared", numbers(5, HIDDEN, HIDDEN, scale=HIDDEN**-0.5).bfloat16())
        self.smoothed(smooth)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor | None = None) -> Any:
        common = {
            "group_ep": self.group, "ep_world_size": self.ranks, "ep_rank_id": self.rank, "moe_expert_num": EXPERTS,
            "group_tp": self.group, "tp_world_size": 1, "x_active_mask": mask,
        }  # fmt: skip
        sent = {**common, "quant_mode": 2 if self.quantisation in INT8 else 0, "comm_alg": "fullmesh_v2"}
        shared = x @ self.w_shared
        rows, scale, assist, counts, received, tp_received, _ = self.dispatch(
            x.view(-1, HIDDEN), ids, **{"scales": self.smooth_scale_1, **sent, **self.changes.get("dispatch", {})}
        )
        out = self.change("out", self.experts(self.change("rows", rows), scale, self.change("counts", counts)))
        back = {**common, "tp_send_counts": tp_received}
        if self.shared == "argument":
            back["shared_expert_x"] = shared
        y = self.combine(
            out,
            self.change("ids", ids),
            assist,
            received,
            self.change("weights", weights.float()),
            **{**back, **self.changes.get("combine", {})},
        )
        y = y + shared if self.shared == "added" else y
        return (y, self.changes["returned"](rows, scale, counts, out)) if "returned" in self.changes else y

    def dispatch(self, *args: Any, **more: Any) -> Any:
        return npu().npu_moe_distribute_dispatch_v2(*args, **more)

    def combine(self, *args: Any, **more: Any) -> Any:
        return npu().npu_moe_distribute_combine_v2(*args, **more)


class Waiting(Mc2):
    """The shared expert on a stream of GE's: it waits for values inside of the chain, and so does the chain for it. ``numbers``:
    of special experts."""

    numbers: dict[str, int] = {}  # noqa: RUF012 (never written)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor | None = None) -> Any:
        wait = torch.ops.air.wait_tensor
        common = {
            "group_ep": self.group,
            "ep_world_size": self.ranks,
            "ep_rank_id": self.rank,
            "moe_expert_num": EXPERTS,
        }
        sent = {"quant_mode": 2} if self.quantisation in INT8 else {}
        sent |= self.numbers
        rows, scale, assist, counts, received, _, _ = self.dispatch(wait(x, ids), ids, **common, **sent)
        shared = wait(x @ self.w_shared, rows)
        out = self.experts(wait(rows, shared), scale, counts)
        shared = wait(shared, self.change("awaited", out)) + 1
        back = {"ori_x": x, **self.numbers} if self.numbers else {}
        y = self.combine(out, ids, assist, received, weights.float(), **common, **back)
        return y + shared + wait(x, out)


ROUTED = ("unpermute", "finalize")  # ways back of a routing


class Routed(Layer):
    """All experts here: init_routing_v2 > experts > finalize_routing or token_unpermute."""

    def __init__(
        self,
        *args: Any,
        back: str = "unpermute",
        kind: int = 1,
        shared: bool = False,
        smooth: float | str | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(*args, **changes)
        self.smoothed(smooth)
        self.back, self.kind, self.shared = back, kind, shared
        self.register_buffer("w_shared", numbers(5, HIDDEN, HIDDEN, scale=HIDDEN**-0.5).bfloat16())

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        given = {
            "active_num": ids.numel(), "expert_num": EXPERTS, "expert_tokens_num_type": self.kind,
            "expert_tokens_num_flag": True, "active_expert_range": [0, EXPERTS],
            "quant_mode": 1 if self.quantisation in INT8 else -1, "scale": self.smooth_scale_1,
        }  # fmt: skip
        tokens = x
        if self.changes.get("travels"):  # as int8 with a scale each
            tokens, given["scale"] = npu().npu_dynamic_quant(x)
            given["quant_mode"] = -1
        routed = npu().npu_moe_init_routing_v2(tokens, ids, **{**given, **self.changes.get("route", {})})
        rows, index, groups, scale = routed
        out = self.change("out", self.experts(self.change("rows", rows), scale, groups, self.change("kind", self.kind)))
        weights, index = self.change("weights", weights.bfloat16()), self.change("index", index)
        if self.back == "finalize":
            added = x @ self.w_shared if self.shared else None
            back = [out, added, None, None, weights, index, None, 2]
            y = npu().npu_moe_finalize_routing(*self.change("finalize", back))
        else:
            y = npu().npu_moe_token_unpermute(out, index.abs(), weights)
        return (y, self.changes["returned"](rows, scale, groups, out)) if "returned" in self.changes else y


def inputs(rank: int, tokens: int = 6, top_k: int = TOP_K) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H] bfloat16, ids [T, k] int32 distinct within a token, weights [T, k] float32."""
    x = numbers(100 + rank, tokens, HIDDEN).bfloat16()
    ids = numbers(200 + rank, tokens, EXPERTS).argsort(-1)[:, :top_k].to(torch.int32)
    return x, ids, numbers(300 + rank, tokens, top_k).softmax(-1)


def reference(layer: Layer, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """[T, H] in float64: for each token the weighted sum of its experts, token by token, of dense weights."""
    out = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for token, chosen in enumerate(ids.tolist()):
        for choice, expert in enumerate(chosen):
            row = x[token].double()
            smooth_x, smooth_h = layer.whole_smooth
            hidden = (row if smooth_x is None else row * smooth_x[expert]) @ layer.whole.dense13[expert]
            gate, up = hidden.chunk(2)
            opened = gate / (1 + torch.exp(-gate))
            if layer.activation == "swiglu_oai":  # even and odd columns
                gate, up = hidden[::2].clamp(max=7.0), hidden[1::2].clamp(-7.0, 7.0) + 1
                opened = gate / (1 + torch.exp(-1.702 * gate))
            if layer.activation == "swiglu_clamp_after":
                opened, up = opened.clamp(max=0.5), up.clamp(-0.5, 0.5)
            if layer.activation == "swiglu_clamp":
                gate, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
                opened = gate / (1 + torch.exp(-gate))
            if layer.activation == "gelu_tanh":
                opened = gate * 0.5 * (1 + torch.tanh(0.7978845608028654 * (gate + 0.044715 * gate**3)))
            between = opened * up if smooth_h is None else opened * up * smooth_h[expert]
            if layer.whole_clip is not None:
                most = between.abs().max() * layer.whole_clip[expert].double()
                between = between.clamp(-most, most)
            out[token] += weights[token, choice].double() * (between @ layer.whole.dense2[expert])
    return out
