"""What the tests of the CPU kernels of ``npu::`` operators share."""

from __future__ import annotations

from typing import Any

import torch


def like_meta(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The CPU result, after its shapes and dtypes were found equal to those of torch_npu's meta function."""
    meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
    expected = torch.utils._pytree.tree_leaves(op(*meta[0], **meta[1]))
    result = op(*args, **kwargs)
    got = torch.utils._pytree.tree_leaves(result)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]
    return result


def pack(values: torch.Tensor) -> torch.Tensor:
    """Integers in [-8, 7], [..., n] -> int32 [..., n / 8]: eight in two's complement, the first in the lowest bits."""
    digits = (values.long() % 16).reshape(*values.shape[:-1], -1, 8)
    numbers = sum(digits[..., i] * 16**i for i in range(8))
    return torch.where(numbers >= 2**31, numbers - 2**32, numbers).to(torch.int32)


def bits(scale: torch.Tensor) -> torch.Tensor:
    """float32 -> int64 that holds its bits in the lower half."""
    return torch.tensor(scale.numpy().view("uint32").astype("int64"))


def decibels(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal-to-noise ratio of ``got`` against ``wanted`` (float64)."""
    noise = (got.double() - expected).square().sum()
    return float(10 * torch.log10(expected.square().sum() / noise)) if noise else float("inf")


def assert_quantised(values: torch.Tensor, scale: torch.Tensor, expected: torch.Tensor) -> None:
    """int8 [m, n] and float32 [m] are ``wanted`` [m, n] (float64) rounded per row, with max|row| / 127 as scale.

    A value that lies within 1e-3 of the middle of two integers may go either way: the kernel computes in float32.
    """
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    largest = expected.abs().amax(-1)
    torch.testing.assert_close(scale.double(), largest / 127, rtol=2e-5, atol=0)
    exact = expected / (largest / 127).unsqueeze(-1)
    assert ((values - exact).abs() <= 0.5 + 1e-3).all()
    assert (values.abs().amax(-1) == 127).all()
