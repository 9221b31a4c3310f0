"""Graphs of foreign layers: traced with make_fx after functionalisation, lowered, and run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from foreign_forms import Foreign
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moe_lowering import Deployment, MoeLowering
from moe_lowering.report.records import LoweringReport


def trace(function: Callable[..., Any], made: dict[str, Tensor], dynamic: bool = False) -> GraphModule:
    """The graph of ``function(**made)``, with fake values; its inputs are the tensors in their order."""
    names = list(made)

    def positional(*tensors: Tensor) -> Any:
        return function(**dict(zip(names, tensors, strict=True)))

    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    fakes = [_fake(mode, name, tensor, dynamic) for name, tensor in made.items()]
    with torch.no_grad(), mode:
        gm = make_fx(functionalize(positional))(*fakes)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def compiled_graph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[GraphModule, list[Tensor]]:
    """The graph of torch.compile of ``function(*args, **kwargs)``, and the inputs that it ran with."""
    found: dict[str, Any] = {}

    def capture(gm: GraphModule, _: Any) -> Any:
        def call(*inputs: Tensor) -> Any:
            found.update(gm=gm, inputs=list(inputs))
            return gm(*inputs)

        return make_boxed_func(call)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=aot_autograd(fw_compiler=capture), fullgraph=True)(*args, **kwargs)
    return found["gm"], found["inputs"]


def _fake(mode: FakeTensorMode, name: str, tensor: Tensor, dynamic: bool) -> Tensor:
    """With ``dynamic`` the number of tokens is a symbol."""
    if not dynamic:
        return mode.from_tensor(tensor)
    sizes = [DimDynamic.STATIC] * tensor.dim()
    if name in ("x", "weights", "ids"):
        sizes[0] = DimDynamic.DUCK
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def lower(gm: GraphModule, **options: Any) -> LoweringReport:
    lowering = MoeLowering(options.pop("deployment", Deployment()), **options)
    lowering(gm)
    return lowering.reports[-1]


def run(gm: GraphModule, made: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return gm(*made.values())


def lines(gm: GraphModule) -> Sequence[str]:
    """A graph node for node: names, targets, arguments, and readers in their order."""
    return [f"{n.format_node()} {n.args} {n.kwargs} {[*n.users]}" for n in gm.graph.nodes]


def graph_of(layer: Foreign, dynamic: bool = False) -> tuple[GraphModule, dict[str, Tensor]]:
    made = layer.make()
    return trace(layer.function, made, dynamic), made
