"""Numbers of quantised tensors by arithmetic of their own: no code of the package, so that its code can be compared with it."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor


def snr(actual: Tensor, expected: Tensor) -> float:
    """Signal-to-noise ratio in dB: of equal tensors infinite, minus infinity when a value is not finite or shapes differ."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return -math.inf
    noise = float((actual.double() - expected.double()).square().sum())
    signal = float(expected.double().square().sum())
    return math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def pack_int4(whole: Tensor) -> Tensor:
    """Whole numbers [..., N] in [-8, 7] as int32 [..., N / 8]: eight in two's complement, the first in the lowest bits."""
    digits = whole.long().remainder(16).unflatten(-1, (-1, 8))
    word = sum(digits[..., place] * 16**place for place in range(8))
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def scale_bits(scale: Tensor) -> Tensor:
    """float32 as int64 with its bits in the low half, and nothing in the high one."""
    words = [struct.unpack("<I", struct.pack("<f", value))[0] for value in scale.flatten().tolist()]
    return torch.tensor(words, dtype=torch.int64).reshape(scale.shape)
