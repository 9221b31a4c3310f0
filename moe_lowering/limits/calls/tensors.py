"""What the readers of calls take from tensors: shapes, strides and dtypes only, and no guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

Arguments = Mapping[str, Any]
Reader = Callable[[Arguments], dict[str, Any]]


def dtype(tensor: Any) -> str | None:
    """``"bfloat16"`` for torch.bfloat16; None for no tensor."""
    return None if tensor is None else str(tensor.dtype).removeprefix("torch.")


def dims(tensor: Any) -> int | None:
    """The number of axes; None for no tensor."""
    return None if tensor is None else len(tensor.shape)


def size(tensor: Any, axis: int) -> Any:
    """The size of one axis; None when there is no tensor or no such axis."""
    if tensor is None or not -len(tensor.shape) <= axis < len(tensor.shape):
        return None
    return tensor.shape[axis]


def product(sizes: Sequence[Any]) -> Any:
    """The product of sizes that may be symbolic; None when one is not known."""
    total: Any = 1
    for n in sizes:
        if n is None:
            return None
        total = total * n
    return total


def total(sizes: Sequence[Any]) -> Any:
    """The sum of sizes that may be symbolic."""
    result: Any = 0
    for n in sizes:
        result = result + n
    return result


def first(tensors: Any) -> Any:
    """The first tensor of a list; None when there is none."""
    return tensors[0] if tensors else None


def contiguous(tensor: Any) -> bool | None:
    """Whether the tensor is contiguous; None when a symbolic size keeps that from being known without a guard."""
    if any(isinstance(n, torch.SymInt) and n.node.maybe_as_int() is None for n in (*tensor.shape, *tensor.stride())):
        return None
    return bool(tensor.is_contiguous())


def all_contiguous(tensors: Sequence[Any]) -> bool | None:
    """Whether all tensors are contiguous; None when none is known not to be, and some are not known to be."""
    states = [contiguous(tensor) for tensor in _different(tensors)]
    return None if None in states and False not in states else all(states)


def data_dependent(sizes: Sequence[Any]) -> bool:
    """Whether some size depends on what tensors hold (an unbacked symbol)."""
    return any(isinstance(n, torch.SymInt) and bool(free_unbacked_symbols(n)) for n in sizes)


def shared_dtype(tensors: Sequence[Any]) -> str:
    """The dtype of all tensors, or their dtypes joined by ``+`` when they differ."""
    return "+".join(sorted({str(dtype(t)) for t in _different(tensors)}))


def _different(tensors: Sequence[Any]) -> list[Any]:
    """Each different object once: hundreds of equal experts share one record."""
    return list({id(tensor): tensor for tensor in tensors}.values())
