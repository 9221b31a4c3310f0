"""Valid arguments of ``grouped_mlp``, by format of its weights, and mistakes in them (see test_custom_ops_contract.py)."""

from __future__ import annotations

from typing import Any

import torch

MLP: dict[str, Any] = {
    "rows": torch.ones(8, 8),
    "row_scale": torch.empty(0),
    "counts": torch.tensor([1, 1, 1, 1]),
    "w13": [torch.ones(4, 8, 12)],
    "w2": [torch.ones(4, 6, 8)],
    "w13_bias": [],
    "w2_bias": [],
    "activation": "swiglu",
    "limit": 0.0,
    "alpha": 1.0,
    "interleaved": False,
    "quantisation": "none",
    "w13_scale": None,
    "w2_scale": None,
    "w13_offset": None,
    "w2_offset": None,
    "w13_scale_bias": None,
    "w2_scale_bias": None,
    "out_dtype": None,
    "h_smooth": None,
    "h_clip": None,
}
W8A8: dict[str, Any] = {
    "quantisation": "w8a8",
    "w13": [torch.ones(4, 8, 16, dtype=torch.int8)],
    "w2": [torch.ones(4, 8, 8, dtype=torch.int8)],
    "w13_scale": [torch.ones(4, 16)],
    "w2_scale": [torch.ones(4, 8)],
}
W4A8: dict[str, Any] = {
    "quantisation": "w4a8",
    "w13": [torch.ones(4, 8, 2, dtype=torch.int32)],
    "w2": [torch.ones(4, 8, 1, dtype=torch.int32)],
    "w13_scale": [torch.ones(4, 16)],
    "w2_scale": [torch.ones(4, 8)],
    "w13_scale_bias": [torch.ones(4, 16)],
    "w2_scale_bias": [torch.ones(4, 8)],
}
W4A16: dict[str, Any] = {
    "quantisation": "w4a16",
    "w13": W4A8["w13"],
    "w2": W4A8["w2"],
    "w13_scale": [torch.ones(4, 2, 16).half()],
    "w2_scale": [torch.ones(4, 8).half()],
    "w13_offset": [torch.ones(4, 2, 16).half()],
    "w2_offset": [torch.ones(4, 8).half()],
}
INT8_ROWS: dict[str, Any] = W8A8 | {
    "rows": torch.ones(8, 8, dtype=torch.int8),
    "row_scale": torch.ones(8),
    "out_dtype": torch.bfloat16,
}
HALF: dict[str, Any] = MLP | {"rows": torch.ones(8, 8).half()}

