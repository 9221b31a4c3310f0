"""What travels beside x, ids, weights and scales of tokens, as the columns of one int32 tensor.

A collective costs as much as several small kernels. Putting the columns together is one (``cat``), and so is taking them
apart: ``split_with_sizes_copy`` into memory that nobody has written. torch_npu has it as an operator of CANN
(SplitWithSize); without ``out`` it is a copy for each, as it stays in GE graphs, which write nothing in place.
Nothing is computed on the columns: bits are copied, and no word of them is read as another dtype than it was sent in.
Sources: wheel.native_functions: split_with_sizes_copy.out; wheel.fx_compiler: remove_noop_ops.
"""

from __future__ import annotations

import itertools

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
    sent = sent_dtype(spec, deployment)
    widths = [spec.top_k, spec.top_k * sent.itemsize // WORD.itemsize] + [1] * has_scale
    ids, weights, *scales = _split(emit, columns, widths, deployment.mode)
    weights = emit.cast(emit.call(aten.view.dtype, weights, sent), weights_dtype(spec, deployment))
    if not scales:
        return ids, weights, None
    scale = emit.call(aten.view.dtype, emit.call(aten.reshape.default, scales[0], [-1]), torch.float32)
    return ids, weights, scale


def _split(emit: Emitter, columns: Node, widths: list[int], mode: str) -> list[Node]:
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
    ids, value = ids_of_no_expert(emit, columns, spec), columns.meta["val"]
    rest = int(value.shape[1]) - spec.top_k
    zeros = emit.constant(aten.full.default, [rest], 0, dtype=torch.int32, device=value.device, pin_memory=False)
    return emit.constant(aten.cat.default, [ids, zeros])
