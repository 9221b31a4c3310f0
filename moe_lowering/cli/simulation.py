"""Turns the simulator on for a command: what needs torch_npu runs without an NPU, or is a ``UsageError`` where it cannot."""

from __future__ import annotations

from moe_lowering import simulator
from moe_lowering.cli.usage import UsageError


def enable_simulator(soc: str, device: bool = False) -> None:
    """The simulator, and with ``device`` its device, or ``UsageError``: without it nothing can be compiled or run here."""
    try:
        (simulator.enable_device if device else simulator.enable)(soc)
    except simulator.SimulatorError as error:
        raise UsageError(f"the simulator cannot be used: {error}") from error
