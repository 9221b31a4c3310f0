"""Names of what nodes call, as reports have them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Node


def operator_name(node: Node) -> str:
    """``namespace.name`` of an operator, the name of a function."""
    return _name(node.target)


@functools.lru_cache(maxsize=1024)
def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.replace("::", ".")
    return getattr(target, "__name__", str(target))
