"""What a user's cost function is asked about. Without one, implementations are priced from their nodes (``price``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Load:
    """What is to be done: one block on one rank. ``tokens`` are those that it works on.

    ``width`` is the bytes of one element of a row, averaged over both ways; ``weight_width`` those of a weight.
    """

    soc: str
    ep_size: int
    tokens: int
    hidden: int
    intermediate: int
    top_k: int
    local_experts: int
    width: float
    weight_width: float


# The name of an implementation and the load, to microseconds.
Cost = Callable[[str, Load], float]
