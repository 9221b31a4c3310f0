"""npu_grouped_matmul (groups along M, one output), npu_swiglu, npu_clipped_swiglu.

Meaning: torch_npu 2.13.0's documentation, aclnnGroupedMatmulV4/V5.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from moe_lowering.simulator.kernels.common import Kernel, make_undefined, refuse, refuse_unsimulated
from moe_lowering.simulator.kernels.quantised_matmul import operands, output_dtype, product

GMM = "npu_grouped_matmul"
BY_ROWS = 0  # group_type
CUMSUM, COUNTS, PAIRS = 0, 1, 2  # group_list_type


def group_bounds(
    operator: str, argument: str, groups: torch.Tensor, kind: int, rows: int
) -> list[tuple[int, int, int]]:
    """(expert, begin, end) of each group among the rows, from prefix sums [E], counts [E] or pairs (expert, count) [E, 2].

    Pairs end with the first that has no rows: npu_moe_init_routing_v2 leaves undefined what stands after it.

    Raises:
        ValueError: when a value is negative, prefix sums decrease, the groups need more rows than there are, or a pair
            names an expert twice, or one that does not exist, while its count is not 0.
    """
    values = groups.tolist()
    experts = list(range(len(values)))
    if kind == PAIRS:
        experts = [int(e) for e, _ in itertools.takewhile(lambda pair: pair[1], values)]
        if len(set(experts)) < len(experts) or any(not 0 <= e < len(values) for e in experts):
            refuse(operator, argument, values, f"pairs (expert, rows), each of the experts 0 to {len(values) - 1} once")
        groups = groups[:, 1]
        if any(n not in (0, torch.iinfo(groups.dtype).min) for n in groups[len(experts) :].tolist()):
            refuse(operator, argument, values, "pairs (expert, rows), those with rows first")
        groups = groups[: len(experts)]
    if bool((groups < 0).any()):
        refuse(operator, argument, values, "no negative value")
    ends: list[int] = groups.tolist() if kind == CUMSUM else groups.cumsum(0).tolist()
    if any(b < a for a, b in itertools.pairwise(ends)):
        refuse(operator, argument, values, "prefix sums that never decrease (group_list_type 0)")
    if ends and ends[-1] > rows:
        refuse(operator, argument, f"{values}, {ends[-1]} rows in all,", f"at most the {rows} rows of x")
    return list(zip(experts, [0, *ends[:-1]], ends, strict=True))


def _check_simulated(a: dict[str, Any], x: list[torch.Tensor], group_type: int) -> None:
    """Refuse the documented forms that no lowering here emits."""
    if group_type != BY_ROWS:
        refuse_unsimulated(GMM, "group_type", group_type, "0 (groups along M)")
    if len(x) != 1:
        refuse_unsimulated(GMM, "x", f"a list of {len(x)} tensors", "a list of one tensor")
    for argument in ("x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype"):
        if a[argument] is not None:
            refuse_unsimulated(GMM, argument, a[argument], "None")


def grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    group_list: torch.Tensor,
    group_type: int,
    group_list_type: int,
    **others: Any,
) -> list[torch.Tensor]:
    """x [[M, K]], weight [[E, K, N]] or E of [K, N], group_list [E] int64 -> [[M, N]].

    Group e of the rows of x is multiplied by weight e, plus bias e; float32 accumulation, rounded once. Quantised weights
    and their scales: see ``quantised_matmul``. Rows past the last group are left untouched by the operator, so they are
    undefined.
    """
    _check_simulated(others, x, group_type)
    rows = x[0]
    tensors = operands(GMM, {"x": x, "weight": weight, **others})
    dtype = output_dtype(GMM, tensors, rows, others["output_dtype"], others["act_type"])
    y = make_undefined((rows.shape[0], tensors.width), dtype)
    for expert, begin, end in group_bounds(GMM, "group_list", group_list, group_list_type, rows.shape[0]):
        if end > begin:
            y[begin:end] = product(GMM, tensors, rows, expert, begin, end).to(dtype)
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
    flat = x.reshape(math.prod(x.shape[:dim]), math.prod(x.shape[dim:])).float()
    used = flat.shape[0] if group_index is None else int(group_index.sum())
    if not 0 <= used <= flat.shape[0]:
        refuse("npu_clipped_swiglu", "sum(group_index)", used, f"0 to {flat.shape[0]}, the rows of x")
    half = flat.shape[1] // 2
    gate, up = (flat[:used, ::2], flat[:used, 1::2]) if interleaved else (flat[:used, :half], flat[:used, half:])
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = make_undefined((flat.shape[0], half), x.dtype)
    y[:used] = (gate * torch.sigmoid(alpha * gate) * (up + bias)).to(x.dtype)
    return y.reshape(shape)


KERNELS: dict[str, Kernel] = {
    GMM: grouped_matmul,
    "npu_swiglu": swiglu,
    "npu_clipped_swiglu": clipped_swiglu,
}
