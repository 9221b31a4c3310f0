"""npu_fusion_attention_v3, which torch_npu makes of scaled_dot_product_attention on device "npu".

Meaning: torch_npu 2.13.0's documentation of npu_fusion_attention (layout BNSD, no dropout, no position encoding).
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

NAME = "npu_fusion_attention_v3"
WHOLE_MASK, CAUSAL_TOP_LEFT, CAUSAL_BOTTOM_RIGHT = 0, 2, 3  # sparse_mode
STATISTICS = 8  # the row maximum and row sum are stored this many times


def fusion_attention_v3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2**31 - 1,
    next_tockens: int = 2**31 - 1,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    *others: Any,
    **more: Any,
) -> tuple[torch.Tensor, ...]:
    """q [B, N, S, D], k and v [B, N_kv, S_kv, D] -> attention [B, N, S, D], row maximum and row sum [B, N, S, 8], then
    an empty tensor and the state of the random numbers, which nothing uses without dropout.

    True in ``atten_mask`` excludes. float32 inside, rounded once.
    """
    unsupported = [pse, padding_mask, prefix, actual_seq_qlen, actual_seq_kvlen, *others, *more.values()]
    if input_layout != "BNSD" or keep_prob != 1.0 or any(x is not None and x != 0 for x in unsupported):
        _refuse_unsimulated(
            f"layout {input_layout!r}, keep_prob {keep_prob}, or an optional argument", "BNSD without them"
        )
    if sparse_mode not in (WHOLE_MASK, CAUSAL_TOP_LEFT, CAUSAL_BOTTOM_RIGHT):
        _refuse_unsimulated(f"sparse_mode {sparse_mode}", "0, 2, 3")
    if sparse_mode == WHOLE_MASK and min(pre_tockens, next_tockens) < max(query.shape[2], key.shape[2]):
        _refuse_unsimulated(f"a band of {pre_tockens} and {next_tockens} tokens", "the whole mask")
    shared = head_num // key.shape[1]
    keys, values = (t.float().repeat_interleave(shared, 1) for t in (key, value))
    scores = query.float() @ keys.transpose(-1, -2) * scale
    excluded = _attention_mask(atten_mask, sparse_mode, scores.shape[-2], scores.shape[-1])
    if excluded is not None:
        scores = scores.masked_fill(excluded, float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - largest.where(largest.isfinite(), torch.zeros_like(largest)))
    total = weights.sum(-1, keepdim=True)
    out = (weights / total.where(total > 0, torch.ones_like(total))) @ values
    repeated = (*scores.shape[:-1], STATISTICS)
    state = torch.zeros(1, dtype=torch.int64)
    statistics = (largest.expand(repeated).contiguous(), total.expand(repeated).contiguous())
    return out.to(query.dtype), *statistics, torch.empty(0, dtype=query.dtype), state, state.clone()


def _attention_mask(mask: torch.Tensor | None, sparse_mode: int, rows: int, columns: int) -> torch.Tensor | None:
    if sparse_mode == WHOLE_MASK:
        return None if mask is None else mask.bool()
    diagonal = 1 if sparse_mode == CAUSAL_TOP_LEFT else columns - rows + 1
    return torch.ones(rows, columns, dtype=torch.bool).triu(diagonal)


def _refuse_unsimulated(actual: str, accepted: str) -> NoReturn:
    raise ValueError(f"{NAME}: {actual}; the CPU kernel computes only: {accepted}")
