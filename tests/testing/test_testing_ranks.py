"""``testing.Ranks``: one error that says what happened first, no process and no file left behind."""

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

import pytest

from moe_lowering import simulator, testing
from moe_lowering.simulator import state
from moe_lowering.testing import RankError, forking
from moe_lowering.testing.forking import FORKED, PRELOAD, fork_from_imports
from moe_lowering.testing.ranks import StartMethod


def own_rank(rank, data=b""):
    return rank


def fail(rank, how):
    if how == "exit":
        sys.exit(3)
    if how == "nothing to say":
        raise ValueError
    if how == "cause":
        raise ValueError("outer") from KeyError("inner")
    if how == "abort":
        os.kill(os.getpid(), signal.SIGABRT)
    return lambda: how  # cannot be pickled


def fail_then_die(rank):
    """Rank 0 raises, as after a connection that was lost; rank 1 dies later."""
    if rank == 0:
        raise ConnectionError("lost")
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def refuse_setup():
    raise SystemExit


@pytest.fixture(params=get_args(StartMethod))
def Ranks(request):
    fork_from_imports()
    return functools.partial(testing.Ranks, start_method=request.param)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the pool makes its folder, and nothing else does."""
    fork_from_imports()  # the forkserver has a folder of its own as long as this process lives
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("size", [0, 5_000_000], ids=["small", "larger than the pipe"])
def test_a_rank_that_died_before_a_run_is_named_and_the_others_are_ended(Ranks, folder, size):
    ranks = Ranks(2)
    assert ranks.run(own_rank) == [0, 1] and list(folder.iterdir())
    ranks.kill(1)
    ranks._processes[1].join(10)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"^rank 1: process died, exit code -9 \(SIGKILL\)$"):
        ranks.run(own_rank, b"x" * size, timeout=100)
    assert time.monotonic() - start < 30
    assert not any(process.is_alive() for process in ranks._processes)
    assert list(folder.iterdir()) == []
    with pytest.raises(RankError, match="the ranks were ended before: rank 1: process died"):
        ranks.run(own_rank)
    ranks.close()


FIRST_LINES = {
    "exit": "rank 0: SystemExit: 3",
    "nothing to say": "rank 0: ValueError without a message in fail, test_testing_ranks.py:",
    "cause": "rank 0: ValueError: outer; first cause: KeyError: 'inner'",
    "abort": "rank 0: process died, exit code -6 (SIGABRT)",
    "pickle": "rank 0: AttributeError: Can't pickle local object",
}


@pytest.mark.parametrize(("how", "said"), FIRST_LINES.items(), ids=FIRST_LINES)
def test_the_first_line_says_what_happened(Ranks, folder, how, said):
    with Ranks(1) as ranks, pytest.raises(RankError) as failure:
        ranks.run(fail, how)
    assert str(failure.value).startswith(said)
    assert list(folder.iterdir()) == []


def test_a_death_comes_first_whoever_answered_before(Ranks, folder):
    with Ranks(2) as ranks, pytest.raises(RankError) as failure:
        ranks.run(fail_then_die)
    first, second = str(failure.value).splitlines()[:2]
    assert first == "rank 1: process died, exit code -9 (SIGKILL)" and second == "rank 0: ConnectionError: lost"


def test_a_job_that_cannot_be_sent_leaves_the_ranks_as_they_are(Ranks, folder):
    with Ranks(1) as ranks:
        with pytest.raises(Exception, match="pickle"):
            ranks.run(lambda rank: rank)
        assert ranks.run(own_rank) == [0]
    assert list(folder.iterdir()) == []


def test_a_rank_that_does_not_come_up_leaves_nothing(Ranks, folder):
    with pytest.raises(RankError, match="rank 0: SystemExit without a message in refuse_setup"):
        Ranks(1, setup=refuse_setup)
    assert list(folder.iterdir()) == []


def environment(rank):
    return os.environ.get("MOE_LOWERING_TEST_RANKS")


def test_a_rank_has_the_environment_of_the_time_when_the_pool_was_made(Ranks, monkeypatch):
    for value in ("one", "two", None):
        if value is None:
            monkeypatch.delenv("MOE_LOWERING_TEST_RANKS")
        else:
            monkeypatch.setenv("MOE_LOWERING_TEST_RANKS", value)
        with Ranks(1) as ranks:
            assert ranks.run(environment) == [value]


def test_an_unknown_start_method_is_refused():
    with pytest.raises(ValueError, match=r"Ranks: start_method is 'fork'; accepted: .*spawn.*forkserver"):
        testing.Ranks(1, start_method="fork")


def inherited(rank):
    """What a rank without a setup has of the process that it was forked from, and how many threads that one has."""
    status = Path(f"/proc/{os.getppid()}/status").read_text().splitlines()
    threads = next(line.split()[1] for line in status if line.startswith("Threads:"))
    names = FORKED, "TASK_QUEUE_ENABLE"
    return simulator.is_enabled(), simulator.soc(), threads, [os.environ.get(name) for name in names]


def test_ranks_are_forked_with_the_simulator_and_without_a_thread():
    fork_from_imports()
    with testing.Ranks(2, start_method="forkserver") as pool:
        assert pool.run(inherited) == [(True, "A3", "1", [None, "0"])] * 2
    with pytest.raises(RankError, match="rank 0: SimulatorError: this process simulates A3 and cannot change to A2"):
        testing.Ranks(1, setup=functools.partial(simulator.enable, "A2"), start_method="forkserver")


def test_the_forkserver_imports_what_this_process_has(monkeypatch):
    told = []
    monkeypatch.setattr(forking, "start_forkserver", lambda preload: told.append((preload, os.environ.get(FORKED))))
    fork_from_imports("one_more")
    [(preload, given)] = told
    soc, names = given.split(":")
    assert soc == "A3" and FORKED not in os.environ
    assert preload == [*PRELOAD, "moe_lowering.testing.forked_simulator"]
    assert {"one_more", "moe_lowering.testing.ranks"} < set(names.split(","))
    monkeypatch.setattr(state, "loaded", None)  # as on a machine with a device
    fork_from_imports("one_more")
    assert len(told) == 1


FORKED_WITH = """
import functools, sys
from moe_lowering import simulator, testing
from moe_lowering.testing.forking import fork_from_imports, start_forkserver

def is_enabled(rank):
    return simulator.is_enabled()

if __name__ == "__main__":
    simulator.enable("A3")
    if sys.argv[1] == "imports":
        fork_from_imports("raises")
    else:
        start_forkserver(["raises"])
    with testing.Ranks(1, start_method="forkserver") as pool:
        print(pool.run(is_enabled))
"""


@pytest.mark.parametrize("how", ["imports", "preload"])
def test_a_module_that_fails_in_the_forkserver(tmp_path, how):
    """One that was imported for the ranks' sake is left to them; one that ends the forkserver is an error of the pool."""
    (tmp_path / "raises.py").write_text("raise RuntimeError('not here')")
    (tmp_path / "program.py").write_text(FORKED_WITH)
    command = [sys.executable, str(tmp_path / "program.py"), how]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if how == "imports":
        assert done.stdout == "[True]\n", done.stderr
    else:
        assert "RankError: rank 0 was not started: the process that ranks are forked from ended" in done.stderr
