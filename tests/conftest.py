"""Fixtures of all tests. moe_lowering is imported before torch: see moe_lowering/_bootstrap.py."""

import moe_lowering  # noqa: F401  # isort: skip
import collections
import functools
import gc
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import torch._dynamo.guards

from moe_lowering import simulator

# Tests send signals; a shell that starts the suite in the background has SIGINT ignored, and every child with it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Reports are as wide as it says, and what they must be is written for 100 columns.
os.environ.pop("COLUMNS", None)
# Two workers on two cores: more threads only wait for each other. By the variable in the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Tensors of up to 32 MB are memory that was freed before, not new pages to be zeroed for each: half of all page faults. Read as
# a process starts: by xdist's workers, and by what tests start.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
# After each compile dynamo collects garbage (in what starts after this), and measures how long the guards take behind a flush of
# the processor's caches: 10 and 20 ms. The collector runs by its thresholds, and nothing reads the measurement.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")
torch._dynamo.guards.profile_guard_manager = lambda *unused: 0.0


@pytest.fixture(scope="session", autouse=True)
def ascend_stack():
    """torch_npu on this machine, with an NPU or without."""
    if not simulator.is_enabled():
        simulator.enable("A3")


# What costs seconds: other processes, compiled graphs, models of transformers. A module that names one of these, or a helper
# of the tests that does, is not fast.
SLOW = re.compile(
    r"\bRanks\b|subprocess|multiprocessing|torch\.compile|\.compile\(|transformers|cpp_extension|npugraph_ex_options"
    r"|cli\.lower import|matrix\.runner import"
)
TESTS = Path(__file__).parent


@functools.cache
def is_slow(module):
    """Whether a module of the tests, or one of its helpers, names what costs seconds."""
    files = {file.stem: file for file in TESTS.rglob("*.py")}  # no two of them have one name
    text = files[module].read_text()
    helpers = re.findall(r"^\s*(?:from|import) (\w+)", text, re.M)
    return bool(SLOW.search(text)) or any(is_slow(name) for name in helpers if name in files)


# These take more than a minute each, and come first: a worker that gets one of them last keeps the other one waiting.
LONGEST = ("test_matrix", "test_capture_model_ranks", "test_torchair_models", "test_capture_models", "test_property")


def pytest_collection_modifyitems(items):
    """``-m fast``: all tests but those of slow modules, so that a new file needs no entry anywhere."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        if not is_slow(item.path.stem):
            item.add_marker(pytest.mark.fast)


def pytest_collection_finish():
    """What was imported stays: the collector need not go through a million objects again and again, a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_teardown(item, nextitem):
    """What a module keeps for its own tests (converted models, compiled graphs) goes with its last one."""
    if nextitem is None or nextitem.path != item.path:
        for kept in vars(item.module).values():
            if isinstance(kept, functools._lru_cache_wrapper) and kept.__module__ == item.module.__name__:
                kept.cache_clear()


def pytest_terminal_summary(terminalreporter):
    """What came of the cases of the property tests, over all chunks and workers."""
    counts = collections.defaultdict(collections.Counter)
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "outcomes":
                counts[report.nodeid.partition("[")[0]].update(value)
    for test, found in counts.items():
        shown = ", ".join(f"{count} {what}" for what, count in found.most_common())
        terminalreporter.write_line(f"{test}: {shown}")
