"""The process that ranks are forked from: ``multiprocessing``'s forkserver, with what each rank would import itself."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import sys
from multiprocessing import forkserver, resource_tracker

from moe_lowering.interrupts import blocked
from moe_lowering.simulator import state

# Imports that cost seconds and start no thread. Not torch_npu: setup says whether it is simulated, and a device is not forked.
PRELOAD = ["moe_lowering", "torch", "torch._dynamo", "torch._inductor.compile_fx", "moe_lowering.passes.pipeline"]
FORKED = (
    "MOE_LOWERING_FORKED"  # SoC:module,module,... for forked_simulator; set while a forkserver starts, and in no rank
)


def fork_from_imports(*modules: str) -> None:
    """Start this process's forkserver with the simulator that this process has enabled, ``modules``, and what this process has
    imported of moe_lowering and transformers: a second or two of CPU time less for each rank of all pools to come.

    Without effect where the simulator is not enabled (a device is not forked), and when a forkserver runs already. Its ranks can
    simulate no other SoC. A module that cannot be imported there is left to the ranks.
    """
    if state.loaded is None:
        return
    imported = [name for name in sys.modules if name.startswith(("moe_lowering.", "transformers."))]
    os.environ[FORKED] = f"{state.loaded}:{','.join([*imported, *modules])}"
    try:
        with contextlib.suppress(OSError):  # a TMPDIR too long; ranks are spawned then
            start_forkserver([*PRELOAD, "moe_lowering.testing.forked_simulator"])
    finally:
        del os.environ[FORKED]


def start_forkserver(preload: list[str]) -> None:
    """Raises OSError where TMPDIR is too long for the path of a socket."""
    mp.set_forkserver_preload(preload)
    with sigint_blocked():
        forkserver.ensure_running()


def sigint_blocked() -> contextlib.AbstractContextManager[None]:
    """What is started inside hears no SIGINT, from its first line on: a terminal sends it to every process, and each would
    print where it was."""
    resource_tracker.ensure_running()  # would unblock it as it starts
    return blocked(signal.SIGINT)
