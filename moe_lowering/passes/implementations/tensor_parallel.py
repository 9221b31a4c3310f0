"""Tensor parallelism around every implementation: the ranks of a TP group hold the same tokens, each works on its share.

Before: x [T, H], the same on all ``tp`` ranks. Rank j takes tokens [j * M, (j + 1) * M), M = ceil(T / tp); the results
[M, H] are gathered, and the first T are the block's result, complete and identical on all of them. Where T is not a
multiple of ``tp`` the missing tokens are repetitions of the last one: finite work like any other, dropped at the end.
They arrive at experts, so counts that somebody reads need a T that is a multiple (``block.tp_counts``).
Source: vllm_ascend_0_13.prepare_finalize: splits and gathers likewise.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.custom_ops.sizes import ceil_div
from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emission.emitter import Emitter, aten

c10d = torch.ops._c10d_functional


def tokens_per_rank(tokens: Any, spec: BlockSpec) -> Any:
    """M, the tokens that one rank of the TP group works on; symbolic when ``tokens`` is."""
    return ceil_div(tokens, spec.tp_size)


class OwnTokens:
    """This rank's share of tensors with one line per token. Lines of one block are chosen once and used for all."""

    def __init__(self, emit: Emitter, block: Block, deployment: Deployment) -> None:
        self._emit, self._spec, self._rank = emit, block.spec, deployment.own_rank("tp")
        self._lines: Node | None = None

    def of(self, node: Node) -> Node:
        """[T, ...] -> [M, ...]; the tensor itself without tensor parallelism."""
        tp, emit = self._spec.tp_size, self._emit
        if tp == 1:
            return node
        tokens = node.meta["val"].shape[0]
        if isinstance(tokens, int) and tokens % tp == 0:
            size = tokens // tp
            return emit.call(aten.slice.Tensor, node, 0, self._rank * size, (self._rank + 1) * size)
        if self._lines is None:
            self._lines = self._choose(node)
        return emit.call(aten.index_select.default, node, 0, self._lines)

    def _choose(self, node: Node) -> Node:
        """The lines [j * M, (j + 1) * M), those past the end replaced by the last line."""
        emit, tp = self._emit, self._spec.tp_size
        tokens, make = emit.size_and_maker(node, 0)
        size: Any
        last: Any
        first: Any
        end: Any
        if isinstance(tokens, int):
            size, last = ceil_div(tokens, tp), tokens - 1
            first, end = self._rank * size, (self._rank + 1) * size
        else:
            size = make(operator.floordiv, make(operator.add, tokens, tp - 1), tp)
            last = make(operator.sub, tokens, 1)
            first, end = (make(operator.mul, size, at) for at in (self._rank, self._rank + 1))
        device = node.meta["val"].device
        lines = make(aten.arange.start, first, end, dtype=torch.int32, device=device, pin_memory=False)
        return make(aten.clamp.default, lines, None, last)


def gather(emit: Emitter, block: Block, y: Node) -> Node:
    """[M, H] of every rank of the TP group -> [T, H]; the tensor itself without tensor parallelism."""
    spec = block.spec
    if spec.tp_size == 1:
        return y
    everyone = emit.call(c10d.all_gather_into_tensor.default, y, spec.tp_size, spec.tp_group)
    return first_tokens(emit, emit.call(c10d.wait_tensor.default, everyone), emit.rows(block.x))


def first_tokens(emit: Emitter, y: Node, own: Node) -> Node:
    """As many of the first lines as ``own`` has.

    A slice to a symbolic size would add a guard, or depend on the compile's own T.
    """
    tokens, make = emit.size_and_maker(own, 0)
    if isinstance(tokens, int):
        return y if y.meta["val"].shape[0] == tokens else emit.call(aten.slice.Tensor, y, 0, 0, tokens)
    device = y.meta["val"].device
    first = make(aten.arange.default, tokens, dtype=torch.int32, device=device, pin_memory=False)
    return emit.call(aten.index_select.default, y, 0, first)
