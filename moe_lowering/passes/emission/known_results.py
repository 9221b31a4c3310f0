"""``known_result``: the fake values of a few operators, made from their arguments without running the operator.

With symbolic sizes an operator's fake kernel takes 0.5 to 7 ms (sizes, strides and storage are compared and multiplied
as expressions, and every broadcast asks for a proof); a value made here takes 0.1 to 0.2 ms. Only results on contiguous
tensors whose first size alone is symbolic are described, and the two operators on what AllToAll brings home ([ranks, T, H]);
for all others, and static ones, the operator is asked. A test compares each entry with the operator, and strict mode runs
the whole graph once more (``verifier.repropagate``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.operands import row_major

aten = torch.ops.aten
Sizes = tuple[Any, ...]
# From the first argument, the other ones and those by name: shape and dtype, None where nothing is known.
Rule = Callable[[torch.Tensor, tuple[Any, ...], Mapping[str, Any]], tuple[Sizes, torch.dtype] | None]


def known_result(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], fake_mode: FakeTensorMode
) -> FakeTensor | None:
    """The value of a call, in a storage of its own but for views; None where the operator has to be asked."""
    rule = RULES.get(target)
    if rule is None or not args or not isinstance(args[0], FakeTensor):
        return None
    if target is aten.reshape.default:
        return None if kwargs else _reshaped(*args, fake_mode=fake_mode)
    if target is aten.sum.dim_IntList and len(args) == 2 and not kwargs:
        described = _sum_of_ranks(*args)
    else:
        described = rule(args[0], args[1:], kwargs) if _is_rows(args[0]) else None
    return None if described is None else _fresh(*described, args[0].fake_device, fake_mode)


def _is_rows(value: FakeTensor) -> bool:
    """Whether it is contiguous, with a first size that is symbolic and others that are not."""
    inner = value.shape[1:]
    if value.dim() == 0 or isinstance(value.shape[0], int) or not all(isinstance(n, int) and n > 0 for n in inner):
        return False
    return tuple(value.stride()) == _strides(tuple(inner))


def _strides(inner: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor, from all of its sizes but the first."""
    return row_major((1, *inner))


def _fresh(shape: Sizes, dtype: torch.dtype, device: torch.device, fake_mode: FakeTensorMode) -> FakeTensor:
    inner = tuple(int(n) for n in shape[1:])
    guard = torch._C._DisableTorchDispatch()
    try:
        base = torch.empty(0, dtype=dtype, device="meta")
        torch.ops.inductor.resize_storage_bytes_.default(base, shape[0] * (math.prod(inner) * dtype.itemsize))
        meta = base.as_strided(shape, _strides(inner))
    finally:
        del guard
    return FakeTensor(fake_mode, meta, device)


def _reshaped(x: FakeTensor, sizes: Sequence[Any], *, fake_mode: FakeTensorMode) -> FakeTensor | None:
    """Of rows all elements in one line, and of a line what has as many: [n, T, m] with numbers n and m. A view."""
    if not _is_rows(x):
        return None
    if [*sizes] == [-1] and x.dim() > 1:
        shape, strides = [x.numel()], [1]
    elif x.dim() == 1 and _is_layers(sizes) and size_key(math.prod(sizes)) == size_key(x.shape[0]):
        shape, strides = [*sizes], _layer_strides(sizes)
    else:
        return None
    with in_kernel_invocation_manager(x.fake_mode):
        meta = torch.as_strided(x, shape, strides, x.storage_offset())
    return FakeTensor(fake_mode, meta, x.fake_device)


def _sum_of_ranks(x: FakeTensor, axes: Sequence[int]) -> tuple[Sizes, torch.dtype] | None:
    """The sum over the first axis of [n, T, m] with numbers n and m."""
    if [*axes] != [0] or not x.dtype.is_floating_point or not _is_layers(x.shape):
        return None
    if [*map(size_key, x.stride())] != [*map(size_key, _layer_strides(x.shape))]:
        return None
    return (tuple(x.shape[1:]), x.dtype)


def _is_layers(sizes: Sequence[Any]) -> bool:
    """Whether the second of three sizes is symbolic, and the others are numbers of something."""
    is_number = [isinstance(n, int) and n > 0 for n in sizes]
    return is_number == [True, False, True] and isinstance(sizes[1], torch.SymInt)


def _layer_strides(sizes: Sequence[Any]) -> list[Any]:
    return [sizes[1] * sizes[2], sizes[2], 1]


def _same(x: torch.Tensor, rest: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Sizes, torch.dtype] | None:
    return (tuple(x.shape), x.dtype)


def _cast(x: torch.Tensor, rest: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Sizes, torch.dtype] | None:
    return (tuple(x.shape), named["dtype"]) if named.keys() == {"dtype"} and not rest else None


def _with_other(x: torch.Tensor, rest: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Sizes, torch.dtype] | None:
    """Arithmetic with a number that keeps the dtype, or with a tensor of it that has as many rows, or one column."""
    if len(rest) != 1 or named or x.dtype == torch.bool:  # a bool and a number are an integer
        return None
    other = rest[0]
    if isinstance(other, (int, torch.SymInt)) and not isinstance(other, bool):
        return _same(x, rest, named)
    if isinstance(other, float):
        return _same(x, rest, named) if x.dtype.is_floating_point else None
    if not isinstance(other, torch.Tensor) or other.dtype != x.dtype or other.dim() != x.dim():
        return None
    fits = size_key(other.shape[0]) == size_key(x.shape[0]) and all(
        isinstance(n, int) and n in (1, own) for n, own in zip(other.shape[1:], x.shape[1:], strict=True)
    )
    return _same(x, rest, named) if fits else None


def _divided(x: torch.Tensor, rest: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Sizes, torch.dtype] | None:
    return _with_other(x, rest, named) if x.dtype.is_floating_point else None


def _remainder(x: torch.Tensor, rest: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Sizes, torch.dtype] | None:
    return None if rest and isinstance(rest[0], torch.Tensor) else _with_other(x, rest, named)


def _sum_of_columns(
    x: torch.Tensor, rest: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Sizes, torch.dtype] | None:
    """The sum over the last axis, which stays with size 1."""
    if x.dim() < 2 or named or len(rest) != 2 or list(rest[0]) != [-1] or rest[1] is not True:
        return None
    return ((*x.shape[:-1], 1), x.dtype) if x.dtype.is_floating_point else None


RULES: Mapping[Any, Rule] = {
    aten._to_copy.default: _cast,
    aten.add.Tensor: _with_other,
    aten.mul.Tensor: _with_other,
    aten.div.Tensor: _divided,
    aten.remainder.Scalar: _remainder,
    aten.reshape.default: lambda x, rest, named: None,  # a view: ``known_result`` makes it itself
    aten.sigmoid.default: lambda x, rest, named: _same(x, rest, named) if x.dtype.is_floating_point else None,
    aten.sum.dim_IntList: _sum_of_columns,
    torch.ops._c10d_functional.wait_tensor.default: _same,
}
