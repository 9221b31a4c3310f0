"""Imported by the process that ranks are forked from, for ``ranks.fork_from_imports``: what every rank of a simulated machine
does first is done once. Nothing here starts a thread or touches device npu, which a fork would not have."""

from __future__ import annotations

import contextlib
import os

from moe_lowering import simulator
from moe_lowering.limits import table
from moe_lowering.testing import ranks

if _soc := os.environ.get(ranks.FORKED_SOC):
    with contextlib.suppress(simulator.SimulatorError):  # each rank's own call of enable() says it
        simulator.enable(_soc)
table.load()
