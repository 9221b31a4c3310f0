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
