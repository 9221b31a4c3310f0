"""A pool of real processes that form a gloo group: how multi-rank paths are run on one machine.

    with Ranks(4) as ranks:
        results = ranks.run(function, argument)  # function(rank, argument) in each process; results by rank

Processes are spawned once and reused. ``function`` must be importable from the child (a module-level function).
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing as mp
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_lowering.interrupts import Terminated, exit_code, interruptible

START_TIMEOUT = 120.0
END_TIMEOUT = 2.0  # seconds for all ranks to end when they are told to, and again when they are terminated


class RankError(RuntimeError):
    """A rank failed, died, or did not answer in time. The message holds each failing rank's traceback."""


class Ranks:
    """``size`` spawned processes with a default gloo process group.

    Args:
        size: number of ranks, at least 1.
        setup: called in each process before the group is made, e.g. to enable the simulator.
        collective_timeout: seconds after which a collective that a rank does not join raises.
    """

    def __init__(
        self, size: int, *, setup: Callable[[], object] | None = None, collective_timeout: float = 60.0
    ) -> None:
        if size < 1:
            raise ValueError(f"Ranks: size is {size}; accepted: 1 or more")
        self.size = size
        context = mp.get_context("spawn")
        self._store = Path(tempfile.mkdtemp(prefix="moe_ranks_")) / "store"
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        try:
            for rank in range(size):
                here, there = context.Pipe()
                arguments = (rank, size, str(self._store), setup, collective_timeout, there)
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                self._processes.append(process)
                there.close()
                self._pipes.append(here)
            self._collect(START_TIMEOUT)
        except BaseException:  # an interrupt too: nobody has the pool yet, to close it
            self._end(0.0)
            raise

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 300.0) -> list[Any]:
        """``function(rank, *arguments)`` on every rank; the results in rank order.

        Raises:
            RankError: when a rank raises, dies, or takes longer than ``timeout`` seconds. The pool is closed then:
                the ranks may be out of step.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return self._collect(timeout)

    def _collect(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: list[Any] = [None] * self.size
        failures: list[str] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    failures.append(f"rank {rank}: no answer within {timeout:g} s")
                    continue
                ok, results[rank] = pipe.recv()
            except EOFError:
                self._processes[rank].join(5)
                failures.append(f"rank {rank}: process died, exit code {self._processes[rank].exitcode}")
                continue
            if not ok:
                failures.append(f"rank {rank}:\n{results[rank]}")
        if failures:
            self.close()
            raise RankError("\n".join(failures))
        return results

    def kill(self, rank: int) -> None:
        """Kill one process, as a failure test does."""
        self._processes[rank].kill()

    def close(self) -> None:
        """End all processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # already gone
                pipe.send(None)
        self._end(END_TIMEOUT)

    def _end(self, patience: float) -> None:
        """Wait ``patience`` seconds for the processes, then end them; one that waits in a collective hears no SIGTERM."""
        self._join(patience)
        for process in self._processes:
            process.terminate()
        self._join(END_TIMEOUT)
        for process in self._processes:
            process.kill()
            process.join()
        shutil.rmtree(self._store.parent, ignore_errors=True)

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self.close()
        else:
            self._end(0.0)  # interrupted: the ranks are at work, and do not read what they are sent


def _serve(*arguments: Any) -> None:
    """One rank. SIGINT and SIGTERM end it, whatever it runs."""
    try:
        with interruptible():
            _answer(*arguments)
    except KeyboardInterrupt:
        sys.exit(exit_code(signal.SIGINT))  # without a traceback: a terminal sends it to every rank


def _answer(
    rank: int, size: int, store: str, setup: Callable[[], object] | None, collective_timeout: float, pipe: Connection
) -> None:
    try:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if setup is not None:
            setup()
        import torch
        import torch.distributed as dist
        from torch._C._distributed_c10d import FileStore

        torch.set_num_threads(1)
        timeout = datetime.timedelta(seconds=collective_timeout)
        # what new_group takes when it is given none is 30 minutes, not the default group's (_get_default_timeout)
        dist.distributed_c10d.default_pg_timeout = timeout
        dist.init_process_group("gloo", store=FileStore(store, size), rank=rank, world_size=size, timeout=timeout)
        pipe.send((True, None))
    except (KeyboardInterrupt, Terminated):
        raise
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            answer = (True, function(rank, *arguments))
        except (KeyboardInterrupt, Terminated):
            raise
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except Exception:  # the result does not pickle: say so instead of dying
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
