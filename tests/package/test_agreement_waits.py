"""What the check in a graph does when it runs: ranks are threads of one process, each with a session of its own."""

import logging
import threading
import time

import pytest
import torch.distributed as dist

from moe_lowering import agreement_rounds
from moe_lowering.agreement_records import COMPARE_EVERY_RUN, RUN_ABSENT
from moe_lowering.agreement_rounds import AgreementError, Session
from moe_lowering.custom_ops import assert_agreement

SETTINGS = {
    "deployment": {}, "settings": {}, "misplaced": "", "torch_npu": True, "libraries": [], "version": "1", "code": "c",
    "limits": "l",
}  # fmt: skip


def graph(implementation, exchange=("all_gather",), refuses=""):
    kind = {"strict": {"implementation": implementation, "exchange": list(exchange)}, "told": {"name": "moe"}}
    return {"equal_tokens": True, "kinds": [kind], "order": [[0, 1]], "refuses": refuses}


A, B = graph("allgather"), graph("mc2")
DIFFERENT = "ranks disagree with rank 0:\n  rank 1: moe: implementation is 'mc2', on rank 0 'allgather'"


class Pair:
    """Two ranks that have agreed on some graphs."""

    def __init__(self, *graphs):
        store = self.store = dist.HashStore()
        self.sessions = [Session(store, range(2), rank) for rank in range(2)]
        for each in graphs:
            assert self.together(each, each) == ["", ""]

    def run(self, rank, blocks, timeout=20.0, synchronous=True):
        try:
            assert_agreement._compare(self.sessions[rank], timeout, SETTINGS, blocks, 6, synchronous)
        except AgreementError as error:
            return str(error)
        return ""

    def begin(self, rank, *arguments):
        """The thread of a rank that runs a graph, and what becomes of it."""
        said = []
        thread = threading.Thread(target=lambda: said.append(self.run(rank, *arguments)))
        thread.start()
        return thread, said

    def together(self, a, b, **options):
        thread, said = self.begin(1, b)
        mine = self.run(0, a, **options)
        thread.join()
        return [mine, *said]

    def wait_until_asked(self, rank):
        deadline = time.monotonic() + 20
        while not self.sessions[rank].is_asked("blocks"):
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_a_rank_that_waits_is_joined_where_exchanges_end_on_the_host():
    pair = Pair(A)
    thread, said = pair.begin(1, B)
    pair.wait_until_asked(0)
    assert pair.run(0, A) == DIFFERENT
    thread.join()
    assert said == [DIFFERENT]
    assert pair.together(B, B) == ["", ""]  # in step again


def test_with_a_device_the_other_may_be_ahead_and_is_only_told_of(caplog):
    """Rank 1 has begun its next graph while rank 0 runs the one before; then rank 0 comes to it."""
    pair = Pair(A)
    thread, said = pair.begin(1, B)
    pair.wait_until_asked(0)
    assert pair.run(0, A, synchronous=False) == "" and "a rank waits with a graph" in caplog.text
    assert pair.run(0, B) == ""
    thread.join()
    assert said == [""]


def test_with_a_device_a_rank_that_has_given_up_is_certain():
    pair = Pair(A)
    assert pair.run(1, B, 0.2).startswith("no answer from rank 0 of 2 within 0.2 s")
    assert "rank 1: moe: implementation is 'mc2', on rank 0 'allgather'" in pair.run(0, A, synchronous=False)


def test_a_rank_that_refuses_to_run_waits_for_nobody_and_may_go_on():
    """With T in its range again, say, while another rank compiles for a T of its own."""
    pair = Pair(A)
    assert pair.run(1, graph("none: the graph refuses to run", (), "T is 33")) == ""
    assert [pair.run(0, A), pair.run(1, A)] == ["", ""]


def test_a_graph_without_an_exchange_says_nothing_of_where_the_others_are():
    """Rank 1 has run it, and is at its next graph: nothing held it back."""
    local = graph("none: left as it was written", ())
    pair = Pair(local)
    thread, said = pair.begin(1, B)
    pair.wait_until_asked(0)
    assert pair.run(0, local) == "" == pair.run(0, B)
    thread.join()
    assert said == [""]


def test_nobody_is_waited_for_where_nobody_waits():
    pair = Pair(A, B)
    start = time.monotonic()
    assert [pair.run(0, A), pair.run(0, B), pair.run(1, B)] == ["", "", ""] and time.monotonic() - start < 5


def test_a_rank_that_waits_in_vain_says_what_is_new():
    pair = Pair(A)
    assert pair.run(1, B, 0.2).endswith(
        ". This graph beside the last one on which all agreed: moe: implementation is 'mc2', there 'allgather'"
    )
    assert "beside the last one" not in Pair().run(1, B, 0.2)


def test_a_rank_that_waits_for_long_says_for_whom_once(caplog, monkeypatch):
    monkeypatch.setattr(agreement_rounds, "SAID_AFTER", 0.1)
    pair = Pair(A)
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        pair.run(1, B, 0.5)
    (said,) = caplog.messages
    assert said.startswith(
        "moe_lowering: rank 1 has waited for rank 0 for 0.1 s, to compare before the next exchange: it has"
    )
    assert "there 'allgather'" in said


@pytest.fixture
def every_run(monkeypatch):
    monkeypatch.setenv(COMPARE_EVERY_RUN, "1")


def test_every_run_is_compared_where_the_environment_says_so(every_run):
    """Also of two graphs that were both agreed on, and of a rank that does not come."""
    pair = Pair(A, B)
    assert pair.together(A, B) == [DIFFERENT] * 2
    assert pair.together(B, B) == ["", ""]
    assert pair.run(0, A, 0.2).startswith(f"no answer from rank 1 of 2 within 0.2 s: {RUN_ABSENT}. This graph beside")


def test_otherwise_they_are_not(monkeypatch):
    """The twin."""
    monkeypatch.setenv(COMPARE_EVERY_RUN, "0")
    pair = Pair(A, B)
    assert pair.together(A, B) == ["", ""] == [pair.run(0, A, 0.2), ""]
