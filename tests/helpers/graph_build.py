"""Graph modules of ``graph_cases``: FX nodes with fake values, as AOT autograd would hand them over, without tracing.

Every node but the inputs carries the module path of its block (``layers.0``), or ``residual``.
"""

from __future__ import annotations

import dataclasses
import operator
import types
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from graph_cases import BlockCase, GraphCase
from graph_forms import per_expert
from graph_quantised import PACKED, dtypes, extras
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.fx.node import map_arg
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

import moe_lowering.custom_ops  # noqa: F401  (registers torch.ops.moe_lowering)
from moe_lowering import Deployment

aten, ops = torch.ops.aten, torch.ops.moe_lowering


@dataclasses.dataclass(frozen=True)
class Built:
    """A graph module, the names of its outputs in order, its ShapeEnv (None when all is static)."""

    gm: GraphModule
    outputs: tuple[str, ...]
    env: ShapeEnv | None


class Builder:
    """Adds nodes with computed values; what is made under ``place`` carries that module path."""

    def __init__(self, case: GraphCase) -> None:
        self.case, self.graph, self.place = case, Graph(), "model"
        dynamic = any(form == "dynamic" for block in case.blocks for _, form in block.forms)
        self.env = ShapeEnv() if case.sizes != "static" or case.symbolic_hidden or dynamic else None
        self.fake_mode = FakeTensorMode(shape_env=self.env)
        self.inputs: dict[str, Node] = {}
        self.outputs: dict[str, Node] = {}
        self.chained: Node | None = None  # x of the next block
        kinds = [case.sizes if flag else "static" for flag in case.symbolic]
        self.lead = tuple(
            self._size(f"T{d}", n, case.bounds, kind) for d, (n, kind) in enumerate(zip(case.lead, kinds, strict=True))
        )
        hidden = "static" if not case.symbolic_hidden else "unbacked" if case.sizes == "unbacked" else "dynamic"
        self.hidden = self._size("hidden", case.hidden, (1, None), hidden)

    def _size(self, name: str, hint: int, bounds: tuple[int, int | None], kind: str) -> Any:
        """A size, an input of the graph unless it is static."""
        if kind == "static":
            return hint
        assert self.env is not None
        span = ValueRanges(sympy.Integer(bounds[0]), int_oo if bounds[1] is None else sympy.Integer(bounds[1]))
        if kind == "unbacked":
            size = self.env.create_unbacked_symint()
            self.env.pending_fresh_unbacked_symbols.clear()  # it is an input here, and no operator's result
        else:
            source = ConstantSource(name)
            symbol = self.env.create_symbol(
                hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, positive=None,
                do_not_specialize_zero_one=True,
            )  # fmt: skip
            size = self.env.create_symintnode(symbol, hint=hint, source=source)
        self.env.var_to_range[size.node.expr] = span
        if kind == "strict":  # as mark_dynamic(min, max) leaves it
            fake = types.SimpleNamespace(shape=(size,))
            context = types.SimpleNamespace(constraint_sizes=[StrictMinMaxConstraint(warn_only=False, vr=span)])
            tracked = types.SimpleNamespace(fake=fake, symbolic_context=context)
            self.env.tracked_fakes = [*(self.env.tracked_fakes or ()), tracked]
        self._placeholder(name, size)
        return size

    def _placeholder(self, name: str, value: Any) -> Node:
        """An input, before all calls."""
        before = next((n for n in self.graph.nodes if n.op != "placeholder"), self.graph._root)
        with self.graph.inserting_before(before):
            node = self.inputs[name] = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def input(self, name: str, *sizes: Any, dtype: torch.dtype | None = None) -> Node:
        """An input of the graph; the same one for the same name."""
        if name in self.inputs:
            return self.inputs[name]
        meta = torch.empty(sizes, dtype=dtype or self.case.dtype, device="meta")
        return self._placeholder(name, FakeTensor(self.fake_mode, meta, torch.device("cpu")))

    def call(self, target: Any, *args: Any, value: Any = None, **kwargs: Any) -> Node:
        """A call; its value is computed unless given."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["nn_module_stack"] = {self.place: (f"L['self'].{self.place}", torch.nn.Module)}
        node.meta["stack_trace"] = f"in {self.place}"
        if value is None:
            given, named = map_arg((args, kwargs), lambda n: n.meta["val"])
            with self.fake_mode:
                value = target(*given, **named)
        node.meta["val"] = value
        return node

    def items(self, node: Node, count: int) -> list[Node]:
        return [self.call(operator.getitem, node, i, value=node.meta["val"][i]) for i in range(count)]


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
