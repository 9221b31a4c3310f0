"""CPU kernels of npu_kv_rmsnorm_rope_cache and npu_transpose_batchmatmul, which MLA (DeepSeek's attention) needs.

Meaning: torch_npu 2.13.0's documentation, aclnnKvRmsNormRopeCache, aclnnTransposeBatchMatMul. Only the form that vllm-ascend
calls: one key head, a paged cache, no quantisation. float32 inside, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_lowering.simulator.kernels.common import Kernel, make_undefined, refuse, refuse_unsimulated
from moe_lowering.simulator.kernels.norm import normalise_rows
from moe_lowering.simulator.kernels.rotary import interleave_rope

KV_CACHE, TRANSPOSE_MATMUL = "npu_kv_rmsnorm_rope_cache", "npu_transpose_batchmatmul"
PAGED = "PA"
SCALES = ("k_rope_scale", "c_kv_scale", "k_rope_offset", "c_kv_offset", "v")


def kv_rmsnorm_rope_cache(
    kv: torch.Tensor,
    gamma: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor,
    k_cache: torch.Tensor,
    ckv_cache: torch.Tensor,
    epsilon: float,
    cache_mode: str,
    is_output_kv: bool,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """kv [B, 1, 1, L + R], gamma [L], cos and sin [B, 1, 1, R] -> the caches, k_rope [B, 1, 1, R], c_kv [B, 1, 1, L].

    c_kv is the norm of the first L numbers; k_rope is the rest, rotated as ``npu_interleave_rope`` does (neighbours are pairs).
    Token i is written at slot ``index[i]`` of caches [blocks, block size, 1, R] and [..., L]; at a negative slot it is not.
    Without ``is_output_kv`` the last two results are undefined.
    """
    given = [name for name in SCALES if others.get(name) is not None]
    if given:
        refuse_unsimulated(KV_CACHE, ", ".join(given), "given", "None")
    if cache_mode != PAGED:
        refuse_unsimulated(KV_CACHE, "cache_mode", repr(cache_mode), repr(PAGED))
    latent, rope = len(gamma), cos.shape[-1]
    if kv.dim() != 4 or kv.shape[1:] != (1, 1, latent + rope):
        refuse(KV_CACHE, "kv", f"{list(kv.shape)}", f"[tokens, 1, 1, {latent} + {rope}], widths of gamma and cos")
    slots, total = index.flatten().long(), k_cache.shape[0] * k_cache.shape[1]
    highest = int(slots.max()) if len(slots) else -1
    if len(slots) != len(kv) or highest >= total:
        refuse(KV_CACHE, "index", f"{len(slots)} up to {highest}", f"{len(kv)} below {total}")
    normed, _ = normalise_rows(KV_CACHE, kv[..., :latent], gamma, epsilon)
    turned = interleave_rope(kv[..., latent:], cos, sin)
    stored = slots >= 0
    for cache, rows in ((k_cache, turned), (ckv_cache, normed)):
        flat = rows.reshape(len(kv), -1)[stored].to(cache.dtype)
        cache.view(total, -1)[slots[stored]] = flat
    if is_output_kv:
        return k_cache, ckv_cache, turned, normed
    return k_cache, ckv_cache, make_undefined(turned.shape, kv.dtype), make_undefined(normed.shape, kv.dtype)


def transpose_batchmatmul(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    perm_x1: list[int] | None,
    perm_x2: list[int] | None,
    perm_y: list[int] | None,
    batch_split_factor: int | None,
) -> torch.Tensor:
    """permute(x1) [B, M, K] @ permute(x2) [B, K, N], permuted by ``perm_y``, a new tensor."""
    if bias is not None or scale is not None or batch_split_factor not in (None, 1):
        refuse_unsimulated(TRANSPOSE_MATMUL, "bias, scale or batch_split_factor", "given", "None, None, 1")
    first, second = input.permute(*(perm_x1 or (0, 1, 2))), weight.permute(*(perm_x2 or (0, 1, 2)))
    if first.shape[0] != second.shape[0] or first.shape[2] != second.shape[1]:
        refuse(
            TRANSPOSE_MATMUL,
            "weight",
            f"{list(second.shape)} after perm_x2",
            f"[{first.shape[0]}, {first.shape[2]}, N]",
        )
    product = torch.bmm(first.float(), second.float()).to(input.dtype)
    return product.permute(*(perm_y or (0, 1, 2))).contiguous()


KERNELS: dict[str, Kernel] = {KV_CACHE: kv_rmsnorm_rope_cache, TRANSPOSE_MATMUL: transpose_batchmatmul}
