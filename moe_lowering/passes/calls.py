"""The calls of a form: each made once, from one function, for judging and for emitting.

A function of the implementation's file gives the arguments of a call by name. Judged, its tensors are records
(``operands.Operand``) and the readers of ``limits/calls`` turn all of it into quantities; emitted, they are nodes. What is
neither here nor there a fact of a call is the context (``context``).

A size is None where a verdict must not rest on it: how many rows a rank has for its experts, which no limit of these
operators is about, and what differs between ranks. Rows of the tables that read it do not apply then; the emitted call
is verified with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.limits import Prover
from moe_lowering.limits.calls.schemas import complete, split
from moe_lowering.passes.emitter import Emitter
from moe_lowering.passes.operands import Operand

Arguments = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Premises:
    """What a verdict rests on beside the block and the deployment.

    Attributes:
        tokens: T as the rules see it: an int, the graph's symbol, or a symbol with the declared range.
        own_tokens: T of this graph.
        prover: what is taken to be known of ``tokens``.
        torch_npu: whether torch_npu's operators are there.
    """

    tokens: Any
    own_tokens: Any
    prover: Prover
    torch_npu: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """A set of rules without an operator, such as ``deployment`` or ``alltoall.static``, and what they read."""

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
        arguments: what it is given, by name; or what makes that, where T takes part.
        words: what the block says and no argument can; None takes a quantity away.
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
