"""Records of a lowered block's sizes, as numbers or symbols with the user's names, and of the HCCL window it needs."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_lowering.limits import TokenRange
from moe_lowering.limits.wording import Names, Value, names_in, show, to_json


def fields_of(record: Any) -> dict[str, Any]:
    """The fields of a record by name, as they are."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


@dataclasses.dataclass(frozen=True)
class Size:
    """A number, or an expression in the sizes of the user's arguments, and the largest value that it may have.

    ``most`` is None when nothing bounds it. ``names`` are the user's names of the symbols.
    """

    value: Value
    most: int | None
    names: Names = ()

    @property
    def fixed(self) -> bool:
        """Whether it is one number."""
        return isinstance(self.value, int)

    def __str__(self) -> str:
        return show(self.value, self.names)

    def named(self, names: Names) -> Size:
        """The same with the user's names of its symbols."""
        return dataclasses.replace(self, names=names_in(names, self.value))

    def to_json(self) -> dict[str, Any]:
        return {"value": to_json(self.value, self.names), "most": self.most}


@dataclasses.dataclass(frozen=True)
class Window:
    """What one rule says of the HCCL window: bytes ``needed`` of ``accepted``; ``needed_mb`` of HCCL_BUFFSIZE would do.

    ``unit`` says what is counted, e.g. ``bytes (a third of HCCL_BUFFSIZE)``; ``needed_mb`` is None without a bound.
    """

    code: str
    needed: Size
    accepted: int
    unit: str
    needed_mb: int | None

    def to_json(self) -> dict[str, Any]:
        return {**fields_of(self), "needed": self.needed.to_json()}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a lowered block, as the rules saw them: proven for every T from ``low`` to ``high``.

    Attributes:
        tokens: T, the tokens of one rank.
        low, high: the range of T that everything was proven for; high is None when there is no bound.
        bound: the most tokens of any rank; None when there is no bound.
        capacity: tokens of one rank of the TP group, rounded up.
        received: rows that one rank receives at most.
        exchanged: rows that the equal-split AllToAll sends each rank, one for a token or, in buffers, for each of its choices;
            None elsewhere.
        max_output_size: rows that a fused operator may process on one rank; None where it is not told.
        windows: of the rules on the HCCL window. buffer_bytes: HCCL_BUFFSIZE in bytes.
        tp_size: ranks of the TP group; with one, ``capacity`` says nothing that ``tokens`` and ``bound`` do not.
    """

    tokens: Size
    low: int
    high: int | None
    bound: int | None
    capacity: Size
    received: Size
    exchanged: Size | None
    max_output_size: int | None
    windows: tuple[Window, ...]
    buffer_bytes: int
    tp_size: int = 1

    @property
    def range(self) -> str:
        """The range of T in words."""
        return f"T = {self.low}" if self.low == self.high else str(TokenRange(self.low, self.high))

    def named(self, names: Names) -> Sizes:
        """The same with the user's names of the symbols."""
        return dataclasses.replace(
            self,
            tokens=self.tokens.named(names),
            capacity=self.capacity.named(names),
            received=self.received.named(names),
            exchanged=None if self.exchanged is None else self.exchanged.named(names),
            windows=tuple(dataclasses.replace(w, needed=w.needed.named(names)) for w in self.windows),
        )

    def to_json(self) -> dict[str, Any]:
        record = {n: v.to_json() if isinstance(v, Size) else v for n, v in fields_of(self).items()}
        del record["tp_size"]  # stands with the deployment
        return {**record, "windows": [window.to_json() for window in self.windows], "range": self.range}
