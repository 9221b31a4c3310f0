"""An MoE layer on one rank, eager on CPU: what ``dispatch``, ``grouped_mlp`` and ``combine`` give, in one function.

The three operators keep books that only an exchange reads (handle, counts, rows past the received ones), and are dispatched
and checked one by one: at one token that took as long as the matmuls. Here the rows stay where they are. Matmuls, activation
and sum are the functions that the operators call.

Nothing is checked less. A layer is computed here when a call of the same shapes, dtypes and options went through the
operators, which check them, before; what depends on data, the ids, is checked here, and a call with wrong ones goes through the
operators, which say what is wrong. So does every call that somebody watches: compilers, dispatch and function modes, autocast,
tensors that are not plain ones on CPU, gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lowering.custom_ops.expert_matmul import last_rows, single_matmuls, stacked_matmul
from moe_lowering.custom_ops.grouped_mlp import activate
from moe_lowering.custom_ops.weighted_sum import sum_rows
from moe_lowering.vocabulary import SWIGLU_ALPHA


class Layer(NamedTuple):
    """The arguments of a layer: x [..., H], weights [..., k], ids [..., k], w13 [E, H, 2I], w2 [E, I, H], and the activation."""

    x: Tensor
    weights: Tensor
    ids: Tensor
    w13: Any
    w2: Any
    activation: str
    limit: float | None
    alpha: float | None
    interleaved: bool


FEW = 64  # slots up to which they are sorted in Python
_PASSED: set[Hashable] = set()
_MOST_PASSED = 4096
_PLAIN = (Tensor, torch.nn.Parameter)
_SCALARS = (str, int, float, bool, type(None))
_c: Any = torch._C  # not all of it is typed


def signature(layer: Layer, more: tuple[Any, ...]) -> Hashable | None:
    """What the checks of a call depend on, ``more`` among it; None where the operators must be called."""
    tensors = layer[:5]
    for tensor in tensors:
        if type(tensor) not in _PLAIN or not tensor.is_cpu:
            return None
    if layer.w13.dim() != 3 or layer.w2.dim() != 3:
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    options = (*layer[5:], *more)
    if _is_watched() or any(type(option) not in _SCALARS for option in options):
        return None
    facts = [(tensor.shape, tensor.dtype, tensor.layout) for tensor in tensors]
    return (*facts, *options, *map(type, options))  # 1, 1.0 and True are equal, and not the same argument


def _is_watched() -> bool:
    """Whether a compiler, a mode or a transform has to see the operators."""
    return (
        _c._len_torch_dispatch_stack() > 0
        or _c._len_torch_function_stack() > 0
        or _c._functorch.peek_interpreter_stack() is not None
        or _c._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
    )


def remember(key: Hashable) -> None:
    """A call of this signature went through the operators."""
    if len(_PASSED) >= _MOST_PASSED:
        _PASSED.clear()
    _PASSED.add(key)


def compute(layer: Layer, key: Hashable) -> Tensor | None:
    """y [..., H]; None of a call whose like was not checked, or whose ids are wrong."""
    if key not in _PASSED:
        return None
    ids, hidden = layer.ids, layer.x.shape[-1]
    top_k, experts = ids.shape[-1], layer.w13.shape[0]
    x, weights = layer.x.reshape(-1, hidden), layer.weights.reshape(-1, top_k).float()
    slots = ids.numel()
    if slots == 0:
        return None
    if slots <= FEW:
        y = _few(layer, x, weights, ids.reshape(-1).tolist(), experts)
    else:
        y = _many(layer, x, weights, ids.reshape(-1), experts)
    return None if y is None else y.view(layer.x.shape)


def _few(layer: Layer, x: Tensor, weights: Tensor, ids: list[int], experts: int) -> Tensor | None:
    """With the slots in Python's lists: an operator on them takes as long as sorting them here."""
    tokens, top_k = weights.shape
    if min(ids) < 0 or max(ids) >= experts:
        return None
    if tokens == 1:  # each expert has one row, so that rows can stay in order of choice
        if len(set(ids)) < top_k:
            return None
        rows = single_matmuls(x, ids, layer.w13)
        return sum_rows(single_matmuls(_activated(layer, rows), ids, layer.w2), weights)
    codes = [expert * tokens + slot // top_k for slot, expert in enumerate(ids)]
    if len(set(codes)) < len(codes):
        return None  # an expert twice for a token
    order = sorted(range(len(ids)), key=codes.__getitem__)
    counts, place = [0] * experts, [0] * len(ids)
    for row, slot in enumerate(order):
        counts[ids[slot]] += 1
        place[slot] = row
    indices = torch.tensor([[slot // top_k for slot in order], place])
    rows = _experts(layer, x.index_select(0, indices[0]), last_rows(counts))
    return sum_rows(rows.index_select(0, indices[1]), weights)


def _many(layer: Layer, x: Tensor, weights: Tensor, ids: Tensor, experts: int) -> Tensor | None:
    tokens, top_k = weights.shape
    if ids.dtype == torch.int64 and not _are_experts(ids, experts):  # else a code might wrap
        return None
    token, place, lasts = _positions(tokens, top_k, experts)
    codes, order = torch.sort(torch.add(token, ids, alpha=tokens))
    if int(codes[0]) < 0 or int(codes[-1]) >= experts * tokens or bool((codes[1:] == codes[:-1]).any()):
        return None  # another id, or an expert twice for a token
    ends = torch.searchsorted(codes, lasts, out_int32=True)
    rows = _experts(layer, x.index_select(0, order // top_k), ends)
    return sum_rows(rows.index_select(0, torch.empty_like(order).scatter_(0, order, place)), weights)


def _are_experts(ids: Tensor, experts: int) -> bool:
    low, high = torch.aminmax(ids)
    return int(low) >= 0 and int(high) < experts


@functools.lru_cache(maxsize=16)
def _positions(tokens: int, top_k: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The token of each slot, each slot, and for each expert the first code of the next one: those of every call of a size."""
    slots = torch.arange(tokens * top_k)
    return slots // top_k, slots, torch.arange(1, experts + 1) * tokens


def _experts(layer: Layer, rows: Tensor, ends: Tensor) -> Tensor:
    return stacked_matmul(_activated(layer, stacked_matmul(rows, ends, layer.w13)), ends, layer.w2)


def _activated(layer: Layer, hidden: Tensor) -> Tensor:
    limit, alpha = layer.limit or 0.0, SWIGLU_ALPHA if layer.alpha is None else layer.alpha
    return activate(hidden, layer.activation, limit, alpha, layer.interleaved, hidden.dtype)
