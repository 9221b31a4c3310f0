"""``Builder``: nodes with fake values, one by one, as AOT autograd would hand them over; sizes that are symbols of a ShapeEnv."""

from __future__ import annotations

import operator
import types
from typing import Any

import sympy
import torch
from graph_cases import GraphCase
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.fx.node import map_arg
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges


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
