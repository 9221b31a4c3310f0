"""CPU kernels of operators of ``atb::`` (CANN's transformer boost library) that write their arguments.

They are rotary positions, writes into the paged cache, and a matrix product that is added to a float32 tensor.

Meaning: ATB's documentation of RopeOperation, ReshapeAndCacheOperation and LinearOperation, and op-plugin's wrappers.
torch_npu has no meta kernel for them: a capture records them, and a graph that traces them must bring its own.
"""

from __future__ import annotations

import torch

from moe_lowering.simulator.kernels.common import Kernel, refuse
from moe_lowering.simulator.kernels.rotary import HALF, INTERLEAVE, rotate

ROTARY, RESHAPE_AND_CACHE, MATMUL_ADD = "_npu_rotary_embedding", "_npu_reshape_and_cache", "_npu_matmul_add_fp32"


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox_style: bool,
) -> None:
    """Rotate query and key [T, N * D] in place; positions [T], cos_sin_cache [positions, rotary width]: cosines, then sines.

    The rotary width may be smaller than D: what lies behind it in each head stays. Neox style rotates halves, the other
    neighbours.
    """
    if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= len(cos_sin_cache)):
        refuse(
            ROTARY, "positions", f"{int(positions.min())} to {int(positions.max())}", f"0 to {len(cos_sin_cache) - 1}"
        )
    width = cos_sin_cache.shape[-1]
    cos, sin = cos_sin_cache[positions.flatten().long()].chunk(2, dim=-1)
    cos, sin = ((t.repeat(1, 2) if is_neox_style else t.repeat_interleave(2, dim=-1)).unsqueeze(1) for t in (cos, sin))
    for rows in (query, key):
        if rows.shape[-1] % head_size or width > head_size or rows.numel() != rows.shape[-1] * positions.numel():
            refuse(ROTARY, "query or key", list(rows.shape), f"[{positions.numel()}, heads * {head_size}]")
        heads = rows.reshape(positions.numel(), -1, head_size)
        turned = rotate(heads[..., :width], cos, sin, HALF if is_neox_style else INTERLEAVE)
        rows.copy_(torch.cat([turned, heads[..., width:]], dim=-1).reshape(rows.shape))


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_indices: torch.Tensor,
) -> None:
    """Store key and value [T, N, D] in caches [blocks, block size, N, D], token i at slot ``slot_indices[i]`` int32; a negative
    slot stores nothing."""
    slots = slot_indices.long()
    total = key_cache.shape[0] * key_cache.shape[1]
    if len(slots) > len(key) or (len(slots) and int(slots.max()) >= total):
        refuse(RESHAPE_AND_CACHE, "slot_indices", f"{len(slots)} up to {int(slots.max())}", f"{len(key)} below {total}")
    stored = slots >= 0
    for rows, cache in ((key, key_cache), (value, value_cache)):
        flat = cache.view(-1, *cache.shape[2:])
        flat[slots[stored]] = rows[: len(slots)][stored].reshape(-1, *cache.shape[2:]).to(cache.dtype)


def matmul_add(x: torch.Tensor, weight: torch.Tensor, C: torch.Tensor) -> None:
    """C [M, N] float32 += x [K, M] transposed times weight [K, N]."""
    if C.dtype != torch.float32 or x.dim() != 2 or weight.dim() != 2 or C.shape != (x.shape[1], weight.shape[1]):
        refuse(MATMUL_ADD, "C", f"{C.dtype} {list(C.shape)}", "float32 [x.size(1), weight.size(1)]")
    C.add_(x.float().t() @ weight.float())


KERNELS: dict[str, Kernel] = {ROTARY: rotary_embedding, RESHAPE_AND_CACHE: reshape_and_cache, MATMUL_ADD: matmul_add}
