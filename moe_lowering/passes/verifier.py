"""Checks of a rewrite: a replacement gives what the block gave, and every Ascend call is within its limits.

Per block, before anything is erased: each result has the shape, dtype and device of the value it stands for, results
exist before their readers, and each Ascend node satisfies its rows in ``limits/``. For the whole graph: no generic
operator is left that the report does not name. Strict mode and tests also re-propagate fake tensors. A failed check is a
``VerificationError``, upon which the caller undoes the block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from moe_lowering.deployment import Deployment
from moe_lowering.limits import Prover, Violation, check
from moe_lowering.limits.calls import OPERATORS, PER_TOKEN, bind, varying_ints
from moe_lowering.limits.calls.schemas import COLLECTIVES, LIBRARIES
from moe_lowering.limits.wording import Wording, make_wording
from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.context import call_quantities, fixed_context

GENERIC = ("route", "dispatch", "grouped_mlp", "combine")


class VerificationError(RuntimeError):
    """A replacement that does not give what the block gave. The message names the place and the difference; ``wording``
    holds the quantities."""

    def __init__(self, wording: Wording | str) -> None:
        self.wording = make_wording("{text}", text=wording) if isinstance(wording, str) else wording
        super().__init__(str(self.wording))


def same_value(old: Node, new: Node) -> None:
    """Raise VerificationError unless ``new`` has the shape, dtype and device of ``old``."""
    a, b = old.meta["val"], new.meta["val"]
    if not _same_shape(a, b) or a.dtype != b.dtype or a.device != b.device:
        raise VerificationError(
            make_wording(
                "{old} is {old_shape} {old_kind}, its replacement {new} is {new_shape} {new_kind}",
                old=old.name,
                old_shape=tuple(a.shape),
                old_kind=f"{a.dtype} on {a.device}",
                new=new.name,
                new_shape=tuple(b.shape),
                new_kind=f"{b.dtype} on {b.device}",
            )
        )


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal sizes for all values of the symbols. Comparing SymInts costs 30 us; most are the same expression."""
    if not (a._has_symbolic_sizes_strides or b._has_symbolic_sizes_strides):
        return a.shape == b.shape
    return a.dim() == b.dim() and all(map(_same_size, a.shape, b.shape))


def _same_size(a: Any, b: Any) -> bool:
    """Also where torch has guarded that an expression is one number, and some values have it and some the expression."""
    if type(a) is int and type(b) is int:  # asked of every block: numbers need no look at symbols
        return a == b
    return size_key(a) == size_key(b) or statically_known_true(a == b)


def defined_before_readers(readers: Iterable[Node], old: Node, new: Node) -> None:
    """Raise VerificationError when a reader of ``old`` stands before ``new``."""
    for reader in readers:
        if reader < new:
            raise VerificationError(f"{reader.name} reads {old.name} before its replacement {new.name} can exist")


def call_violations(
    node: Node,
    deployment: Deployment,
    prover: Prover | None = None,
    tokens: tuple[Any, Any] | None = None,
    context: Mapping[str, Any] | None = None,
) -> list[Violation]:
    """Limits that one node of a lowered graph breaks; empty for nodes that are no Ascend operator or collective.

    Args:
        deployment: its SoC and versions, and the format of stored weights.
        tokens: see ``emitted_quantities``.
        context: what its block was judged with (``context.call_context``); None where its block is not known.
    """
    read_call = emitted_quantities(node, deployment, tokens, context)
    if read_call is None:
        return []
    target, name, bound, quantities = read_call
    return [*varying_ints(target, name, bound), *check(name, deployment.soc, quantities, prover, deployment.versions)]


def emitted_quantities(
    node: Node,
    deployment: Deployment,
    tokens: tuple[Any, Any] | None = None,
    context: Mapping[str, Any] | None = None,
) -> tuple[torch._ops.OpOverload, str, dict[str, Any], dict[str, Any]] | None:
    """(operator, its name, its arguments, what its rules read) of a node; None where no rules are about it.

    Args:
        tokens: (T of this rank, T as the rules see it): the first is read as the second, so that the check does not
            depend on a rank's own token count.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.split("::")[1]
    if not is_ascend(target) and not (name in OPERATORS and target.namespace in COLLECTIVES):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    bound, nodes = bind(target, args, kwargs), bind(target, node.args, node.kwargs)
    known = fixed_context(deployment) if context is None else context
    quantities = call_quantities(name, bound, nodes, deployment, known)
    if tokens is not None:
        _read_tokens(quantities, *tokens)
    return target, name, bound, quantities


def _read_tokens(quantities: dict[str, Any], own: Any, own_tokens: Any) -> None:
    """Sizes that are T of this rank, to T as the rules see it."""
    if "tokens" not in quantities:
        return  # of rows, which may be T by chance
    for quantity in PER_TOKEN.keys() & quantities.keys():
        factor = PER_TOKEN[quantity]
        each = 1 if factor is None else quantities[factor]
        if _same_size(quantities[quantity], own * each):
            quantities[quantity] = own_tokens * each


def is_ascend(target: torch._ops.OpOverload) -> bool:
    """An operator of torch_npu, one of a model's library that is known, or our wrapper of a provider's operator."""
    namespace, _, name = target._schema.name.partition("::")
    # Without limits of their own
    ours = (*GENERIC, "assert_agreement", "assert_tokens", "keep_alive", "alltoall_experts")
    return namespace in ("npu", LIBRARIES.get(name)) or (namespace == "moe_lowering" and name not in ours)


def generic_nodes(nodes: Iterable[Node]) -> list[Node]:
    """Generic operators among the nodes."""
    return [node for node in nodes if is_generic(node)]


def is_generic(node: Node) -> bool:
    """Whether a node calls a generic operator."""
    return id(node.target) in _generic_targets()


@functools.cache
def _generic_targets() -> dict[int, Any]:
    """By id, since an operator's own hash is Python code; as values they stay alive, so that no other object has these ids."""
    targets = [getattr(torch.ops.moe_lowering, name).default for name in GENERIC]
    return {id(target): target for target in targets}


def repropagate(gm: GraphModule) -> None:
    """Run fake tensors through the whole graph and compare with ``meta["val"]``. Slow: strict mode and tests only.

    Raises:
        VerificationError: when a node's value differs from its metadata.
    """
    placeholders = [node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder"]
    fake_mode = torch._guards.detect_fake_mode(placeholders)
    if fake_mode is None:
        return
    before = {node: node.meta.get("val") for node in gm.graph.nodes}
    try:
        FakeTensorProp(gm, fake_mode).propagate_dont_convert_inputs(*placeholders)
        for node, old in before.items():
            _compare(node, old, node.meta.get("val"))
    finally:
        for node, old in before.items():
            if old is not None:
                node.meta["val"] = old


def _compare(node: Node, old: Any, new: Any) -> None:
    if isinstance(old, (list, tuple)):
        for a, b in zip(old, new, strict=True):
            _compare(node, a, b)
    elif isinstance(old, torch.Tensor) and (not _same_shape(old, new) or old.dtype != new.dtype):
        raise VerificationError(
            f"{node.name}: metadata says {tuple(old.shape)} {old.dtype}, propagation {tuple(new.shape)} {new.dtype}"
        )
