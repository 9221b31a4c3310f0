"""What travels beside x, ids, weights and scales of tokens, as the columns of one int32 tensor.

A collective costs as much as several small kernels. Putting the columns together is one (``cat``), and so is taking them
apart: ``split_with_sizes_copy`` into memory that nobody has written. torch_npu has it as an operator of CANN
(SplitWithSize); without ``out`` it is a copy for each, as it stays in GE graphs, which write nothing in place.
Nothing is computed on the columns: bits are copied, and no word of them is read as another dtype than it was sent in.
Sources: wheel.native_functions: split_with_sizes_copy.out; wheel.fx_compiler: remove_noop_ops.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.implementations.unpermute import weights_dtype

WORD = torch.int32  # of ids, and of the bits of all others


def sent_dtype(spec: BlockSpec, deployment: Deployment) -> torch.dtype:
    """That of the weights as they travel in columns: the one that they are used in, where k of them are whole words."""
    used = weights_dtype(spec, deployment)
    return used if spec.top_k * used.itemsize % WORD.itemsize == 0 else torch.float32


def pack_columns(emit: Emitter, ids: Node, weights: Node, scale: Node | None, dtype: torch.dtype) -> Node:
    """ids [M, k], weights [M, k] in ``dtype`` and scales [M] as words, int32 [M, k + k * size of a weight / 4 (+ 1)]."""
    parts = [ids, _as_words(emit, weights, dtype)]
    if scale is not None:
        parts.append(emit.call(aten.unsqueeze.default, emit.call(aten.view.dtype, scale, WORD), 1))
    return emit.call(aten.cat.default, parts, 1)


def _as_words(emit: Emitter, weights: Node, dtype: torch.dtype) -> Node:
    """The bits of weights [M, k] in ``dtype`` as int32.

    Pairs of 16 bits are always copied: a view in a wider dtype wants them side by side from the start of a word on, and
    where an input of the graph starts is known to nobody, nor the same on every rank. Not by ``clone``, even where the
    dtype stays: npugraph_ex takes a clone of the same strides for nothing and erases it (wheel.fx_compiler).
    """
    if dtype == torch.float32:
        weights = emit.cast(weights, dtype)
    else:
        weights = emit.call(aten._to_copy.default, weights, dtype=dtype, memory_format=torch.contiguous_format)
    return emit.call(aten.view.dtype, weights, WORD)


def unpack_columns(
    emit: Emitter, columns: Node, spec: BlockSpec, deployment: Deployment, has_scale: bool
) -> tuple[Node, Node, Node | None]:
    """(ids, weights, scales) as tensors in one piece each, which is how operators take them."""
    parts = _split(emit, columns, _widths(spec, deployment, has_scale), deployment.mode)
    return _read_parts(emit, parts, spec, deployment)


def _widths(spec: BlockSpec, deployment: Deployment, has_scale: bool) -> list[int]:
    """Words of one token: ids, weights, scale."""
    return [spec.top_k, spec.top_k * sent_dtype(spec, deployment).itemsize // WORD.itemsize] + [1] * has_scale


def _read_parts(
    emit: Emitter, parts: list[Node], spec: BlockSpec, deployment: Deployment
) -> tuple[Node, Node, Node | None]:
    """(ids, weights, scales) of their words."""
    ids, weights, *scales = parts
    sent = sent_dtype(spec, deployment)
    weights = emit.cast(emit.call(aten.view.dtype, weights, sent), weights_dtype(spec, deployment))
    if not scales:
        return ids, weights, None
    scale = emit.call(aten.view.dtype, emit.call(aten.reshape.default, scales[0], [-1]), torch.float32)
    return ids, weights, scale


def pack_line(
    emit: Emitter, ids: Node, weights: Node, scale: Node | None, spec: BlockSpec, deployment: Deployment
) -> Node:
    """The words of ``pack_columns`` part by part, of M tokens and one more of no expert, int32 [(M + 1) * columns].

    Its part of each stands in the ``cat`` of all, which as a line of columns would take a ``cat`` of its own.
    """
    parts = [emit.call(aten.reshape.default, ids, [-1]), ids_of_no_expert(emit, ids, spec)]
    words = [_as_words(emit, weights, sent_dtype(spec, deployment))]
    if scale is not None:
        words.append(emit.call(aten.view.dtype, scale, WORD))
    for part in words:
        parts += [emit.call(aten.reshape.default, part, [-1]), _zero_words(emit, part, _width(part))]
    return emit.call(aten.cat.default, parts)


def unpack_lines(
    emit: Emitter, lines: Node, ids: Node, spec: BlockSpec, deployment: Deployment, has_scale: bool
) -> tuple[Node, Node, Node | None]:
    """As ``unpack_columns``, of ``pack_line`` of every rank one after the other; ``ids`` are this rank's [M, k]."""
    own, make = emit.size_and_maker(ids, 0)
    tokens = own + 1 if isinstance(own, int) else make(operator.add, own, 1)
    widths = _widths(spec, deployment, has_scale)
    lengths = [tokens * width if isinstance(tokens, int) else make(operator.mul, tokens, width) for width in widths]
    lines = emit.call(aten.reshape.default, lines, [spec.ep_size, -1])
    parts = _split(emit, lines, lengths, deployment.mode)
    parts = [emit.call(aten.reshape.default, part, [-1, width]) for part, width in zip(parts, widths, strict=True)]
    return _read_parts(emit, parts, spec, deployment)


def _width(part: Node) -> int:
    """Words of one token."""
    shape = part.meta["val"].shape
    return int(shape[1]) if len(shape) > 1 else 1


def _zero_words(emit: Emitter, model: Node, count: int) -> Node:
    device = model.meta["val"].device
    return emit.constant(aten.full.default, [count], 0, dtype=WORD, device=device, pin_memory=False)


def _split(emit: Emitter, columns: Node, widths: list[Any], mode: str) -> list[Node]:
    """Columns as tensors in one piece: one kernel, where the graph may write into memory; in GE graphs one for each."""
    if mode == "ge":
        ends = list(itertools.accumulate(widths))
        pieces = [
            emit.call(aten.slice.Tensor, columns, 1, end - width, end) for width, end in zip(widths, ends, strict=True)
        ]
        return [emit.call(aten.clone.default, piece, memory_format=torch.contiguous_format) for piece in pieces]
    value, lines = columns.meta["val"], emit.size(columns, 0)
    parts = [
        emit.call(aten.empty.memory_format, [lines, width], dtype=value.dtype, device=value.device, pin_memory=False)
        for width in widths
    ]
    emit.call(aten.split_with_sizes_copy.out, columns, widths, 1, out=parts)
    return parts


def ids_of_no_expert(emit: Emitter, model: Node, spec: BlockSpec) -> Node:
    """[k] distinct ids past the last expert."""
    return emit.constant(
        aten.arange.start,
        spec.experts,
        spec.experts + spec.top_k,
        dtype=torch.int32,
        device=model.meta["val"].device,
        pin_memory=False,
    )


def empty_columns(emit: Emitter, columns: Node, spec: BlockSpec) -> Node:
    """[n] int32, the columns of a token without an expert: its weights are 0, and its scale."""
    rest = _width(columns) - spec.top_k
    return emit.constant(aten.cat.default, [ids_of_no_expert(emit, columns, spec), _zero_words(emit, columns, rest)])
