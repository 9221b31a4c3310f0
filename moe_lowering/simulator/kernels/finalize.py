"""npu_moe_finalize_routing: the rows of the experts, weighed and summed for each token.

Meaning: op-plugin's documentation (its Python text included) and aclnnMoeFinalizeRoutingV2.
"""

from __future__ import annotations

import torch

from moe_lowering.simulator.kernels.common import Kernel, refuse

FINALIZE = "npu_moe_finalize_routing"
BY_COLUMN_DROP, BY_ROW, BY_ROW_DROP = 1, 2, 3  # drop_pad_mode; 0 is by column, without drop
DROPPED = -1  # in the index: the slot has no row, in the two modes that drop


def _check_shape(argument: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        refuse(FINALIZE, argument, tuple(tensor.shape), str(shape))


def _check_values(argument: str, values: torch.Tensor, least: int, count: int) -> None:
    if values.numel() and (int(values.min()) < least or int(values.max()) >= count):
        refuse(FINALIZE, argument, f"{int(values.min())} to {int(values.max())}", f"{least} to {count - 1}")


def finalize_routing(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int | None,
    k: int | None,
) -> torch.Tensor:
    """rows [T*k, H], or [E, C, H] in modes 1 and 3; index [T*k] int32; scales [T, k]; skips [T, H]; bias [E, H] -> [T, H].

    y[t] = skip1[t] + skip2[t] + the sum over k of scales[t, k] * (rows[index of (t, k)] + bias[expert of (t, k)]). The index
    of (t, k) is at k * T + t in modes 0 and 1 (by column, as npu_moe_init_routing has it), at t * top_k + k in modes 2 and 3 (by
    row). Where a mode that drops has -1, the row is zero; its bias counts all the same. Without scales they are 1.
    Accumulates in float32, k ascending, and rounds once.
    """
    mode, index = drop_pad_mode or 0, expanded_src_to_dst_row.long()
    top_k = scales.shape[1] if scales is not None else 1 if k is None else k
    if len(index) % top_k:  # the meta function rounds down
        refuse(FINALIZE, "expanded_src_to_dst_row", f"{len(index)} long", f"a multiple of k = {top_k}")
    tokens, hidden = len(index) // top_k, expanded_permuted_rows.shape[-1]
    rows = expanded_permuted_rows.reshape(-1, hidden)
    _check_values("expanded_src_to_dst_row", index, DROPPED if mode in (BY_COLUMN_DROP, BY_ROW_DROP) else 0, len(rows))
    for argument, skip in (("skip1", skip1), ("skip2", skip2)):
        _check_shape(argument, skip, (tokens, hidden))
    index = index.reshape(tokens, top_k) if mode in (BY_ROW, BY_ROW_DROP) else index.reshape(top_k, tokens).t()
    total = torch.zeros(tokens, hidden)
    for skip in (skip1, skip2):
        total += 0 if skip is None else skip.float()
    added = None
    if bias is not None and export_for_source_row is not None:  # the limit tables want both
        _check_shape("bias", bias, (len(bias), hidden))
        _check_shape("export_for_source_row", export_for_source_row, (tokens, top_k))
        _check_values("export_for_source_row", export_for_source_row, 0, len(bias))
        added = bias.float()[export_for_source_row.long()]
    for choice in range(top_k):
        place = index[:, choice]
        part = torch.where((place == DROPPED).unsqueeze(1), 0.0, rows[place.clamp(min=0)].float())
        part = part if added is None else part + added[:, choice]
        total += part if scales is None else part * scales[:, choice : choice + 1].float()
    return total.to(expanded_permuted_rows.dtype)


KERNELS: dict[str, Kernel] = {FINALIZE: finalize_routing}
