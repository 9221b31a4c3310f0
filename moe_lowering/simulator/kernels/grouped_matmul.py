"""npu_grouped_matmul (unquantised, groups along M, one output), npu_swiglu, npu_clipped_swiglu.

Meaning: torch_npu 2.13.0's documentation, aclnnGroupedMatmulV4/V5.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from moe_lowering.simulator.kernels.common import Kernel, not_simulated, refuse, undefined

GMM = "npu_grouped_matmul"
BY_ROWS = 0  # group_type
CUMSUM = 0  # group_list_type; 1 is counts
# Values of the int argument output_dtype of torch_npu's default overload (torch's own ScalarType numbers).
OUTPUT_DTYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}


def _group_ends(group_list: torch.Tensor, kind: int, rows: int) -> list[int]:
    """The end of each group among the rows, from prefix sums or counts.

    Raises:
        ValueError: when a value is negative, prefix sums decrease, or the groups need more rows than there are.
    """
    values = group_list.tolist()
    if any(v < 0 for v in values):
        refuse(GMM, "group_list", values, "no negative value")
    ends: list[int] = values if kind == CUMSUM else group_list.cumsum(0).tolist()
    if any(b < a for a, b in itertools.pairwise(ends)):
        refuse(GMM, "group_list", values, "prefix sums that never decrease (group_list_type 0)")
    if ends and ends[-1] > rows:
        refuse(GMM, "group_list", f"{values}, {ends[-1]} rows in all,", f"at most the {rows} rows of x")
    return ends


def _check_simulated(a: dict[str, Any], x: list[torch.Tensor], group_type: int) -> None:
    """Refuse the documented forms that no lowering here emits."""
    if group_type != BY_ROWS:
        not_simulated(GMM, "group_type", group_type, "0 (groups along M)")
    if len(x) != 1:
        not_simulated(GMM, "x", f"a list of {len(x)} tensors", "a list of one tensor")
    given = [n for n in ("scale", "offset", "antiquant_scale", "antiquant_offset", "per_token_scale") if a[n]]
    if given or not x[0].is_floating_point():
        not_simulated(GMM, "quantisation", f"{x[0].dtype} with {given}", "float32, float16 or bfloat16 without scales")
    if a["output_dtype"] not in (None, OUTPUT_DTYPES[x[0].dtype]):
        not_simulated(GMM, "output_dtype", a["output_dtype"], f"None, {OUTPUT_DTYPES[x[0].dtype]} (as x)")
    for argument in ("x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype"):
        if a[argument] is not None:
            not_simulated(GMM, argument, a[argument], "None")


def grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    bias: list[torch.Tensor] | None,
    group_list: torch.Tensor,
    group_type: int,
    group_list_type: int,
    **others: Any,
) -> list[torch.Tensor]:
    """x [[M, K]], weight [[E, K, N]] or E of [K, N], group_list [E] int64 -> [[M, N]].

    Group e of the rows of x is multiplied by weight e, plus bias e; float32 accumulation, rounded once. Rows past the
    last group are left untouched by the operator, so they are undefined.
    """
    _check_simulated(others, x, group_type)
    rows = x[0]
    weights = list(weight[0]) if weight[0].dim() == 3 else weight
    biases = None
    if bias:
        biases = list(bias[0]) if weight[0].dim() == 3 else bias
    y = undefined((rows.shape[0], weights[0].shape[1]), rows.dtype)
    begin = 0
    for expert, end in enumerate(_group_ends(group_list, group_list_type, rows.shape[0])):
        if end > begin:
            part = rows[begin:end].float() @ weights[expert].float()
            y[begin:end] = (part if biases is None else part + biases[expert].float()).to(y.dtype)
        begin = end
    return [y]


def swiglu(input: torch.Tensor, dim: int, **_: Any) -> torch.Tensor:
    """silu(first half) * second half along ``dim``; float32 inside, rounded once."""
    gate, up = input.float().chunk(2, dim)
    return (gate * torch.sigmoid(gate) * up).to(input.dtype)


def clipped_swiglu(
    x: torch.Tensor,
    group_index: torch.Tensor | None,
    dim: int,
    alpha: float,
    limit: float,
    bias: float,
    interleaved: bool,
    **_: Any,
) -> torch.Tensor:
    """A * sigmoid(alpha * A) * (B + bias), A clamped from above and B to +-limit; float32 inside, rounded once.

    x is seen as [axes before dim, rest]; A and B are the halves of the rest, or its even and odd columns. Rows past
    sum(group_index) are undefined.
    """
    dim %= x.dim()
    shape = [*x.shape[:dim], x.shape[dim] // 2, *x.shape[dim + 1 :]]
    flat = x.reshape(math.prod(x.shape[:dim]), -1).float()
    used = flat.shape[0] if group_index is None else int(group_index.sum())
    if not 0 <= used <= flat.shape[0]:
        refuse("npu_clipped_swiglu", "sum(group_index)", used, f"0 to {flat.shape[0]}, the rows of x")
    half = flat.shape[1] // 2
    gate, up = (flat[:used, ::2], flat[:used, 1::2]) if interleaved else (flat[:used, :half], flat[:used, half:])
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = undefined((flat.shape[0], half), x.dtype)
    y[:used] = (gate * torch.sigmoid(alpha * gate) * (up + bias)).to(x.dtype)
    return y.reshape(shape)


KERNELS: dict[str, Kernel] = {
    GMM: grouped_matmul,
    "npu_swiglu": swiglu,
    "npu_clipped_swiglu": clipped_swiglu,
}
