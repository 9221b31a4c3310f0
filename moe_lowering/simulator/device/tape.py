"""What an NPU graph capture records: operators with fixed addresses, in order, and how streams wait for each other.

A real capture records launches and computes nothing; so does a tape. An entry holds host aliases of its operands and
results (``memory.host_alias``), and no tensor of the caller: memory that a temporary gave back is used again by later
operators of the same capture, as on a device, and the tape stays right because it is replayed in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_lowering.simulator.device.source_location import current_place
from moe_lowering.simulator.standins import SimulatorError
from moe_lowering.source_lines import SourceLine


class GraphError(SimulatorError):
    """An operator of an NPU graph that failed.

    Attributes:
        operator: its name, e.g. ``aten::nonzero``, or the runtime's function, e.g. ``aclrtSynchronizeDevice``.
        place: the line of the model, None when no frame is the user's.
    """

    def __init__(self, operator: str, reason: str, place: SourceLine | None) -> None:
        self.operator, self.place = operator, place
        super().__init__(f"{operator}: {reason}; at {place or 'a line that is not known'}")


class CaptureError(GraphError):
    """Something that an NPU graph capture forbids: the capture is invalid from there on."""


class ReplayError(GraphError):
    """An operator that could be captured refused what it found when the graph was replayed."""


@dataclasses.dataclass
class Entry:
    """One operator of a tape.

    Attributes:
        operator: e.g. ``aten::mm``.
        run: computes it on the fixed addresses.
        stream: the stream it was launched on.
        place: the line of the model.
        clock: how far each stream had come, as its launches see it.
        ready: whether what the stream waits for here has happened, None where it launches an operator.
    """

    operator: str
    run: Callable[[], object]
    stream: int
    place: SourceLine | None
    clock: dict[int, int]
    ready: Callable[[], bool] | None = None


class Tape:
    """The recording of one capture; replayed as often as the graph is.

    Attributes:
        model: the number that the stand-in gave the graph.
        entries: what was recorded.
        error: why the capture is invalid, None when it is not.
        replays: how often it has been run.
        pool: torch_npu's id of the memory pool, () when the capture was not begun through ``torch.npu.NPUGraph``.
    """

    def __init__(self, model: int, stream: int) -> None:
        self.model, self.origin = model, stream
        self.entries: list[Entry] = []
        self.error: CaptureError | None = None
        self.failure: BaseException | None = None  # what the last replay raised
        self.replays = 0
        self.pool: tuple[int, ...] = ()
        self._clocks: dict[int, dict[int, int]] = {stream: {stream: 0}}
        self._events: dict[int, dict[int, int]] = {}

    @property
    def operators(self) -> list[str]:
        """The operators in the order they were recorded."""
        return [entry.operator for entry in self.entries]

    @property
    def streams(self) -> list[int]:
        """The streams that take part in the capture; the one on which it began comes first."""
        return list(self._clocks)

    def add(
        self, operator: str, run: Callable[[], object], stream: int, ready: Callable[[], bool] | None = None
    ) -> None:
        """Record one launch, or that a stream waits for something outside of the graph."""
        clock = self._clocks[stream]
        clock[stream] = clock.get(stream, 0) + 1
        self.entries.append(Entry(operator, run, stream, current_place(), dict(clock), ready))

    def record(self, event: int, stream: int) -> None:
        """An event was recorded: it stands for all that the stream has seen."""
        self._events[event] = dict(self._clocks[stream])

    def wait(self, stream: int, event: int) -> None:
        """A stream waits for an event, and joins the capture by it."""
        clock = self._clocks.setdefault(stream, {stream: 0})
        for other, position in self._events[event].items():
            clock[other] = max(clock.get(other, 0), position)

    def fail(self, operator: str, reason: str) -> CaptureError:
        """Make the capture invalid; the first error stays."""
        error = CaptureError(operator, reason, current_place())
        self.error = self.error or error
        return error

    def finish(self) -> None:
        """The capture ends: what the other streams did must have been waited for by the first one."""
        joined = self._clocks[self.origin]
        for stream, clock in self._clocks.items():
            if clock.get(stream, 0) > joined.get(stream, 0) and self.error is None:
                last = [entry for entry in self.entries if entry.stream == stream][-1]
                reason = "its stream never joined the stream that the capture began on; wait for an event of it"
                self.error = CaptureError(last.operator, reason, last.place)

    def replay(self, first: int = 0) -> int:
        """Run every entry from ``first`` on, on its addresses; where it ended: the number of entries, or the first one that waits
        for something that has not happened.

        Raises:
            CaptureError: the capture was invalid.
            ReplayError: an operator refuses what it finds.
        """
        if self.error is not None:
            raise self.error
        self.replays += first == 0
        for position in range(first, len(self.entries)):
            entry = self.entries[position]
            if entry.ready is not None and not entry.ready():
                return position
            try:
                entry.run()
            except Exception as error:
                reason = f"failed when the graph was replayed: {type(error).__name__}: {error}"
                raise ReplayError(entry.operator, reason, entry.place) from error
        return len(self.entries)

    def pool_bytes(self) -> int:
        """Bytes of device memory that the pool of this graph holds, for all graphs that share it."""
        if not self.pool:
            raise SimulatorError("the tape has no pool: the capture was not begun through torch.npu.NPUGraph")
        segments: Sequence[Any] = torch.get_device_module("npu").memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self.pool))
