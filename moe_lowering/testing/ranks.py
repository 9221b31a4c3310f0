"""A pool of real processes that form a gloo group: how multi-rank paths are run on one machine.

    with Ranks(4) as ranks:
        results = ranks.run(function, argument)  # function(rank, argument) in each process; results by rank

Processes are started once and reused. ``function`` must be importable from the child (a module-level function).
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import multiprocessing as mp
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from moe_lowering.argument_checks import require_choice, require_integer, require_seconds
from moe_lowering.interrupts import Terminated, interruptible
from moe_lowering.testing.forking import PRELOAD, sigint_blocked, start_forkserver

START_TIMEOUT = 120.0
END_TIMEOUT = 2.0  # seconds for all ranks to end when they are told to
StartMethod = Literal["spawn", "forkserver"]


class RankError(RuntimeError):
    """A rank failed, died, or did not answer in time. The message names each rank with its failure, the first one first;
    tracebacks follow the line that says what was raised."""


class Ranks:
    """``size`` processes with a default gloo process group.

    Args:
        size: number of ranks, at least 1.
        setup: called in each process before the group is made, e.g. to enable the simulator.
        collective_timeout: seconds after which a collective that a rank does not join raises.
        start_method: of ``multiprocessing``. ``"spawn"`` imports torch again in each rank, 4 to 5 seconds of CPU time;
            ``"forkserver"`` forks the ranks from a process of this one's that imported it once and lives as long as this
            process: for many pools, on machines without a device. It sets the preload list of the one forkserver that
            ``multiprocessing`` has, and has no effect on one that runs already. Ranks of a forkserver that a command or a
            matrix of this process started have its simulator; another SoC than that one needs ``"spawn"``.

    Raises:
        RankError: a process does not come up. None is left then, and no file.
    """

    def __init__(
        self,
        size: int,
        *,
        setup: Callable[[], object] | None = None,
        collective_timeout: float = 60.0,
        start_method: StartMethod = "spawn",
    ) -> None:
        require_integer("Ranks", "size", size, 1)
        require_seconds("Ranks", "collective_timeout", collective_timeout)
        require_choice("Ranks", "start_method", start_method, get_args(StartMethod))
        self.size = size
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._ended = ""  # why there are no processes any more
        folder = tempfile.mkdtemp(prefix="moe_ranks_")
        # At exit, at the latest
        self._remove_folder = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        with self._closed_on_error():
            context = _start_context(start_method)
            for rank in range(size):
                pipe, child_pipe = context.Pipe()
                job = (rank, size, str(Path(folder) / "store"), setup, collective_timeout, child_pipe)
                process = context.Process(target=_serve, args=(dict(os.environ), *job), daemon=True)
                self._pipes.append(pipe)
                # a forkserver's answer can take the seconds of its imports: Ctrl-C is heard meanwhile
                with sigint_blocked() if context.get_start_method() == "spawn" else contextlib.nullcontext():
                    _start(process, rank)
                self._processes.append(process)
                child_pipe.close()
            self._collect(START_TIMEOUT)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 300.0) -> list[Any]:
        """``function(rank, *arguments)`` on every rank; the results in rank order.

        Raises:
            RankError: when a rank raises, dies or has died, or takes longer than ``timeout`` seconds; when the pool was
                closed. The pool is closed then: the ranks may be out of step.
            Exception: of pickle, when ``function`` or an argument cannot be sent. Nothing has run then.
        """
        if self._ended:
            raise RankError(f"the ranks were ended before: {self._ended}")
        with self._closed_on_error(but=(pickle.PicklingError, AttributeError, TypeError)):
            self._require_alive()
            for rank, pipe in enumerate(self._pipes):
                try:
                    pipe.send((function, arguments))
                except OSError:  # it died meanwhile
                    raise RankError(self._died(rank)) from None
            return self._collect(timeout)

    def _require_alive(self) -> None:
        dead = [self._died(rank) for rank, process in enumerate(self._processes) if not process.is_alive()]
        if dead:
            raise RankError("\n".join(dead))

    def _collect(self, timeout: float) -> list[Any]:
        """One answer from each rank."""
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}  # in order of time: the first one is the cause of most others
        died: set[int] = set()  # and a death before all, which others may notice before this process does
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            answered = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not answered:
                failures |= {rank: f"rank {rank}: no answer within {timeout:g} s" for rank in waiting.values()}
                break
            for pipe in answered:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    ok, answer = pipe.recv()
                except (EOFError, OSError):
                    failures[rank] = self._died(rank)
                    died.add(rank)
                    continue
                except Exception as error:  # unpickling runs code of the result's own types
                    ok, answer = False, f"its answer cannot be read: {_one_line(error)}"
                if ok:
                    results[rank] = answer
                else:
                    failures[rank] = f"rank {rank}: {answer}"
        if failures:
            raise RankError("\n".join(failures[rank] for rank in sorted(failures, key=lambda rank: rank not in died)))
        return [results[rank] for rank in range(self.size)]

    def _died(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(5)
        code = process.exitcode
        named = f" ({signal.Signals(-code).name})" if code is not None and -code in set(signal.Signals) else ""
        return f"rank {rank}: process died, exit code {code}{named}"

    def kill(self, rank: int) -> None:
        """Kill one process, as a failure test does."""
        self._processes[rank].kill()

    def close(self) -> None:
        """End all processes, and remove what they left in the temporary directory."""
        self._end("close() was called")

    def _end(self, reason: str, patience: float = END_TIMEOUT) -> None:
        self._ended = self._ended or reason
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # already gone
                pipe.send(None)
        deadline = time.monotonic() + patience
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join(5)
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()
        self._remove_folder()

    @contextlib.contextmanager
    def _closed_on_error(self, but: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
        """Ctrl-C too: ranks that were left in the middle of something are out of step."""
        try:
            yield
        except but:
            raise
        except BaseException as error:
            # Then the ranks are at work, and do not read what they are sent
            interrupted = not isinstance(error, Exception)
            self._end(str(error).partition("\n")[0] or type(error).__name__, 0.0 if interrupted else END_TIMEOUT)
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self.close()
        else:
            self._end(kind.__name__, 0.0)


def _start_context(start_method: StartMethod) -> Any:
    """The context of ``multiprocessing``; Any, as its stubs know no Process for a method that is a variable."""
    if start_method == "forkserver":
        try:
            start_forkserver(PRELOAD)
        except OSError:  # as slow as "spawn", and right
            return mp.get_context("spawn")
    return mp.get_context(start_method)


def _start(process: Any, rank: int) -> None:
    try:
        process.start()
    except (EOFError, ConnectionError) as error:  # no answer
        raise RankError(
            f"rank {rank} was not started: the process that ranks are forked from ended: {error}"
        ) from error


def describe(error: BaseException) -> str:
    """What was raised, in one line, with the first cause; then the traceback."""
    chain = [error]
    while (cause := getattr(chain[-1], "inner_exception", None) or chain[-1].__cause__) and cause not in chain:
        chain.append(cause)
    summary = _one_line(error)
    if len(chain) > 1:
        summary += f"; first cause: {_one_line(chain[-1])}"
    return f"{summary}\n{''.join(traceback.format_exception(error))}".rstrip()


def _one_line(error: BaseException) -> str:
    """Type and text; the place in the code where there is no text."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    if text:
        return f"{name}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {frames[-1].name}, {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    line = f": {frames[-1].line}" if frames and frames[-1].line else ""
    return f"{name} without a message{place}{line}"


