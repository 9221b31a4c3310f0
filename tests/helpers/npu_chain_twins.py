"""Twins of chains of torch_npu operators: a chain with one thing changed, and the code with which it is left."""

from __future__ import annotations

from typing import Any

import npu_chain_layers as chains
import torch

CLIPPED: dict[str, Any] = {"quantisation": "w4a8", "clipped": True}


npu = chains.npu


def clamp_quant(hidden: torch.Tensor) -> Any:
    return torch.ops.custom.npu_dequant_swiglu_clamp_quant(hidden)


def matmul_finalize(rows: torch.Tensor) -> Any:
    experts, weight = (
        chains.EXPERTS // 2,
        torch.ones(chains.EXPERTS // 2, chains.HIDDEN, chains.HIDDEN, dtype=torch.int8),
    )
    counts, scale = torch.ones(experts, dtype=torch.int64), torch.ones(experts, chains.HIDDEN)
    return npu().npu_grouped_matmul_finalize_routing(rows, weight, counts, scale=scale, output_bs=6, group_list_type=1)


def clip_quant(hidden: torch.Tensor) -> Any:
    counts = torch.ones(chains.EXPERTS // 2, dtype=torch.int64)
    return torch.ops.custom.npu_swiglu_clip_quant(hidden, counts, torch.ones(chains.EXPERTS // 2), activate_left=True)[
        0
    ]


CONSTANTS = ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")


TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu between the matmuls": ("raise.activation", {"between": torch.relu}),
    "results weighted twice": ("raise.operation_between", {"out": lambda out: out * 2}),
    "another index at the way back": ("raise.other_value", {"ids": lambda ids: ids.flip(1)}),
    "another k at the way back": ("raise.other_value", {"ids": lambda ids: ids[:, :1].contiguous()}),
    "another group": ("raise.other_group", {"group": "another"}),
    "rows returned": ("raise.single_use", {"returned": lambda rows, scale, counts, out: rows}),
    "results returned": ("raise.single_use", {"returned": lambda rows, scale, counts, out: out}),
    "gate and up exchanged": ("raise.gate_second", {"activation": "gelu_tanh", "halves": lambda pair: pair[::-1]}),
    "gate and up exchanged, W8A8": ("raise.gate_second", {"quantisation": "w8a8", "dequant": {"activate_left": False}}),
    "gate and up exchanged, in one": ("raise.gate_second", {"quantisation": "w4a8", "joined": {"activate_left": False}}),
    "groups, in one": (
        "raise.literal", {"quantisation": "w4a8", "joined": {"group_index": torch.ones(chains.EXPERTS // 2).int()}}
    ),
    "smooth scales, in one": (
        "raise.smooth_scales", {"quantisation": "w4a8", "joined": {"smooth_scales": torch.ones(1, 256)}}
    ),
    "prefix sums for counts": ("raise.counts", {"dispatch": {"expert_token_nums_type": 0}}),
    "other counts at the second matmul": ("raise.counts", {"second_groups": lambda counts: counts.flip(0)}),
    "other counts at both": ("raise.counts", {"counts": lambda counts: counts.flip(0)}),
    "other counts, W8A8": ("raise.counts", {"quantisation": "w8a8", "second_groups": lambda counts: counts.flip(0)}),
    "a bound on tokens": ("raise.token_bound", {"dispatch": {"global_bs": 16}, "combine": {"global_bs": 16}}),
    "another bound at combine": ("raise.both_ends", {"combine": {"global_bs": 16}}),
    "another communicator at combine": ("raise.both_ends", {"combine": {"group_ep": "1"}}),
    "no mask at combine": ("raise.both_ends", {"combine": {"x_active_mask": None}}),
    "copy experts at one end": ("raise.both_ends", {"dispatch": {"copy_expert_num": 1}}),
    "copy experts without tokens": (
        "raise.special_experts", {"dispatch": {"copy_expert_num": 1}, "combine": {"copy_expert_num": 1}}
    ),
    "const experts without tensors": (
        "raise.special_experts", {"dispatch": {"const_expert_num": 1}, "combine": {"const_expert_num": 1}}
    ),
    "const experts at one end": ("raise.both_ends", {"dispatch": {"const_expert_num": 1}}),
    "const experts in float32": (
        "raise.special_experts",
        {
            "dispatch": {"const_expert_num": 1},
            "combine": {
                "const_expert_num": 1, "ori_x": torch.ones(6, chains.HIDDEN).bfloat16(),
                **dict.fromkeys(CONSTANTS, torch.ones(1, chains.HIDDEN)),
            },
        },
    ),
    "rows travel back as int8": ("raise.literal", {"combine": {"comm_quant_mode": 2}}),
    "an expert rank": ("raise.experts", {"dispatch": {"shared_expert_rank_num": 1}}),
    "TP within MC2": ("raise.literal", {"dispatch": {"tp_world_size": 2}}),
    "static quantisation": ("raise.literal", {"quantisation": "w8a8", "dequant": {"quant_mode": 0}}),
    "clamps of another function": (
        "raise.activation", {"quantisation": "w8a8", "dequant": {"swiglu_mode": 2, "glu_alpha": 1.5, "glu_bias": 0.0}}
    ),
    "rows changed": ("raise.operation_between", {"rows": lambda rows: rows.neg()}),
    "int4 weights without bias": ("raise.weights", {"quantisation": "w4a8", "scaled": lambda given: {**given, "bias": None}}),
    "relu of quantised activations": ("raise.operation_between", {"quantisation": "w4a8", "between": torch.relu}),
    "another k of the weights": ("raise.weights", {"weights": lambda weights: weights[:, :1]}),
    "counts shifted by one": ("raise.counts", {"counts": lambda counts: counts.roll(1)}),
    "counts shifted by one at the second matmul": ("raise.counts", {"second_groups": lambda counts: counts.roll(1)}),
    "counts shifted by one, W8A8": ("raise.counts", {"quantisation": "w8a8", "second_groups": lambda counts: counts.roll(1)}),
    "tokens in MX": ("raise.format", {"dispatch": {"quant_mode": 4}}),
    "rows in MX": ("raise.format", {"rows": lambda rows: npu().npu_dynamic_mx_quant(rows)[0]}),
    "a custom operator of rows": ("raise.custom", {"rows": lambda rows: torch.ops.custom.clip_quant(rows)}),
    "a custom activation": ("raise.custom", {"between": lambda hidden: torch.ops.custom.clip_quant(hidden)}),
    "a matmul that finalises": ("raise.matmul_finalize", {"quantisation": "w8a8", "rows": matmul_finalize}),
    "clips of 16-bit experts": ("raise.clip", {"between": clip_quant}),
    "clips, the gate second": ("raise.gate_second", {**CLIPPED, "clips": {"activate_left": False}}),
    "clips, in a mode that nobody knows": ("raise.literal", {**CLIPPED, "clips": {"clamp_mode": 0}}),
    "clips, static": ("raise.literal", {**CLIPPED, "clips": {"quant_mode": 0}}),
    "clips of shifted experts": ("raise.counts", {**CLIPPED, "second_groups": lambda counts: counts.roll(1)}),
    "clips in 16 bits": ("raise.clip", {**CLIPPED, "alpha": lambda clip: clip.bfloat16()}),
    "clips of all experts": ("raise.clip", {**CLIPPED, "alpha": lambda clip: clip.repeat(2)}),
    "clips, relu before": ("raise.clip", {**CLIPPED, "between": torch.relu}),
    "custom clamps": ("raise.clamp_quant", {"quantisation": "w8a8", "between": clamp_quant}),
    "a custom operator of results": ("raise.custom", {"out": lambda out: torch.ops.custom.clip_quant(out)}),
    "smooth scales of nothing": ("raise.smooth_scales", {"dispatch": {"scales": torch.ones(chains.EXPERTS, chains.HIDDEN)}}),
    "one line of smooth scales": (
        "raise.smooth_scales", {"quantisation": "w8a8", "dispatch": {"scales": torch.ones(1, chains.HIDDEN)}}
    ),
    "smooth scales of this rank's experts": (
        "raise.smooth_scales", {"quantisation": "w8a8", "dispatch": {"scales": torch.ones(chains.EXPERTS // 2, chains.HIDDEN)}}
    ),
    "smooth scales in 16 bits": (
        "raise.smooth_scales",
        {"quantisation": "w8a8", "dispatch": {"scales": torch.ones(chains.EXPERTS, chains.HIDDEN).bfloat16()}},
    ),
    "smooth scales of all experts' activations": (
        "raise.smooth_scales",
        {"quantisation": "w8a8", "dequant": {"quant_scale": torch.ones(chains.EXPERTS, chains.INTERMEDIATE)}},
    ),
}  # fmt: skip


NORM_TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "a residual of one token": ("raise.dtype", {"residual": lambda given: given[:1]}),
    "a residual in float32": ("raise.dtype", {"residual": torch.Tensor.float}),
    "a shared expert, which is weighed or is not": (
        "raise.literal", {"combine": {"shared_expert_x": torch.ones(6, chains.HIDDEN).bfloat16()}}
    ),
    "const experts": ("raise.literal", {"dispatch": {"const_expert_num": 1}, "combine": {"const_expert_num": 1}}),
    "copy experts": ("raise.literal", {"dispatch": {"copy_expert_num": 1}, "combine": {"copy_expert_num": 1}}),
}  # fmt: skip
