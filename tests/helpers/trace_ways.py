"""The ways in which graphs are made elsewhere: torch.export before and after decompositions, and make_fx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx


class Layer(nn.Module):
    """A function of named tensors as a module of tensors in their order."""

    def __init__(self, function: Callable[..., Any], names: list[str]) -> None:
        super().__init__()
        self._function, self._names = function, names

    def forward(self, *tensors: Tensor) -> Any:
        return self._function(**dict(zip(self._names, tensors, strict=True)))


def export(layer: Layer, args: tuple[Tensor, ...], dynamic: bool = False) -> Any:
    tokens = torch.export.Dim("tokens", min=2, max=512)
    by_token = ({0: tokens} if name in ("x", "weights", "ids") else None for name in layer._names)
    shapes = (tuple(by_token),) if dynamic else None
    return torch.export.export(layer, args, dynamic_shapes=shapes, strict=False)


WAYS: dict[str, Callable[[Layer, tuple[Tensor, ...]], GraphModule]] = {
    "export": lambda layer, args: export(layer, args).module(),
    "export, dynamic": lambda layer, args: export(layer, args, dynamic=True).module(),
    "export, decomposed": lambda layer, args: export(layer, args).run_decompositions().module(),
    "export, functional": lambda layer, args: export(layer, args).run_decompositions({}).module(),
    "make_fx": lambda layer, args: make_fx(layer)(*args),
    "make_fx, fake": lambda layer, args: make_fx(layer, tracing_mode="fake")(*args),
    "make_fx, before dispatch": lambda layer, args: make_fx(layer, tracing_mode="fake", pre_dispatch=True)(*args),
    "functionalize": lambda layer, args: make_fx(functionalize(layer), tracing_mode="fake")(*args),
    "functionalize, no views": lambda layer, args: make_fx(
        functionalize(layer, remove="mutations_and_views"), tracing_mode="fake"
    )(*args),
}


def trace_by(way: str, function: Callable[..., Any], made: dict[str, Tensor]) -> GraphModule:
    with torch.no_grad():
        return WAYS[way](Layer(function, [*made]), tuple(made.values()))
