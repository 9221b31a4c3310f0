"""Runs pieces of programs, each in a process of its own that is forked here, where torch is imported: importing it takes longer
than the pieces. Reads a JSON list of [name, text, ranks] from stdin, and prints {name: [exit code of a rank, ...]} as JSON; a
rank that fails says why on stderr."""

import functools
import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import moe_lowering

if TYPE_CHECKING:
    from torch.distributed import FileStore


def start(name: str, text: str, rank: int, size: int, make_store: Callable[[], "FileStore"]) -> int:
    """The process that runs one rank."""
    if process := os.fork():
        return process
    code = 1
    try:
        os.dup2(2, 1)
        store = make_store()
        exec(compile(text, name, "exec"), {"__name__": "__main__", "rank": rank, "size": size, "store": store})
        wait_for_others(store, size)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for_others(store: "FileStore", size: int) -> None:
    """Until all ranks are through: one that leaves while another still connects to it breaks the other's connection. A rank that
    failed does not wait: others that are connected to it notice at once, and the rest by the timeout of their group."""
    if store.add("through", 1) == size:
        store.set("all through", "")
    store.wait(["all through"], timedelta(seconds=60))


def prepare() -> None:
    """What all pieces begin with, imported once, behind the simulator."""
    moe_lowering.simulator.enable("A3")
    import torch
    import transformers

    importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    torch.set_num_threads(1)  # a thread would not be there after the fork
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> None:
    prepare()
    from torch.distributed import FileStore

    codes = {}
    for name, text, size in json.load(sys.stdin):
        with tempfile.TemporaryDirectory() as folder:
            make_store = functools.partial(FileStore, str(Path(folder, "store")), size)
            processes = [start(name, text, rank, size, make_store) for rank in range(size)]
            codes[name] = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    print(json.dumps(codes))


main()
