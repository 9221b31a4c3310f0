"""Shapes and dtypes of what some ATen operators give on device meta: for counting, never for a real graph.

torch computes those of these operators in Python, in 0.1 to 0.3 ms each, and imports its compiler for it, which takes
seconds. All others are asked of torch. A test compares what is counted with what real graphs hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten


def _pointwise(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Of tensors that broadcast; numbers beside them change no dtype here."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    dtypes = [value.dtype for value in tensors if value.dim()] or [tensors[0].dtype]
    return _empty(_broadcast(tensors), functools.reduce(torch.promote_types, dtypes))


def _compared(*args: Any) -> torch.Tensor:
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    return _empty(_broadcast(tensors), torch.bool)


def _where(condition: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
    return _empty(_broadcast([condition, *values]), values[0].dtype)


def _broadcast(tensors: list[torch.Tensor]) -> list[int]:
    rank = max(value.dim() for value in tensors)
    shapes = [(1,) * (rank - value.dim()) + tuple(value.shape) for value in tensors]
    return [next((n for n in sizes if n != 1), 1) for sizes in zip(*shapes, strict=True)]


def _sum(x: torch.Tensor, dims: list[int] | None = None) -> torch.Tensor:
    left_out = {dim % x.dim() for dim in dims} if dims is not None else set(range(x.dim()))
    return _empty([n for dim, n in enumerate(x.shape) if dim not in left_out], _summed(x.dtype))


def _cumsum(x: torch.Tensor, dim: int) -> torch.Tensor:
    return _empty(x.shape, _summed(x.dtype))


def _summed(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.int64


def _cat(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(int(value.shape[dim]) for value in tensors)
    return _empty(shape, tensors[0].dtype)


def _arange(first: int, end: int | None = None, *, dtype: torch.dtype, **rest: Any) -> torch.Tensor:
    return _empty([first if end is None else end - first], dtype)


def _empty(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


ATEN_RESULTS: dict[Any, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(
        (
            aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.remainder.Scalar, aten.floor_divide.default,
            aten.bitwise_and.Tensor, aten.clamp.default, aten.silu.default, aten.sigmoid.default, aten.gelu.default,
        ),
        _pointwise,
    ),
    aten.masked_fill.Scalar: lambda x, mask, value: _empty(x.shape, x.dtype),
    **dict.fromkeys((aten.lt.Scalar, aten.ge.Tensor), _compared),
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList), _sum),
    **dict.fromkeys((aten.arange.start, aten.arange.default), _arange),
    aten.where.self: _where,
    aten.cumsum.default: _cumsum,
    aten.cat.default: _cat,
}  # fmt: skip
