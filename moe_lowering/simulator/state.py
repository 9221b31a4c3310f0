"""The SoC that this process simulates. ``enable()`` sets it under its lock; the kernels read it."""

from __future__ import annotations

from moe_lowering.simulator.standins import SimulatorError

VARIABLE = "MOE_LOWERING_SIMULATOR"  # the SoC, in a program of `moe-lowering simulate` and in all that it starts

loaded: str | None = None  # the SoC that the libraries in this process stand in for; they cannot be unloaded
enabled = False


def is_enabled() -> bool:
    """Whether ``enable()`` has completed in this process."""
    return enabled


def soc() -> str:
    """The SoC that is simulated in this process."""
    if not enabled or loaded is None:
        raise SimulatorError("the simulator is not enabled in this process; call moe_lowering.simulator.enable() first")
    return loaded
