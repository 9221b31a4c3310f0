"""The record of one ``simulate`` command, as its parser makes it. Imports no torch."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SimulateRequest:
    """One ``simulate`` command: a program, and the devices that it finds."""

    command: tuple[str, ...]
    soc: str = "A3"
    devices: int = 1
    taken_as: tuple[str, ...] = ()
