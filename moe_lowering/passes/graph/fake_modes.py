"""The one fake mode that a graph's values must have, since an operator takes no values of two.

``make_fx`` of real tensors gives each value a mode of its own. Such values are made anew in one mode, as far as all they
say is sizes that are known, strides, dtype and device: their storages are apart already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves, tree_map_only

NO_VALUES = "the graph has no fake values (meta['val']): nothing can be proven"
MIXED = (
    "the graph's values (meta['val']) are of several fake modes and of sizes that are not known: nothing can be proven"
)


def join_fake_modes(graph: Graph) -> FakeTensorMode | str:
    """The fake mode of a graph's values, which is made one where it is not; or why there is none."""
    inputs = graph.find_nodes(op="placeholder")
    given = [leaf for node in inputs for leaf in _leaves(node)]
    fake = [leaf for leaf in given if isinstance(leaf, FakeTensor)]
    if len(fake) < len(given) and any(
        isinstance(leaf, torch.Tensor) for leaf in given if not isinstance(leaf, FakeTensor)
    ):
        return NO_VALUES
    at_ends = [*fake, *_fake_values(graph.output_node().all_input_nodes)]
    modes = {value.fake_mode for value in at_ends}
    if len(modes) < 2:
        mode: FakeTensorMode | None = torch._guards.detect_fake_mode(at_ends[:1])  # all are of one mode
        return NO_VALUES if mode is None else mode
    if not all(map(_is_plain, _fake_values(graph.nodes))):
        return MIXED
    mode = modes.pop()
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(FakeTensor, lambda value: _make_again(value, mode), node.meta["val"])
    return mode


def _fake_values(nodes: Any) -> Iterator[FakeTensor]:
    for node in nodes:
        yield from (leaf for leaf in _leaves(node) if isinstance(leaf, FakeTensor))


def _leaves(node: Node) -> list[Any]:
    """What the value of a node is made of; the value itself of most, without a walk through it."""
    value = node.meta.get("val")
    return [value] if isinstance(value, FakeTensor) else tree_leaves(value)


def _is_plain(value: FakeTensor) -> bool:
    sizes = (*value.shape, *value.stride()) if value.layout is torch.strided else (None,)
    return all(isinstance(size, int) for size in sizes)


def _make_again(value: FakeTensor, mode: FakeTensorMode) -> FakeTensor:
    if value.fake_mode is mode:
        return value
    with mode:
        made: Any = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made
