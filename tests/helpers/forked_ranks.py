"""Many ranks at the price of one import: a spawned process enables the simulator, then forks itself once for each rank.

``moe_lowering.testing.Ranks`` imports torch_npu in every process, which takes minutes for the 16 ranks that hierarchical MC2
asks for. Nothing may run in threads before the fork, so the process is used for one job and ended.
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def run_forked(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """``function(rank, *arguments)`` on each of ``size`` ranks of a gloo group; the results in rank order.

    Raises:
        RuntimeError: a rank raised (its traceback is in the message), or did not answer in time.
    """
    here, there = mp.get_context("spawn").Pipe()
    parent = mp.get_context("spawn").Process(target=_fork, args=(size, function, arguments, timeout, there))
    parent.start()
    there.close()
    try:
        if not here.poll(timeout):
            raise RuntimeError(f"no answer from {size} ranks within {timeout:g} s")
        answers = [pickle.loads(answer) for answer in here.recv()]
    finally:
        parent.join(5)
        if parent.is_alive():
            parent.kill()
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [value for _, value in answers]


def _fork(size: int, function: Callable[..., Any], arguments: Any, timeout: float, there: Connection) -> None:
    import moe_lowering.simulator

    moe_lowering.simulator.enable()
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    fork = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        pipes = [fork.Pipe(duplex=False) for _ in range(size)]
        ranks = [
            fork.Process(target=_rank, args=(r, size, store, function, arguments, pipes[r][1]), daemon=True)
            for r in range(size)
        ]
        for process in ranks:
            process.start()
        late = pickle.dumps((False, f"no answer within {timeout:g} s"))
        answers = [here.recv_bytes() if here.poll(timeout) else late for here, _ in pipes]
        there.send(answers)
        for process in ranks:
            process.join(2)
            if process.is_alive():
                process.kill()


def _rank(rank: int, size: int, store: str, function: Callable[..., Any], arguments: Any, pipe: Connection) -> None:
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    try:
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", store=FileStore(store, size), rank=rank, world_size=size, timeout=timeout)
        answer = (True, function(rank, *arguments))
        dist.barrier()
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))  # by value: torch would send tensors as handles of a process that ends
