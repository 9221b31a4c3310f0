"""Graph modules of ``graph_cases``: FX nodes with fake values, as AOT autograd would hand them over, without tracing.

Every node but the inputs carries the module path of its block (``layers.0``), or ``residual``. ``graph_builder`` makes the nodes.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from graph_builder import Builder
from graph_cases import BlockCase, GraphCase
from graph_forms import per_expert
from graph_quantised import PACKED, dtypes, extras
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import moe_lowering.custom_ops  # noqa: F401  (registers torch.ops.moe_lowering)
from moe_lowering import Deployment

aten, ops = torch.ops.aten, torch.ops.moe_lowering


@dataclasses.dataclass(frozen=True)
class Built:
    """A graph module, the names of its outputs in order, its ShapeEnv (None when all is static)."""

    gm: GraphModule
    outputs: tuple[str, ...]
    env: ShapeEnv | None


def build(case: GraphCase) -> Built:
    """The graph module of a case."""
    b = Builder(case)
    stages = [_block(b, index, block) for index, block in enumerate(case.blocks)]
    if case.interleave and case.layout != "chain":
        while stages:
            stages = [stage for stage in stages if next(stage, "done") != "done"]
    for stage in stages:
        for _ in stage:
            pass
    b.graph.output(tuple(b.outputs.values())).meta["val"] = tuple(n.meta.get("val") for n in b.outputs.values())
    return Built(GraphModule(torch.nn.Module(), b.graph), tuple(b.outputs), b.env)


def _block(b: Builder, index: int, spec: BlockCase) -> Iterator[str]:
    """One block; pauses after its dispatch and after its MLP, so that blocks can be interleaved."""
    x = _tokens(b, index)
    b.place = place = f"layers.{index}"
    shared = _shared(b.case.deployment, spec)
    weights, ids = _routing(b, index, spec)
    mask = b.input("mask", *b.lead, dtype=torch.bool) if spec.mask else None
    late = "w13_late" in spec.odd
    experts = None if late else _experts(b, index, spec, shared)
    if "scope_around" in spec.odd:
        _enter(b)
    if "scope_not_open" in spec.odd:
        _exit(b)
    rows, scale, counts, handle = _dispatch(b, index, spec, x, ids, mask, shared)
    weights = _late_weights(b, spec, weights, counts, "weights_late")
    yield "sent"
    b.place = place
    experts = experts or _experts(b, index, spec, shared)
    rows, handle = _between(b, index, spec, rows, scale, handle)
    if "scope_across" in spec.odd:
        _enter(b)
    y_rows = _mlp(b, spec, rows, scale, counts, experts)
    if "scope_across" in spec.odd:
        _exit(b)
    yield "computed"
    b.place = place
    weights = _late_weights(b, spec, weights, counts, "weights_last")
    y = _combine(b, index, spec, y_rows, weights, ids, handle, mask, shared)
    if "scope_around" in spec.odd:
        _exit(b)
    if "counts_read" in spec.odd:
        b.outputs[f"counts{index}"] = counts
    if "ids_read" in spec.odd:
        b.outputs[f"ids{index}"], b.outputs[f"weights{index}"] = ids, weights
    b.outputs[f"x{index}"] = x
    if "y_unused" not in spec.odd:
        b.outputs[f"y{index}"] = y
        b.place = "residual"
        b.chained = b.call(aten.add.Tensor, x, y)


def _tokens(b: Builder, index: int) -> Node:
    """x of a block, [*lead, hidden]."""
    b.place, layout = "residual", b.case.layout
    if layout == "slices":
        whole = b.input("x", *b.lead, b.hidden * len(b.case.blocks))
        return b.call(aten.slice.Tensor, whole, -1, index * b.hidden, (index + 1) * b.hidden)
    if layout == "expanded":
        one = b.input(f"x{index}", *(1 for _ in b.lead), b.hidden)
        sizes = [b.inputs.get(f"T{d}", n) for d, n in enumerate(b.lead)]
        return b.call(aten.expand.default, one, [*sizes, -1])
    if layout == "permuted" and len(b.lead) == 2:
        return b.call(aten.permute.default, b.input(f"x{index}", b.lead[1], b.lead[0], b.hidden), [1, 0, 2])
    return b.chained if b.chained is not None else b.input("x", *b.lead, b.hidden)


def _shared(deployment: Deployment, spec: BlockCase) -> dict[str, Any]:
    d = deployment
    return {
        "num_experts": spec.experts, "ep_group": d.ep_group, "ep_size": d.ep_size, "tp_group": d.tp_group,
        "tp_size": d.tp_size, "max_tokens": d.token_bound, "max_rows": d.max_rows, **dict(spec.arguments),
    }  # fmt: skip


def _routing(b: Builder, index: int, spec: BlockCase) -> tuple[Node, Node]:
    """(weights float32, ids int32), [*lead, k]."""
    route = spec.route
    if route is None:
        return (
            b.input(f"weights{index}", *b.lead, spec.top_k, dtype=torch.float32),
            b.input(f"ids{index}", *b.lead, spec.top_k, dtype=torch.int32),
        )
    logits = b.input(f"logits{index}", *b.lead, spec.experts)
    bias = b.input(f"bias{index}", spec.experts) if route.bias else None
    routed = b.call(
        ops.route.default, logits, bias, spec.top_k, route.scoring, route.renormalize, route.num_groups,
        route.topk_groups, route.group_score, route.scale,
    )  # fmt: skip
    weights, ids = b.items(routed, 2)
    return weights, ids


def _experts(b: Builder, index: int, spec: BlockCase, shared: dict[str, Any]) -> dict[str, list[Node]]:
    """w13, w2, their biases and what quantised ones have beside them, each stacked or one by expert."""
    local = spec.experts // shared["ep_size"]
    if spec.quantisation != "none":
        return _quantised_experts(b, index, spec, local)
    bias_dtype = torch.float32 if spec.bias_float32 else b.case.dtype
    found: list[list[Node]] = []
    for which, shape in enumerate(((b.hidden, 2 * spec.intermediate), (spec.intermediate, b.hidden))):
        stored = shape[::-1] if spec.transposed else shape
        nodes = per_expert(b, spec, ("w13", "w2")[which], index, local, stored, b.case.dtype)
        if spec.transposed:
            nodes = [b.call(aten.transpose.int, node, -2, -1) for node in nodes]
        found.append(nodes)
    for which, width in enumerate((2 * spec.intermediate, b.hidden)):
        name = ("w13_bias", "w2_bias")[which]
        found.append(per_expert(b, spec, name, index, local, (width,), bias_dtype) if spec.bias[which] else [])
    return dict(zip(("w13", "w2", "w13_bias", "w2_bias"), found, strict=True))


def _quantised_experts(b: Builder, index: int, spec: BlockCase, local: int) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = {"w13_bias": [], "w2_bias": []}
    packed, kinds = PACKED[spec.quantisation], dtypes(spec, b.case.dtype)
    for which, (inner, width) in enumerate(((b.hidden, 2 * spec.intermediate), (spec.intermediate, b.hidden))):
        name = ("w13", "w2")[which]
        shape = (inner, width if packed == 1 else width // packed)
        found[name] = per_expert(b, spec, name, index, local, shape, kinds[name])
        for extra in (f"{name}_{what}" for what in extras(spec)):
            found[extra] = per_expert(b, spec, extra, index, local, (width,), kinds[extra])
    return found


def _dispatch(
    b: Builder, index: int, spec: BlockCase, x: Node, ids: Node, mask: Node | None, shared: dict[str, Any]
) -> tuple[Node, Node, Node, Node]:
    x_scale = b.input("x_scale", *b.lead, dtype=torch.float32) if "quantised" in spec.odd else None
    if "kwargs" in spec.odd:
        sent = b.call(ops.dispatch.default, x, x_scale, ids=ids, mask=mask, **shared)
    else:
        sent = b.call(ops.dispatch.default, x, x_scale, ids, mask, *shared.values())
    rows, scale, counts, handle = b.items(sent, 4)
    if "counts_read_early" in spec.odd:
        b.outputs[f"counts{index}"] = b.call(aten.add.Tensor, counts, 0)
    if "counts_twice" in spec.odd:
        b.outputs[f"counts{index}"] = b.call(operator.getitem, sent, 2)
    if "dispatch_whole" in spec.odd:
        b.outputs[f"sent{index}"] = sent
    return rows, scale, counts, handle


def _late_weights(b: Builder, spec: BlockCase, weights: Node, counts: Node, when: str) -> Node:
    """Routing weights that exist only after the dispatch, or only after the MLP."""
    if when == "weights_late" and "weights_from_counts" in spec.odd:
        total = b.call(aten.mul.Tensor, b.call(aten.sum.default, counts), 0)
        weights = b.call(aten.add.Tensor, weights, total)
    if when == "weights_late" and "weights_in_16_bits" in spec.odd:
        weights = b.call(aten._to_copy.default, weights, dtype=torch.bfloat16)
    scope = when == "weights_late" and "scope_of_weights" in spec.odd
    if scope:
        _enter(b)
    if when in spec.odd or scope:
        weights = b.call(aten.mul.Tensor, weights, 1.0)
    if scope:
        _exit(b)
    return weights


def _between(b: Builder, index: int, spec: BlockCase, rows: Node, scale: Node, handle: Node) -> tuple[Node, Node]:
    """What stands between dispatch and MLP and does not belong there."""
    for name, node in (("rows_read", rows), ("handle_read", handle), ("row_scale_read", scale)):
        if name in spec.odd:
            b.outputs[f"{name}{index}"] = b.call(aten.sum.default, node)
    if "rows_changed" in spec.odd:
        rows = b.call(aten.mul.Tensor, rows, 2)
    if "handle_other" in spec.odd:
        handle = b.call(aten.mul.Tensor, handle, 1)
    return rows, handle


def _mlp(b: Builder, spec: BlockCase, rows: Node, scale: Node, counts: Node, experts: dict[str, list[Node]]) -> Node:
    how = (spec.activation, spec.limit, spec.alpha, spec.interleaved)
    quantised = {"quantisation": spec.quantisation} if spec.quantisation != "none" else {}
    if "counts_other" in spec.odd:
        counts = b.call(aten.add.Tensor, counts, 0)
    value = None
    if "quantised" in spec.odd:  # the operator takes no quantised rows yet
        with b.fake_mode:
            value = torch.empty_like(rows.meta["val"])
    if "kwargs" in spec.odd:
        last = dict(zip(("activation", "limit", "alpha", "interleaved"), how, strict=True))
        named = {**experts, **last, **quantised}
        return b.call(ops.grouped_mlp.default, rows=rows, row_scale=scale, counts=counts, **named, value=value)
    first = [experts[name] for name in ("w13", "w2", "w13_bias", "w2_bias")]
    beside = {name: nodes for name, nodes in experts.items() if name.endswith(("scale", "offset", "scale_bias"))}
    y = b.call(ops.grouped_mlp.default, rows, scale, counts, *first, *how, **beside, **quantised, value=value)
    if "mlp_twice" in spec.odd:
        y = b.call(ops.grouped_mlp.default, y, scale, counts, *first, *how, **beside, **quantised, value=value)
    return y


def _combine(
    b: Builder, index: int, spec: BlockCase, y_rows: Node, weights: Node, ids: Node, handle: Node, mask: Node | None,
    shared: dict[str, Any],
) -> Node:  # fmt: skip
    if "mlp_read" in spec.odd:
        b.outputs[f"mlp_read{index}"] = b.call(aten.sum.default, y_rows)
    if "mlp_changed" in spec.odd:
        y_rows = b.call(aten.mul.Tensor, y_rows, 2)
    if "ids_other" in spec.odd:
        ids = b.call(aten.clone.default, ids)
    if "mask_at_one_end" in spec.odd:
        mask = None if mask is not None else b.input("mask", *b.lead, dtype=torch.bool)
    if "bound_at_one_end" in spec.odd:
        shared = {**shared, "max_tokens": shared["max_tokens"] + 64}
    if "experts_at_one_end" in spec.odd:
        shared = {**shared, "num_experts": shared["num_experts"] * 2}
    if "no_value" in spec.odd:
        weights.meta.pop("val", None)
    end = {k: v for k, v in shared.items() if k != "max_rows"}
    value = None
    if "no_value" in spec.odd:
        with b.fake_mode:
            value = torch.empty(*b.lead, b.hidden, dtype=b.case.dtype)
    if "kwargs" in spec.odd:
        return b.call(ops.combine.default, y_rows, weights, ids=ids, handle=handle, mask=mask, **end, value=value)
    return b.call(ops.combine.default, y_rows, weights, ids, handle, mask, *end.values(), value=value)


def _enter(b: Builder) -> None:
    import npugraph_ex  # noqa: F401  (defines the scope operators; importable once the simulator is enabled)

    b.call(torch.ops.npugraph_ex.scope_enter.default, ["_user_stream_label"], [b.place], value=())


def _exit(b: Builder) -> None:
    import npugraph_ex  # noqa: F401

    b.call(torch.ops.npugraph_ex.scope_exit.default, value=())


def text(graph: Graph) -> list[str]:
    """A line for each node but the comparison with the other ranks, which is in front of blocks that were left, too."""
    return [
        f"{node.name} {node.target} {node.args} {node.kwargs}"
        for node in graph.nodes
        if node.target is not torch.ops.moe_lowering.assert_agreement.default
    ]
