"""Attempts of many families, a process for each: what kills one, or hangs, is one row.

Processes are forked from one that has torch, transformers and the simulator imported, which takes longer than a family.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from moe_lowering.families.records import Kind, Row, failed
from moe_lowering.number_words import count_of

TIMEOUT = 600.0  # seconds of one family
_TURN = 5.0  # seconds between two looks at it


def run_families(
    planned: Sequence[tuple[str, Sequence[Kind]]],
    done: Callable[[Row], None],
    progress: Callable[[str], None],
    attempt: Callable[[str, Sequence[Kind]], Row] | None = None,
    timeout: float = TIMEOUT,
) -> None:
    """Try families one after another.

    Args:
        planned: (family, what to try).
        done: called with each row, as soon as it is there.
        progress: called with each family before it is tried, and with its states afterwards.
        attempt: what a process does; ``attempts.attempt_family`` when None.
        timeout: seconds of one family.
    """
    if attempt is None:
        from moe_lowering.families.attempts import attempt_family

        attempt = attempt_family
    for at, (family, kinds) in enumerate(planned):
        started = time.perf_counter()
        progress(f"{at + 1} of {len(planned)}: {family}: {count_of(len(kinds), 'attempt')}")
        row = _in_process(family, kinds, attempt, timeout)
        states = ", ".join(f"{each.way} {each.dtype} {each.shapes} {each.state}" for each in row.attempts)
        progress(f"{at + 1} of {len(planned)}: {family}: {states} ({time.perf_counter() - started:.0f} s)")
        done(row)


def _in_process(
    family: str, kinds: Sequence[Kind], attempt: Callable[[str, Sequence[Kind]], Row], timeout: float
) -> Row:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, family, kinds, attempt), daemon=True)
    started = time.perf_counter()
    process.start()
    sender.close()
    try:
        while time.perf_counter() - started < timeout:
            if receiver.poll(_TURN):
                row: Row = receiver.recv()
                return row
        reason = f"[models.timeout] it was not done after {timeout:.0f} s"
    except EOFError:
        process.join()
        reason = f"[models.crashed] its process ended with exit code {process.exitcode}"
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()
    return failed(family, kinds, reason, round(time.perf_counter() - started, 1))


def _work(sender: Connection[Any, Any], family: str, kinds: Sequence[Kind], attempt: Callable[..., Row]) -> None:
    import torch

    torch.set_num_threads(1)  # of small models, beside others on the machine
    sender.send(attempt(family, kinds))
    sender.close()
