"""The kernels of ``alltoall_experts``, as its device kernel calls them: one node in a graph, and much more on a device.

    quantise > route by expert > numbers to all ranks > rows (and scales) to their ranks > route by local expert > MLP
    > back in the order of arrival > rows home > weighted sum

Emitted for counting alone. Rows are as many as they are when tokens are spread evenly. The read on the host in the middle of it
is not a kernel, and not counted: its price is not known.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.implementations.alltoall_exact import EXACT
from moe_lowering.passes.implementations.base import Form, Replacement
from moe_lowering.passes.implementations.gathered import ROUTE, route_arguments
from moe_lowering.passes.implementations.mlp import emit_mlp
from moe_lowering.passes.implementations.quantised_calls import PLAIN
from moe_lowering.passes.implementations.quantised_mlp import quantise_tokens
from moe_lowering.passes.implementations.tensor_parallel import OwnTokens, gather
from moe_lowering.passes.implementations.unpermute import UNPERMUTE, unpermute_arguments
from moe_lowering.passes.operator_calls import Premises, emit_call

c10d = torch.ops._c10d_functional
# Small kernels on ids, counts and numbers (custom_ops/alltoall_experts.py): checks of ids 12, numbers 7, order of arrival 4.
SMALL_KERNELS = 23


def as_kernels(form: Form) -> Form:
    """The form as what a device runs."""
    return dataclasses.replace(form, emit=_emit) if form.name == EXACT.name else form


def _emit(block: Block, emit: Emitter, deployment: Deployment, premises: Premises) -> Replacement:
    spec, own_tokens = block.spec, OwnTokens(emit, block, deployment)
    with emit.at(block.combine, block.combine):
        x, scale = quantise_tokens(emit, block, own_tokens)
        ids, weights = (
            own_tokens.of(emit.rows(block.ids)),
            emit.cast(own_tokens.of(emit.rows(block.weights)), torch.float32),
        )
        for _ in range(SMALL_KERNELS):
            emit.call(aten.clone.default, ids)
        routed = emit_call(emit, ROUTE, route_arguments(x, ids, scale, spec.experts + 1, [0, spec.experts]))
        rows, place, sent = (emit.item(routed, at) for at in range(3))
        numbers = emit.call(aten.repeat.default, sent, [spec.ep_size])
        _swap(emit, block, numbers)
        scales = None if scale is None else _swap(emit, block, emit.item(routed, 3))
        arrived = _swap(emit, block, rows)
        order = None
        if spec.local_experts > 1:
            expert = emit.call(aten.unsqueeze.default, place, 1)
            again = emit_call(
                emit, ROUTE, route_arguments(arrived, expert, scales, spec.local_experts, [0, spec.local_experts])
            )
            arrived, order, counts = (emit.item(again, at) for at in range(3))
            scales = None if scales is None else emit.item(again, 3)
        else:
            counts = emit.call(aten.slice.Tensor, sent, 0, 0, 1)
        results = emit_mlp(emit, block, arrived, scales, counts, deployment, PLAIN)
        if order is not None:
            results = emit.call(aten.index_select.default, results, 0, order)
        home = _swap(emit, block, results)
        y = emit_call(emit, UNPERMUTE, unpermute_arguments(home, place, emit.cast(weights, spec.dtype)))
        return Replacement(emit.like(gather(emit, block, y), block.x), counts)


def _swap(emit: Emitter, block: Block, node: Node) -> Node:
    """An exchange of as many rows as there are: the same number to every rank, and one more to the first where it is uneven."""
    spec, shape = block.spec, node.meta["val"].shape
    if spec.ep_size == 1:
        return emit.call(aten.clone.default, node)
    flat = node if len(shape) == 1 else emit.call(aten.reshape.default, node, [-1])
    each, more = divmod(int(flat.meta["val"].shape[0]), spec.ep_size)
    splits = [each + (rank < more) for rank in range(spec.ep_size)]
    swapped = emit.call(c10d.all_to_all_single.default, flat, splits, splits, spec.ep_group)
    arrived = emit.call(c10d.wait_tensor.default, swapped)
    return arrived if len(shape) == 1 else emit.call(aten.reshape.default, arrived, [-1, int(shape[1])])
