"""Rounds through a store: ranks are threads of one process, each with a session as a process of its own would have."""

import threading
import time
import weakref

import pytest
import torch.distributed as dist

from moe_lowering.agreement_rounds import AgreementError, Session


def differences(a, b, rank):
    return [f"{b} and not {a} of rank {rank}"] if a != b else []


@pytest.fixture
def store():
    return dist.HashStore()


def together(sessions, records, timeout=20.0, kind="settings", often=None):
    """Every session's outcome of a round, "" for agreement, and the seconds that it took."""
    outcomes = {}

    def take_part(rank):
        start, said = time.monotonic(), ""
        try:
            for _ in range((often or {}).get(rank, 1)):
                sessions[rank].agree_once(kind, records[rank], differences, timeout)
        except AgreementError as error:
            said = str(error)
        outcomes[rank] = (said, time.monotonic() - start)

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[rank][0] for rank in sorted(records)], max(seconds for _, seconds in outcomes.values())


def sessions(store, size):
    return {rank: Session(store, range(size), rank) for rank in range(size)}


def test_all_that_differ_are_named_on_every_rank_at_once(store):
    said, seconds = together(sessions(store, 4), {0: "a", 1: "b", 2: "a", 3: "c"})
    assert said == ["ranks disagree with rank 0:\n  rank 1: b and not a of rank 0\n  rank 3: c and not a of rank 0"] * 4
    assert seconds < 10


def test_two_that_differ_do_not_wait_for_a_third(store):
    four = sessions(store, 3)
    together(four, {0: "x", 1: "x", 2: "x"})
    said, seconds = together(four, {0: "a", 1: "b"})
    assert said == ["ranks disagree with rank 0:\n  rank 1: b and not a of rank 0"] * 2 and seconds < 10
    (late,), seconds = together(four, {2: "a"})
    assert "rank 1: b and not a of rank 0" in late and seconds < 10


def test_what_was_agreed_on_is_not_asked_again(store):
    """However often: by content, not by the number of calls. The twin is another content, which all must come with."""
    pair = sessions(store, 2)
    assert together(pair, {0: "a", 1: "a"}, often={0: 5})[0] == ["", ""]
    assert together(pair, {0: "a"}, timeout=0.2)[0] == [""]
    assert together(pair, {0: "b"}, timeout=0.2)[0] == ["no answer from rank 1 of 2 within 0.2 s"]


def test_after_an_error_all_are_in_step_again(store):
    pair = sessions(store, 2)
    assert together(pair, {0: "a", 1: "a"})[0] == ["", ""]
    assert together(pair, {0: "b"}, timeout=0.2)[0] == ["no answer from rank 1 of 2 within 0.2 s"]
    assert together(pair, {1: "b"})[0] == [
        "this rank came too late, and has not run: the others gave up with: no answer from rank 1 of 2 within 0.2 s"
    ]
    assert together(pair, {0: "b", 1: "b"})[0] == ["", ""]


def test_a_rank_started_again_alone_reads_nothing_stale_and_both_are_told(store):
    pair = sessions(store, 2)
    assert together(pair, {0: "a", 1: "a"})[0] == ["", ""]
    again = {0: pair[0], 1: Session(store, range(2), 1)}
    (said,), _ = together(again, {1: "a"}, timeout=0.5)  # what rank 0 wrote was meant for the process before
    assert "no answer from rank 0" in said and "start all ranks of the group again" in said
    (said,), seconds = together(again, {0: "b"}, timeout=20.0)
    assert said == "rank 1 was started again, and this process was not: start all ranks of the group again"
    assert seconds < 10


def test_all_started_again_on_the_same_store_agree_and_differ_anew(store):
    """One comes first, and finds only what the processes before have left."""
    together(sessions(store, 2), {0: "a", 1: "a"})
    new = sessions(store, 2)
    assert "no answer from rank 1" in together(new, {0: "a"}, timeout=0.3)[0][0]
    assert together(new, {0: "b", 1: "b"})[0] == ["", ""]
    assert together(new, {0: "c", 1: "d"})[0] == ["ranks disagree with rank 0:\n  rank 1: d and not c of rank 0"] * 2


def test_the_store_does_not_grow(store):
    pair = sessions(store, 2)
    for number in range(3):
        together(pair, {0: number, 1: number})
    keys = store.num_keys()
    for number in range(3, 9):
        together(pair, {0: number, 1: number})
    assert store.num_keys() == keys


def test_a_session_does_not_keep_the_store():
    """A store that is kept holds its port."""
    store = dist.HashStore()
    session, gone = Session(store, range(1), 0), weakref.ref(store)
    session.agree("settings", 1, differences, 1.0)
    del store
    assert gone() is None
    with pytest.raises(AgreementError, match="the group was destroyed"):
        session.agree("settings", 2, differences, 1.0)
