"""Records of what is left in a lowered graph: MoE layers that were not raised, and what prevents its capture."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_lowering.report.schemas import json_fields


@dataclasses.dataclass(frozen=True)
class NotRaised:
    """Why an operator of an MoE layer that others wrote was not raised.

    Attributes:
        node: its name in the graph. line: the model's line; "" when it is not known.
        code: ``raise.*``.
        seen, expected: in words.
    """

    node: str
    line: str
    code: str
    seen: str
    expected: str

    def __str__(self) -> str:
        line = f", at {self.line}" if self.line else ""
        return f"[{self.code}] {self.seen}; expected: {self.expected}{line}"


@dataclasses.dataclass(frozen=True)
class NotCapturable:
    """Something in a graph that keeps an NPU graph of it from being captured.

    Attributes:
        place: the module of the model, or the node's name.
        line: the model's line, ``file:line in function: text``; "" when it is not known.
        operator: what was called, e.g. ``aten::nonzero``; of an input, ``placeholder`` and its name.
        code: which rule, ``capture.*``.
        reason: why it cannot be captured.
        advice: what the user could change.
    """

    place: str
    line: str
    operator: str
    code: str
    reason: str
    advice: str

    def __str__(self) -> str:
        line = f"; at {self.line}" if self.line else ""
        return f"{self.place}: [{self.code}] {self.reason} ({self.advice}){line}"

    def to_json(self) -> dict[str, Any]:
        return json_fields(self)


@dataclasses.dataclass(frozen=True)
class ForeignMoe:
    """An MoE layer that the pass cannot lower, since it is not written with the generic operators.

    Attributes:
        place: the module of the model, or the node's name.
        line: the model's line, ``file:line in function: text``; "" when it is not known.
        operators: (name, how often) of what it was known by, e.g. ``aten._grouped_mm``.
        code: which form, ``foreign.*``.
        reason: what was seen.
        advice: what the user could change.
        not_raised: why it was not raised, of a form that can be.
    """

    place: str
    line: str
    operators: tuple[tuple[str, int], ...]
    code: str
    reason: str
    advice: str
    not_raised: NotRaised | None = None

    @property
    def why(self) -> str:
        """All but place and line, in one sentence."""
        operators = ", ".join(f"{count} x {name}" for name, count in self.operators)
        raised = f"; not raised: {self.not_raised}" if self.not_raised is not None else ""
        return f"[{self.code}] {self.reason}: {operators}{raised} ({self.advice})"

    def __str__(self) -> str:
        return f"{self.place}: {self.why}" + (f"; at {self.line}" if self.line else "")

    def to_json(self) -> dict[str, Any]:
        return json_fields(self)
