"""Generators of device "npu": where a random operator of the device takes its numbers from.

torch_npu's generator is two numbers, a seed and a count of the numbers that were drawn; the kernels that use them run
on a device. Here each call draws from a generator of the CPU that is seeded with both, and raises the count: equal
seeds give equal numbers, a state that is put back gives them again, and two calls differ. They are not the numbers of a
device.
"""

from __future__ import annotations

import hashlib

import torch

DRAWN = 4  # the offset counts in fours: torch_npu refuses others


def to_host_generator(generator: torch.Generator) -> torch.Generator:
    """A generator of the CPU for one call, and the npu generator moved on."""
    state = generator.get_state()
    numbers = state.view(torch.int64)  # seed, offset
    seed = hashlib.sha256(state.numpy().tobytes()).digest()[:8]
    numbers[1] += DRAWN
    generator.set_state(state)
    return torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
