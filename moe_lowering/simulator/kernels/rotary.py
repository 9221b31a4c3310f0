"""CPU kernels of torch_npu's rotary positions: npu_rotary_mul, npu_interleave_rope, npu_apply_rotary_pos_emb.

Meaning: torch_npu 2.13.0's documentation, aclnnRotaryPositionEmbedding, aclnnInterleaveRope, aclnnApplyRotaryPosEmbV2.
float32 inside, rounded once.
"""

from __future__ import annotations

import torch

from moe_lowering.simulator.kernels.common import Kernel, refuse_unsimulated

ROTARY_MUL, INTERLEAVE_ROPE, APPLY = "npu_rotary_mul", "npu_interleave_rope", "npu_apply_rotary_pos_emb"
HALF, INTERLEAVE = "half", "interleave"


def turn_halves(x: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a), with a and b the halves of the last axis."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def turn_pairs(x: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a) for each pair of neighbours in the last axis."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


TURNS = {HALF: turn_halves, INTERLEAVE: turn_pairs}


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> torch.Tensor:
    """x * cos + turn(x) * sin, of x's dtype; cos and sin are broadcast."""
    wide = x.float()
    return (wide * cos.float() + TURNS[mode](wide) * sin.float()).to(x.dtype)


def rotary_mul(
    input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str, rotate: torch.Tensor | None
) -> torch.Tensor:
    """x [B, N, S, D] (or another order), cos and sin that broadcast to it -> like x."""
    if rotary_mode not in TURNS or rotate is not None:
        refuse_unsimulated(ROTARY_MUL, "rotary_mode", repr(rotary_mode), f"{', '.join(TURNS)}, without rotate")
    return _rotate(input, r1, r2, rotary_mode)


def interleave_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, N, S, D] whose neighbours are pairs -> the pairs taken apart into halves, then rotated as halves."""
    apart = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
    return rotate(apart, cos, sin, HALF)


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str, rotary_mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """query and key [B, S, N, D], cos and sin [B, S, 1, D] -> both rotated."""
    if layout not in ("BSND", "1", "TND") or rotary_mode not in TURNS:
        refuse_unsimulated(
            APPLY, "layout and rotary_mode", f"{layout!r}, {rotary_mode!r}", f"BSND or TND, {', '.join(TURNS)}"
        )
    return rotate(query, cos, sin, rotary_mode), rotate(key, cos, sin, rotary_mode)


_rotate = rotate  # an argument of npu_rotary_mul has its name
KERNELS: dict[str, Kernel] = {ROTARY_MUL: rotary_mul, INTERLEAVE_ROPE: interleave_rope, APPLY: apply_rotary_pos_emb}
