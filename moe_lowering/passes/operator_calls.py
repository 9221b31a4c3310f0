"""Calls of operators as data: an implementation's form makes each call once, for legality and for the rewrite alike.

A function of the implementation's file gives the arguments of a call by name. For legality its tensors are records
(``operands.Operand``), and the readers of ``limits/calls`` turn them into quantities; for the rewrite they are nodes. What
rules read beside the arguments comes from ``context``.

A size is None where a verdict must not depend on it: the rows that a rank has for its experts, which no limit of these
operators is about, and what differs between ranks. Rules that read it are left out then; the emitted call is verified with
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.limits import Prover
from moe_lowering.limits.calls.schemas import complete, split
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.operands import Operand

Arguments = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Premises:
    """What a verdict depends on beside the block and the deployment.

    Attributes:
        tokens: T as the rules see it: an int, the graph's symbol, or a symbol with the declared range.
        own_tokens: T of this graph.
        prover: knows the range of ``tokens``.
        torch_npu: whether torch_npu's operators are there.
    """

    tokens: Any
    own_tokens: Any
    prover: Prover
    torch_npu: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """A set of rules that belongs to no operator, such as ``deployment`` or ``alltoall.static``, and the quantities
    that they read."""

    operator: str
    quantities: Mapping[str, Any] | Callable[[Premises], Mapping[str, Any]]

    @property
    def reads_tokens(self) -> bool:
        return callable(self.quantities)

    def read(self, premises: Premises) -> dict[str, Any]:
        """The quantities by name."""
        return dict(self.quantities(premises) if callable(self.quantities) else self.quantities)


@dataclasses.dataclass(frozen=True, eq=False)
class OperatorCall:
    """One call of an operator.

    Attributes:
        operator: its name without namespace.
        arguments: the arguments by name; or, where they depend on T, a function that makes them.
        words: quantities that follow from the block and that no argument shows; None removes a quantity.
    """

    operator: str
    arguments: Arguments | Callable[[Premises], Arguments]
    words: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def reads_tokens(self) -> bool:
        return callable(self.arguments)

    def bound(self, premises: Premises | None = None) -> dict[str, Any]:
        """Every argument of the schema by name. Without premises only of a call that does not read T."""
        if not callable(self.arguments):
            return complete(self.operator, self.arguments)
        assert premises is not None
        return complete(self.operator, self.arguments(premises))


def emit_call(emit: Emitter, operator: str, arguments: Arguments) -> Node:
    """The node of a call with these arguments, nodes for its tensors."""
    args, kwargs = split(operator, arguments)
    return emit.call(emit.target(operator), *args, **kwargs)


def tensor(dtype: torch.dtype, *shape: Any) -> Operand:
    """The record of a tensor that the graph computes; sizes may be symbolic, None where they are not judged."""
    return Operand(shape, dtype, stored=False)
