"""A layer that others wrote, as generic operators: dispatch, grouped_mlp, combine, in front of the result that they replace."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.custom_ops.combine import FLOATS, CombineCall
from moe_lowering.custom_ops.dispatch import DispatchCall
from moe_lowering.custom_ops.grouped_mlp import GroupedMlpCall
from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.graph.arguments import positional_arguments
from moe_lowering.passes.raise_foreign.normed_combine import emit_norm
from moe_lowering.passes.raise_foreign.records import Constant, Copied, ForeignBlock, Weights
from moe_lowering.passes.token_ranges import is_strict, must_vary
from moe_lowering.passes.verifier import VerificationError

OPS = torch.ops.moe_lowering
_NAMES = ("rows", "row_scale", "counts", "handle")


@dataclasses.dataclass(frozen=True)
class Generic:
    """The nodes of a layer in generic form; ``result`` stands for the result of the foreign one, or the first of several."""

    dispatch: Node
    counts: Node
    combine: Node
    result: Node
    results: tuple[tuple[Node, Node], ...]  # (result of the layer, what stands for it), of all


def emit_generic(block: ForeignBlock, emit: Emitter, deployment: Deployment) -> Generic:
    """Emits a block, each stage where it is to stand. The fake kernels of the generic operators refuse what does not fit."""
    first, middle = block.first or block.result, block.middle or block.result
    _fix_widths(block)
    with emit.at(first, first):
        sent, items, weights = _emit_dispatch(block, emit, deployment)
    rows, row_scale, counts, handle = items
    with emit.at(middle, middle):
        mlp = emit.call(OPS.grouped_mlp.default, *positional_arguments(_mlp_call(block, emit, rows, row_scale, counts)))
    with emit.at(block.result, block.result):
        arguments = sent._asdict()
        alike = {name: arguments[name] for name in CombineCall._fields if name in arguments}
        if weights is None:
            weights = _by_token(emit, block.weights, sent.x, block.top_k)
            weights = weights if block.rounded is None else emit.cast(weights, block.rounded)
            weights = weights if weights.meta["val"].dtype in FLOATS else emit.cast(weights, torch.float32)
        back = CombineCall[Any](**{**alike, "rows": mlp, "weights": weights, "handle": handle})
        combine = emit.call(OPS.combine.default, *positional_arguments(back))
        dispatch: Any = rows.args[0]
        y = _result(block, emit, combine, weights, sent)
        results = [(block.result, y)] if block.norm is None else emit_norm(block.norm, emit, y)
        return Generic(dispatch, counts, combine, dict(results)[block.result], tuple(results))


def _fix_widths(block: ForeignBlock) -> None:
    """Columns of x, and sizes of the experts' matrices, which may be symbols in a dynamic graph, to what they are: no operator of
    torch_npu says that they agree, as the generic ones do. Sizes that must vary stay; the block is refused by them."""
    matrices = (size for node in (*block.w13.nodes, *block.w2.nodes) for size in node.meta["val"].shape)
    for size in (block.x.meta["val"].shape[-1], *matrices):
        if isinstance(size, torch.SymInt) and size.node.has_hint() and not (is_strict(size) or must_vary(size)):
            int(size)


def _emit_dispatch(
    block: ForeignBlock, emit: Emitter, deployment: Deployment
) -> tuple[DispatchCall[Any], tuple[Node, ...], Node | None]:
    """The call, its results in order, and the weights where tokens are multiplied by them."""
    dtype = block.out_dtype or block.w2.nodes[0].meta["val"].dtype
    x = emit.rows(block.x)
    if block.x_scale is None and block.quantisation == "none":
        x = emit.cast(x, dtype)
    ids = emit.cast(_by_token(emit, block.ids, x, block.top_k), torch.int32)
    zero_experts, weights = block.zero_experts, None
    if block.slot_mask is not None:
        ids, zero_experts = _masked_ids(block, emit, ids, block.slot_mask), zero_experts + block.top_k
    if block.weigh_input:
        by_token = emit.cast(_by_token(emit, block.weights, x, block.top_k), torch.float32)
        x = emit.cast(emit.call(aten.mul.Tensor, x, by_token), dtype)
        weights = emit.call(aten.ones_like.default, by_token)
    sent = DispatchCall[Any](
        x,
        block.x_scale,
        ids,
        block.mask,
        num_experts=block.num_experts,
        ep_group=block.ep_group,
        ep_size=block.ep_size,
        tp_group=block.tp_group,
        tp_size=block.tp_size,
        max_tokens=deployment.token_bound,
        max_rows=deployment.max_rows,
        x_smooth=block.x_smooth,
        zero_experts=zero_experts,
    )
    dispatch = emit.call(OPS.dispatch.default, *positional_arguments(sent))
    return sent, tuple(emit.item(dispatch, index) for index, _ in enumerate(_NAMES)), weights


def _result(block: ForeignBlock, emit: Emitter, y: Node, weights: Node, sent: DispatchCall[Any]) -> Node:
    """As the foreign result is: its shape, its dtype, and with what is added."""
    result = block.result.meta["val"]
    if block.norm is None and y.meta["val"].dim() != result.dim():
        y = emit.call(aten.reshape.default, y, _shape(block, emit, result))
    y = emit.cast(y, result.dtype if block.norm is None else block.norm.gamma.meta["val"].dtype)
    for base in block.bases:
        y = emit.call(aten.add.Tensor, base, y)
    if block.partial:
        y = emit.call(aten.add.Tensor, _summed(block, emit), y)
    if block.copied is not None:
        y = _add_copies(block.copied, emit, y, weights, sent)
    return y if block.constant is None else _add_constants(block.constant, emit, y, weights, sent)


def _summed(block: ForeignBlock, emit: Emitter) -> Node:
    """What the ranks add to their own results, over all of them."""
    own = block.partial[0]
    for other in block.partial[1:]:
        own = emit.call(aten.add.Tensor, own, other)
    c10d = torch.ops._c10d_functional
    return emit.call(c10d.wait_tensor.default, emit.call(c10d.all_reduce.default, own, "sum", block.partial_group))


def _masked_ids(block: ForeignBlock, emit: Emitter, ids: Node, mask: Node) -> Node:
    """Slots that give nothing as choices of zero experts, which differ for a token, as all of its experts do."""
    first, device = block.num_experts + block.zero_experts, ids.meta["val"].device
    nothing = emit.call(
        aten.arange.start, first, first + block.top_k, dtype=torch.int32, device=device, pin_memory=False
    )
    return emit.call(aten.where.self, mask, ids, nothing)


def _add_copies(copied: Copied, emit: Emitter, y: Node, weights: Node, sent: DispatchCall[Any]) -> Node:
    """y + x * the sum of the weights of those choices, rounded once."""
    ids = sent.ids
    chosen = emit.call(aten.ge.Scalar, ids, copied.first)
    if copied.last < sent.num_experts + sent.zero_experts:
        chosen = emit.call(aten.logical_and.default, chosen, emit.call(aten.lt.Scalar, ids, copied.last))
    weights = emit.cast(weights, torch.float32)
    share = emit.call(aten.sum.dim_IntList, emit.call(aten.mul.Tensor, weights, chosen), [1], True)
    copies = emit.call(aten.mul.Tensor, share, copied.x)
    return emit.cast(emit.call(aten.add.Tensor, copies, y), y.meta["val"].dtype)


def _add_constants(constant: Constant, emit: Emitter, y: Node, weights: Node, sent: DispatchCall[Any]) -> Node:
    """y + the weights of each const expert's choices times alpha_1 * x + alpha_2 * v, in float32, rounded once."""
    ids: Any = sent.ids
    where = {"dtype": torch.int32, "device": ids.meta["val"].device, "pin_memory": False}
    numbers = emit.call(aten.arange.start, constant.first, constant.last, **where)
    chosen = emit.call(aten.eq.Tensor, emit.call(aten.unsqueeze.default, ids, 2), numbers)
    by_choice = emit.call(aten.unsqueeze.default, emit.cast(weights, torch.float32), 2)
    by_slot = emit.call(aten.mul.Tensor, by_choice, chosen)
    share = emit.call(aten.sum.dim_IntList, by_slot, [1])  # [T, C]
    x, alpha_1, alpha_2, v = (emit.cast(node, torch.float32) for node in constant.nodes)
    scaled = emit.call(aten.mul.Tensor, emit.call(aten.mm.default, share, alpha_1), x)
    shifted = emit.call(aten.mm.default, share, emit.call(aten.mul.Tensor, alpha_2, v))
    total = emit.call(aten.add.Tensor, emit.call(aten.add.Tensor, scaled, shifted), y)
    return emit.cast(total, y.meta["val"].dtype)