def _serve(environment: dict[str, str], *arguments: Any) -> None:
    """One rank. SIGTERM ends it, whatever it runs. SIGINT is for the process that made it, which ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a forkserver of somebody else's has it unblocked
    os.environ.clear()  # a forkserver's is what it was when the first pool was made
    os.environ.update(environment)
    with interruptible():
        _answer_jobs(*arguments)


def _answer_jobs(
    rank: int, size: int, store: str, setup: Callable[[], object] | None, collective_timeout: float, pipe: Connection
) -> None:
    if pipe.poll():  # nothing is sent before all ranks are up: the pool was given up as this rank was forked
        return
    try:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if setup is not None:
            setup()
        _join_group(rank, size, store, collective_timeout)
        gc.freeze()  # what was imported stays: the collector need not go through a million objects again and again
        pipe.send((True, None))
    except (KeyboardInterrupt, Terminated):
        raise
    except BaseException as error:
        pipe.send((False, describe(error)))
        return
    while (job := _next_job(pipe)) is not None:
        if isinstance(job, _Unreadable):
            pipe.send((False, job.reason))
            continue
        function, arguments = job
        try:
            answer = (True, function(rank, *arguments))
        except (KeyboardInterrupt, Terminated):
            raise
        except BaseException as error:  # SystemExit too: the rank lives on, and the caller gets the error
            answer = (False, describe(error))
        try:
            pipe.send(answer)
        except Exception as error:  # the result does not pickle: report that instead of ending the rank
            pipe.send((False, describe(error)))
    _leave_group()


def _join_group(rank: int, size: int, store: str, collective_timeout: float) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=collective_timeout)
    # what new_group takes when it is given none is 30 minutes, not the default group's (_get_default_timeout)
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.init_process_group("gloo", store=FileStore(store, size), rank=rank, world_size=size, timeout=timeout)


def _leave_group() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


class _Unreadable:
    """A job that cannot be unpickled here, such as a function of a module that this process cannot import."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _next_job(pipe: Connection) -> Any:
    """(function, arguments); None when there will be no more."""
    try:
        return pipe.recv()
    except (EOFError, OSError, KeyboardInterrupt):  # the parent is gone, or about to go
        return None
    except Exception as error:
        return _Unreadable(describe(error))
