"""Synthetic graphs of MoE models: FX nodes with fake values, built directly, as AOT autograd would hand them to the pass.

One layer is F filler operators (adds and matrix products) and one MoE block: router > route > dispatch > grouped_mlp >
combine > residual. Every node has a FakeTensor of its own in ``meta["val"]`` and the module stack of its layer. The
first layer's values come from running the operators under the fake mode; the others are copies of them, so that a
graph of 512 layers is built in seconds. Group names name nothing: judging and rewriting resolve no process group.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_arg
from torch.utils._mode_utils import no_dispatch

import moe_lowering.custom_ops  # noqa: F401  (registers torch.ops.moe_lowering)
from moe_lowering import Deployment

aten = torch.ops.aten
ops = torch.ops.moe_lowering
DEPLOYMENT = Deployment(
    soc="A3", ep_size=16, ep_rank=0, ep_group="ep", mc2_group="mc2", max_tokens=128, hccl_buffer_mb=4096, weight_format="nz",
    providers=(("vllm_ascend", "0.23.0"),),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a synthetic model; those of DeepSeek-V3's MoE layers on 16 ranks unless told otherwise."""

    layers: int
    filler: int = 20
    symbolic: bool = False
    blocks: bool = True
    tokens: int = 64
    hidden: int = 7168
    intermediate: int = 2048
    experts: int = 256
    top_k: int = 8

    @property
    def local_experts(self) -> int:
        return self.experts // DEPLOYMENT.ep_size


class _Builder:
    """Adds nodes with values: computed in the first layer, copied from it in the others."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.graph = Graph()
        self.fake_mode = FakeTensorMode(shape_env=ShapeEnv() if shape.symbolic else None)
        self.tokens: Any = self._symbol() if shape.symbolic else shape.tokens
        self._layer = 0
        self._values: list[Any] = []
        self._next = 0

    def _symbol(self) -> torch.SymInt:
        from torch._dynamo.source import ConstantSource

        env, source = self.fake_mode.shape_env, ConstantSource("T")
        symbol = env.create_symbol(self.shape.tokens, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        return env.create_symintnode(symbol, hint=self.shape.tokens, source=source)

    def start_layer(self, layer: int) -> None:
        self._layer, self._next = layer, 0

    def input(self, name: str, *sizes: Any, dtype: torch.dtype = torch.bfloat16) -> Node:
        node = self.graph.placeholder(name)
        with no_dispatch():
            meta = torch.empty(sizes, dtype=dtype, device="meta")
        node.meta["val"] = FakeTensor(self.fake_mode, meta, torch.device("cpu"))
        return node

    def call(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        path = f"model.layers.{self._layer}.mlp"
        node.meta["nn_module_stack"] = {f"mlp_{self._layer}": (f"L['self'].{path}", torch.nn.Module)}
        node.meta["stack_trace"] = f'File "model.py", line 1, in forward  # {path}'
        node.meta["val"] = self._value(node)
        return node

    def _value(self, node: Node) -> Any:
        if node.target is operator.getitem:
            return node.args[0].meta["val"][node.args[1]]
        if self._layer:
            self._next += 1
            return fresh(self._values[self._next - 1])
        with self.fake_mode:
            value = node.target(*map_arg(node.args, lambda n: n.meta["val"]))
        self._values.append(value)
        return value


def fresh(value: Any) -> Any:
    """A value with the same metadata and a storage of its own."""
    if isinstance(value, tuple):
        return tuple(fresh(v) for v in value)
    with no_dispatch():
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return FakeTensor(value.fake_mode, meta, value.device)


def build(shape: Shape, kind: type[GraphModule] = _LazyGraphModule) -> GraphModule:
    """A graph module of ``shape.layers`` layers, with blocks or with filler only; unless ``kind`` says otherwise of
    the class that hooks of a compile get, whose code is made when somebody asks for it and not by each ``recompile``."""
    b = _Builder(shape)
    if shape.symbolic:
        b.graph.placeholder("T").meta["val"] = b.tokens
    weights = [_weights(b, layer) for layer in range(shape.layers)]
    x = b.input("x", b.tokens, shape.hidden)
    for layer in range(shape.layers):
        b.start_layer(layer)
        x = _filler(b, x, weights[layer]["dense"])
        if shape.blocks:
            x = _block(b, x, weights[layer])
    b.graph.output((x,)).meta["val"] = (x.meta["val"],)
    return kind(torch.nn.Module(), b.graph)


def _weights(b: _Builder, layer: int) -> dict[str, Node]:
    s = b.shape
    sizes: dict[str, tuple[int, ...]] = {"dense": (s.hidden, s.hidden)}
    if s.blocks:
        sizes["gate"] = (s.hidden, s.experts)
        sizes["w13"] = (s.local_experts, s.hidden, 2 * s.intermediate)
        sizes["w2"] = (s.local_experts, s.intermediate, s.hidden)
    return {name: b.input(f"{name}_{layer}", *size) for name, size in sizes.items()}


def _filler(b: _Builder, x: Node, dense: Node) -> Node:
    for i in range(b.shape.filler):
        x = b.call(aten.mm.default, x, dense) if i % 4 == 3 else b.call(aten.add.Tensor, x, x)
    return x


def _block(b: _Builder, x: Node, weights: dict[str, Node]) -> Node:
    s, d = b.shape, DEPLOYMENT
    logits = b.call(aten.mm.default, x, weights["gate"])
    routed = b.call(ops.route.default, logits, None, s.top_k, "softmax", True, 1, 1, "max", 1.0)
    routing, ids = (b.call(operator.getitem, routed, i) for i in range(2))
    shared = (s.experts, d.ep_group, d.ep_size, d.tp_group, d.tp_size, d.token_bound)
    sent = b.call(ops.dispatch.default, x, None, ids, None, *shared, d.max_rows)
    rows, scale, counts, handle = (b.call(operator.getitem, sent, i) for i in range(4))
    y_rows = b.call(
        ops.grouped_mlp.default, rows, scale, counts, [weights["w13"]], [weights["w2"]], [], [], "swiglu", 0.0, 1.702,
        False,
    )  # fmt: skip
    y = b.call(ops.combine.default, y_rows, routing, ids, handle, None, *shared)
    return b.call(aten.add.Tensor, x, y)