def _shape(block: ForeignBlock, emit: Emitter, result: torch.Tensor) -> list[Any]:
    """The result's sizes; one that is a symbol is that of an operand."""
    shape: list[Any] = []
    for size in result.shape:
        if isinstance(size, int):
            shape.append(size)
            continue
        same = (
            (node, at)
            for node in (block.x, block.ids)
            for at, other in enumerate(node.meta["val"].shape)
            if size_key(other) == size_key(size)
        )
        source = next(same, None)
        if source is None:
            raise VerificationError(f"{block.result.name} has size {size}, which none of x and ids has")
        shape.append(emit.size(*source))
    return shape


def _mlp_call(block: ForeignBlock, emit: Emitter, rows: Node, row_scale: Node, counts: Node) -> GroupedMlpCall[Node]:
    call = GroupedMlpCall[Node](
        rows,
        row_scale,
        counts,
        _matrices(emit, block.w13),
        _matrices(emit, block.w2),
        _side_by_side(emit, block, block.w13_bias, "w13_bias"),
        [*block.w2_bias],
        block.activation,
        block.limit,
        block.alpha,
        block.interleaved,
    )
    if block.quantisation == "none":
        return call
    names = ("w13_scale", "w2_scale", "w13_offset", "w2_offset", "w13_scale_bias", "w2_scale_bias")
    lists: dict[str, Any] = {name: _side_by_side(emit, block, getattr(block, name), name) or None for name in names}
    if block.quantisation == "w4a8":  # [E, 1, N] for [E, N]
        for name in ("w13_scale", "w2_scale"):
            lists[name] = [
                emit.call(aten.squeeze.dim, each, 1) if each.meta["val"].dim() == 3 else each for each in lists[name]
            ]
    words = {"quantisation": block.quantisation, "out_dtype": block.out_dtype}
    return call._replace(h_smooth=block.h_smooth, h_clip=block.h_clip, **words, **lists)


def _matrices(emit: Emitter, weights: Weights) -> list[Node]:
    nodes = [*weights.nodes]
    if weights.transposed:
        nodes = [emit.call(aten.transpose.int, node, -2, -1) for node in nodes]
    return _pairs(emit, nodes) if weights.joined else nodes


def _pairs(emit: Emitter, nodes: list[Node]) -> list[Node]:
    """Each of gate beside its one of up."""
    half = len(nodes) // 2
    return [emit.call(aten.cat.default, [*pair], -1) for pair in zip(nodes[:half], nodes[half:], strict=True)]


def _side_by_side(emit: Emitter, block: ForeignBlock, given: tuple[Node, ...], name: str) -> list[Node]:
    """A list of ``grouped_mlp``; of ``w13`` that of gate beside that of up, where each has its own."""
    apart = block.w13.joined and name.startswith("w13") and len(given) == len(block.w13.nodes)
    return _pairs(emit, [*given]) if apart else [*given]


def _by_token(emit: Emitter, node: Node, x: Node, top_k: int) -> Node:
    """What has one element for each slot, by token, as [T, k]."""
    if node.meta["val"].dim() == 2:
        return node
    return emit.call(aten.reshape.default, node, [emit.size(x, 0), top_k])
