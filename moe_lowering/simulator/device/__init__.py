"""Device "npu" in host memory: computes eagerly, captures NPU graphs on a tape, replays them on fixed addresses.

    from moe_lowering import simulator
    simulator.enable_device()               # after, or instead of, simulator.enable()
    model.to("npu")                         # aten, npu:: and moe_lowering:: operators compute
    fast = torch.compile(model, backend="npugraph_ex")  # its default options: captured at the first call, then replayed
    simulator.device.counts(), simulator.device.tapes()[-1].operators

What it shows is meaning and capturability: what a graph computes, from which addresses, in which order, and that
nothing in it needs the host. It shows no timing, and accepts dtypes and sizes that a real device may not (the
``npu::`` kernels check the documented limits; aten operators check what the CPU checks).
"""

from __future__ import annotations

from moe_lowering.simulator.device.capture_state import Counts, counts, is_capturing, tape_of, tapes
from moe_lowering.simulator.device.tape import CaptureError, Entry, GraphError, ReplayError, Tape
from moe_lowering.source_lines import SourceLine

__all__ = [
    "CaptureError",
    "Counts",
    "Entry",
    "GraphError",
    "ReplayError",
    "SourceLine",
    "Tape",
    "counts",
    "is_capturing",
    "tape_of",
    "tapes",
]


def install() -> None:
    """Give device npu its kernels and its tapes. The simulator must be enabled. Idempotent."""
    import importlib

    from moe_lowering.simulator.device import capture_state, graphs, registration, source_location, stale_outputs

    importlib.import_module("npugraph_ex")  # defines its operators and their kernels, which must not come after ours
    capture_state.install()
    graphs.install()
    stale_outputs.install()
    registration.register()
    source_location.remember_generated_source()
