"""Whether a node of a graph exchanges data with other ranks: the one rule, and a wider one for those who must not miss any.

1. ``communicates``: collectives, and operators that take the name of a communicator. The record that ranks compare lists these
   of each block (``passes/agreement_check.py``), and GE must not drop them (``backends/ge_rewrites.py``).
2. ``may_communicate``: also what waits for a collective, and every operator of this package that may stand for a block. A
   shared expert is moved to another stream only where nothing of it may (``passes/overlap_region.py``).

An operator that nobody knows counts as communicating when a text among its arguments is called like a group.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.limits.calls.schemas import COLLECTIVES

_WAIT = "wait_tensor"
# Operators of this package that are about the graph itself; ``assert_agreement`` compares by the store, without a collective.
_CHECKS = frozenset({"assert_agreement", "assert_tokens", "ge_assert_tokens", "ge_keep", "keep_alive"})
_TEXTS = ("str", "Optional[str]")
_NO_GROUPS = frozenset({"group_score"})  # of ``route``: how groups of experts are scored


def communicates(node: Node) -> bool:
    """Whether a node exchanges data with other ranks."""
    return isinstance(node.target, torch._ops.OpOverload) and _is_exchange(node.target)


def may_communicate(node: Node) -> bool:
    """``communicates``, or the node waits for an exchange, or is of this package and may stand for a block or part of one."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target.namespace == "moe_lowering":
        return target._opname not in _CHECKS
    return target.namespace in COLLECTIVES or _is_exchange(target)


@functools.lru_cache(maxsize=1024)
def _is_exchange(target: torch._ops.OpOverload) -> bool:
    if target.namespace in COLLECTIVES:
        return target._opname != _WAIT
    if target.namespace == "moe_lowering" and target._opname in _CHECKS:
        return False
    return any(_names_group(argument) for argument in target._schema.arguments)


def _names_group(argument: Any) -> bool:
    """``group_ep``, ``ep_group``, ``hcom``, ``comm_alg``; ``group_list`` of a grouped matmul is no text."""
    if str(argument.type) not in _TEXTS or argument.name in _NO_GROUPS:
        return False
    return "group" in argument.name or "hcom" in argument.name or argument.name.startswith("comm")
