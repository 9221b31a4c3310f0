"""Carries out ``moe-lowering simulate``: builds the simulator's libraries, then becomes the program."""

from __future__ import annotations

import os
from typing import NoReturn

from moe_lowering import simulator
from moe_lowering.cli.simulate.request import SimulateRequest
from moe_lowering.cli.usage import UsageError
from moe_lowering.simulator import imports


def run_simulate(request: SimulateRequest) -> NoReturn:
    """Replace this process by the program.

    Raises:
        UsageError: the simulator cannot be used here, or the program cannot be started.
    """
    try:
        simulator.prepare(request.soc)
    except simulator.SimulatorError as error:
        raise UsageError(f"the simulator cannot be used: {error}") from error
    program, *_ = request.command
    try:
        os.execvpe(program, list(request.command), imports.environment(request.soc, dict(os.environ), request.devices))
    except OSError as error:
        raise UsageError(
            f"argument PROGRAM: {program} cannot be started ({error.strerror}); accepted: a program on PATH, or the path of one"
        ) from error
