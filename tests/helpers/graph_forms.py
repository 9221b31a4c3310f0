"""The forms of ``graph_cases.FORMS``: how a tensor of the experts is made in a graph, and what the graph is given for it."""

from __future__ import annotations

from typing import Any

import torch
from graph_cases import BlockCase
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten


def per_expert(
    b: Any, spec: BlockCase, which: str, index: int, local: int, shape: tuple[Any, ...], dtype: torch.dtype
) -> list[Node]:
    """A tensor of the experts, one node or one by expert, in its form."""
    form, name = spec.form(which), f"{which}_{index}"
    if form in ("list", "list_computed", "joined"):
        nodes = [b.input(f"{name}_{e}", *shape, dtype=dtype) for e in range(local)]
        if form == "joined":
            return [b.call(aten.stack.default, nodes)]
        return [b.call(aten.clone.default, node) for node in nodes] if form == "list_computed" else nodes
    full = (local, *shape)
    if form == "dynamic":
        sizes = [n if n in (0, 1) else b._size(f"{name}_size{d}", n, (2, None), "dynamic") for d, n in enumerate(full)]
        return [b.input(name, *sizes, dtype=dtype)]
    if form == "part":
        return [b.call(aten.select.int, b.input(name, 2, *full, dtype=dtype), 0, 1)]
    if form == "swapped":
        order = [*range(len(full) - 2), len(full) - 1, len(full) - 2]
        return [b.call(aten.permute.default, b.input(name, *(full[d] for d in order), dtype=dtype), order)]
    if form == "widened":
        wide = b.input(name, *full[:-1], 2 * full[-1], dtype=dtype)
        return [b.call(aten.slice.Tensor, wide, -1, 0, full[-1])]
    node = b.input(name, *full, dtype=dtype)
    if form == "unbound":
        return b.items(b.call(aten.unbind.int, node), local)
    assert form in ("stacked", "computed"), form
    return [node if form == "stacked" else b.call(aten.clone.default, node)]


def given(name: str, form: str, tensor: Tensor) -> dict[str, Tensor]:
    """What a graph is given for a tensor of the experts [E, ...] in one of ``FORMS``."""
    if form in ("list", "list_computed", "joined"):
        return {f"{name}_{e}": one.contiguous() for e, one in enumerate(tensor)}
    other = torch.zeros_like(tensor)
    made = {
        "part": lambda: torch.stack([other, tensor]),
        "swapped": lambda: tensor.transpose(-2, -1).contiguous(),
        "widened": lambda: torch.cat([tensor, other], dim=-1),
    }.get(form, lambda: tensor)()
    return {name: made}
