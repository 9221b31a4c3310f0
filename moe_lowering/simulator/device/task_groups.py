"""Captured operators that get other arguments before a replay: task groups, and external events that a graph waits for.

vllm-ascend captures attention this way (``full_graph_fia``): inside the capture the stream waits for an external event,
resets it, and launches attention between ``graph_task_group_begin`` and ``graph_task_group_end``. A replay is started
first; then, on another stream, the group is launched anew with this step's lengths (``graph_task_update_begin`` to
``graph_task_update_end``) and the event is recorded, which lets the graph go on.

The simulator computes a replay at once, from its tape (the captured calls in order). So a replay stops at an event that
is not recorded yet; an update replaces entries of the tape; when the event is recorded, the replay goes on with them.
On a device, launches behind a graph that waits would wait too; here they are refused.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

from moe_lowering.simulator.device.tape import Tape
from moe_lowering.simulator.standins import SimulatorError


@dataclasses.dataclass
class Group:
    """Neighbouring entries of a tape, from ``first`` up to ``end``; ``end`` is 0 while it is open."""

    tape: Tape
    first: int
    end: int = 0


@dataclasses.dataclass
class Update:
    """A group that is launched anew on a stream; ``done`` counts the launches."""

    group: Group
    stream: int
    done: list[Callable[[], None]] = dataclasses.field(default_factory=list)

    def add(self, operator: str, run: Callable[[], object]) -> None:
        """One launch, in place of the next entry of the group.

        Raises:
            SimulatorError: the group has another operator there, or none.
        """
        position = self.group.first + len(self.done)
        there = self.group.tape.entries[position].operator if position < self.group.end else "nothing more"
        if there != operator:
            raise SimulatorError(
                f"{operator}: an update of a group of tasks, which has {there} here; accepted: the same operators"
            )
        entries = self.group.tape.entries
        self.done.append(lambda: entries.__setitem__(position, dataclasses.replace(entries[position], run=run)))


@dataclasses.dataclass
class Waiting:
    """A replay that stopped."""

    tape: Tape
    position: int
    stream: int


class TaskGroups:
    """The groups of all tapes, and the replay that waits for an external event."""

    def __init__(self) -> None:
        self.groups = dict[int, Group]()
        # 0 says that there is none; those of graphs that are gone are not used again
        self._handles = itertools.count(1)
        self.open: Group | None = None
        self.update: Update | None = None
        self.waiting: Waiting | None = None

    def begin(self, tape: Tape | None) -> str:
        """Open a group on the tape of the capture under way. Each method returns why it cannot, "" when it can."""
        if tape is None or self.open is not None:
            return "a group of tasks begins outside of a capture, or inside another group"
        self.open = Group(tape, len(tape.entries))
        return ""

    def end(self) -> int:
        """Close it; its handle, 0 when none is open."""
        if self.open is None:
            return 0
        self.open.end = len(self.open.tape.entries)
        handle = next(self._handles)
        self.groups[handle], self.open = self.open, None
        return handle

    def begin_update(self, stream: int, handle: int) -> str:
        if handle not in self.groups or self.update is not None:
            return "updates a group of tasks that does not exist, or inside another update"
        self.update = Update(self.groups[handle], stream)
        return ""

    def end_update(self) -> str:
        """Put what was launched on the tape."""
        update, self.update = self.update, None
        if update is None or len(update.done) != update.group.end - update.group.first:
            return "an update of a group of tasks launched fewer operators than the group has"
        for change in update.done:
            change()
        return ""

    def replay(self, tape: Tape, stream: int) -> None:
        """Start a replay; it may stop at an external event."""
        if self.waiting is not None:
            raise SimulatorError(f"a graph is replayed behind another: {self.describe()}")
        self._go_on(tape, 0, stream)

    def wake(self) -> None:
        """A word of memory was written: the replay that waits for it goes on."""
        if self.waiting is not None:
            waiting, self.waiting = self.waiting, None
            self._go_on(waiting.tape, waiting.position, waiting.stream)

    def _go_on(self, tape: Tape, first: int, stream: int) -> None:
        position = tape.replay(first)
        if position < len(tape.entries):
            self.waiting = Waiting(tape, position, stream)

    def describe(self) -> str:
        """Which replay waits, for errors."""
        assert self.waiting is not None
        return (
            f"entry {self.waiting.position} of that one waits for an external event that nothing has recorded; accepted: "
            "record it first (the simulator computes at once and cannot let launches queue up)"
        )

    def forget(self, tape: Tape) -> None:
        """A graph is gone."""
        self.groups = {handle: group for handle, group in self.groups.items() if group.tape is not tape}