# name, valid arguments, what is changed, the error
QUANTISED_MISTAKES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("grouped_mlp", MLP, {"quantisation": "w8"}, "quantisation is 'w8'; accepted: none, w8a8, w4a8, w4a16"),
    ("grouped_mlp", MLP, {"rows": torch.ones(8, 8, dtype=torch.int8)}, "rows is torch.int8 for quantisation 'none'"),
    ("grouped_mlp", MLP, {"out_dtype": torch.bfloat16}, "out_dtype is torch.bfloat16; accepted: None or that of rows"),
    ("grouped_mlp", MLP, {"w13_scale": [torch.ones(4, 12)]}, "w13_scale is given for quantisation 'none'"),
    ("grouped_mlp", MLP | W8A8, {"w13": [torch.ones(4, 8, 16)]}, r"w13 is torch.float32; accepted: torch.int8"),
    ("grouped_mlp", MLP | W8A8, {"w2_scale": None}, r"w2_scale is None for w8a8; accepted: \[4, 8\]"),
    ("grouped_mlp", MLP | W8A8, {"w2_scale": []}, r"w2_scale is None for w8a8; accepted: \[4, 8\]"),
    ("grouped_mlp", MLP | W8A8, {"w13_scale": [torch.ones(4, 8)]}, r"w13_scale has shape \[4, 8\]; .* \[4, 16\]"),
    ("grouped_mlp", MLP | W8A8, {"w13_scale": [torch.ones(16)] * 3}, "w13_scale has 3 tensors; accepted: one tensor"),
    (
        "grouped_mlp",
        MLP | W8A8,
        {"w13_scale": [torch.ones(4, 1, 16)]},
        r"w13_scale has shape \[4, 1, 16\]; accepted: one tensor \[4, 16\], or 4 of \[16\]",
    ),
    ("grouped_mlp", MLP | W8A8, {"w13_scale": [torch.ones(4, 16).half()]}, r"w13_scale is torch.float16"),
    ("grouped_mlp", MLP | W8A8, {"w13_bias": [torch.ones(4, 16)]}, "w13_bias is given for quantisation 'w8a8'"),
    ("grouped_mlp", MLP | W8A8, {"w2_bias": [torch.ones(4, 8)]}, "w2_bias is given for quantisation 'w8a8'"),
    ("grouped_mlp", MLP | W8A8, {"w2_offset": [torch.ones(4, 8)]}, "w2_offset is given for .* since only w4a16 has it"),
    (
        "grouped_mlp",
        MLP | W8A8,
        {"w2_scale_bias": [torch.ones(4, 8)]},
        "w2_scale_bias is given .* since only w4a8 has it",
    ),
    ("grouped_mlp", MLP, {"h_smooth": torch.ones(4, 6)}, "h_smooth is given for quantisation 'none'; .* w8a8, w4a8"),
    ("grouped_mlp", MLP | W8A8, {"h_smooth": torch.ones(4, 16)}, r"h_smooth has shape \[4, 16\]; accepted: \[4, 8\]"),
    ("grouped_mlp", MLP | W8A8, {"h_smooth": torch.ones(4, 8).half()}, "h_smooth is torch.float16; accepted: float32"),
    ("grouped_mlp", MLP, {"h_clip": torch.ones(4)}, "h_clip is given for quantisation 'none'; .* w8a8, w4a8"),
    ("grouped_mlp", MLP | W8A8, {"h_clip": torch.ones(3)}, r"h_clip has shape \[3\]; accepted: \[4\], \[E_local\]"),
    ("grouped_mlp", MLP | W8A8, {"h_clip": torch.ones(4).half()}, "h_clip is torch.float16; accepted: float32"),
    ("grouped_mlp", MLP | INT8_ROWS, {"out_dtype": None}, "out_dtype is None for int8 rows; accepted: float32"),
    ("grouped_mlp", MLP | INT8_ROWS, {"out_dtype": torch.int8}, "out_dtype is torch.int8 for int8 rows"),
    (
        "grouped_mlp",
        MLP | INT8_ROWS,
        {"row_scale": torch.ones(7)},
        r"row_scale is torch.float32 of shape \[7\]; .* \[8\]",
    ),
    ("grouped_mlp", MLP | INT8_ROWS, {"row_scale": torch.ones(8).half()}, "row_scale is torch.float16 of shape"),
    ("grouped_mlp", MLP | INT8_ROWS, W4A16, "rows is torch.int8 for quantisation 'w4a16'; accepted: float16, bfloat16"),
    ("grouped_mlp", MLP | W4A8, {"w13": W8A8["w13"]}, r"w13 is torch.int8; accepted: torch.int32"),
    (
        "grouped_mlp",
        MLP | W4A8,
        {"rows": torch.ones(8, 12)},
        "rows has hidden size 12 for w4a8; accepted: a multiple of 8",
    ),
    ("grouped_mlp", MLP | W4A8, {"w13_scale": [torch.ones(4, 16).bfloat16()]}, r"w13_scale is torch.bfloat16"),
    ("grouped_mlp", MLP | W4A8, {"w2_scale_bias": [torch.ones(4, 4)]}, r"w2_scale_bias has shape \[4, 4\]"),
    ("grouped_mlp", MLP | W4A8, {"w2_scale_bias": [torch.ones(4, 8).half()]}, r"w2_scale_bias is torch.float16"),
    ("grouped_mlp", HALF | W4A16, {"rows": torch.ones(8, 8)}, "rows is torch.float32 for quantisation 'w4a16'"),
    ("grouped_mlp", HALF | W4A16, {"rows": torch.ones(8, 8).bfloat16()}, r"w13_scale is torch.float16"),
    (
        "grouped_mlp",
        HALF | W4A16,
        {"w13_scale": [torch.ones(4, 3, 16).half()]},
        "w13_scale has 3 groups; .* a divisor of 8",
    ),
    (
        "grouped_mlp",
        HALF | W4A16,
        {"w13_offset": [torch.ones(4, 16).half()]},
        r"w13_offset has shape \[4, 16\]; accepted: one tensor \[4, 2, 16\]",
    ),
    ("grouped_mlp", HALF | W4A16, {"w2_offset": [torch.ones(4, 8)]}, r"w2_offset is torch.float32"),
]
