"""Whole numbers that a graph itself holds: literals of a model, such as a table of experts, and buffers that are no inputs.

They may refuse a layer, never permit one: a buffer may be written before the graph runs.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

_MOST = 1 << 16  # numbers that are read: ids of more tokens are not
_WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def stored_numbers(node: Node) -> list[int] | None:
    """The numbers of a ``get_attr`` node, flat; None of another node, and of what is not on the host or not known yet."""
    module = node.graph.owning_module
    if node.op != "get_attr" or module is None or not isinstance(node.target, str):
        return None
    value: object = module
    for name in node.target.split("."):
        value = getattr(value, name, None)
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or value.device.type != "cpu":
        return None
    if value.dtype not in _WHOLE or value.numel() > _MOST:
        return None
    with _disable_current_modes():
        return [int(number) for number in value.detach().reshape(-1).tolist()]
