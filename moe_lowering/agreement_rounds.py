"""Rounds in which the ranks of a group compare records, through a ``torch.distributed`` store and nothing else.

What each rank writes, and when it is read:

1. **Meeting**, once per process: every rank writes a nonce of its own, reads those of the others, and writes all of them
   back. A rank has met the others when every one has written the same nonces, its own fresh one among them. So an answer
   always comes from a process that was alive after this one began: what an earlier process left in the store, a rank's own
   records or another's, is never read. A rank that was started again alone does not meet the others, as their group is
   with the process that it replaces; it is told so, and so are they at their next round.
2. **Rounds**, numbered for each kind of record: every rank writes its record under the number and reads the others'. The
   first that finds a difference, or has waited long enough, writes an alarm, so that the others need not wait. A round ends
   on every rank with agreement or with an error, and the next number is the next round. A rank that comes to a round
   after the others have given up is told that.

What was agreed on needs no round. A rank that does not need one may still ask whether another rank waits in the next one
(``is_asked``): that rank has something new.

A rank's record of a round is deleted when every rank has come to a later one. Left in the store are two keys per process
and three per kind of record.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import hashlib
import json
import logging
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from moe_lowering.groups import process_group

log = logging.getLogger(__name__)

LONGEST = 1800.0  # seconds; what torch.distributed waits for a collective unless it is told otherwise
GRACE = 1.0  # seconds to collect the other ranks' records once two are known to differ, so that all are named
SAID_AFTER = 30.0  # seconds that a rank waits before it says for whom
AT_ONCE = 8  # ranks asked about in one turn: a group of 256 must not flood the store
SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.25  # seconds between two turns

# (reference, record, rank of the reference) to what differs, one line each.
Compare = Callable[[Any, Any, int], list[str]]


class AgreementError(RuntimeError):
    """Ranks differ, or some did not answer in time. The message names the ranks and what differs."""


class Session:
    """This process among the ranks that compare.

    Args:
        store: the ``torch.distributed`` store. It is not kept alive by this object.
        members: global ranks, the same on each.
        rank: this one.
    """

    def __init__(self, store: Any, members: Sequence[int], rank: int) -> None:
        self._store_of = weakref.ref(store)
        self._members, self._rank = list(members), rank
        ranks = ",".join(map(str, self._members))
        self._prefix = f"moe_lowering/agreement/{hashlib.sha256(ranks.encode()).hexdigest()[:16]}"
        self._nonce = uuid.uuid4().hex[:12]
        self._nonces: dict[int, str] = {}  # of all members, once they have met
        self._rounds: collections.Counter[str] = collections.Counter()
        self._agreed: set[str] = set()
        self._last: dict[str, Any] = {}  # by kind: the record of the last round that ended with agreement
        self._say: tuple[float, str] | None = None  # when to say that this rank waits, and what the others may be doing
        self._stopped = threading.Event()

    def stop(self) -> None:
        """A thread of this process that waits in a round ends with an error: a process must not end while one asks the store."""
        self._stopped.set()

    def agree_once(
        self, kind: str, record: Any, compare: Compare, timeout: float, absent: str = "", key: str = ""
    ) -> None:
        """A round for this record, unless all have agreed before on one with the same ``key``, by default its text."""
        key = key or json.dumps(record, sort_keys=True)
        if not self.has_agreed(kind, key):
            self.agree(kind, record, compare, timeout, absent)
            self._agreed.add(f"{kind} {key}")

    def has_agreed(self, kind: str, key: str) -> bool:
        """Whether all have agreed on a record of this kind with this key (``agree_once``)."""
        return f"{kind} {key}" in self._agreed

    def last(self, kind: str) -> Any:
        """The record of the last round of this kind that ended with agreement; None before one did."""
        return self._last.get(kind)

    def is_asked(self, kind: str, gave_up: bool = False) -> bool:
        """Whether another rank waits in the next round; with ``gave_up`` whether one has ended it with an error."""
        key = f"{self._round(kind, self._rounds[kind])}/{'alarm' if gave_up else 'open'}"
        return self._get(key) is not None

    def agree(self, kind: str, record: Any, compare: Compare, timeout: float, absent: str = "") -> None:
        """A round: every member comes with a record, within ``timeout`` seconds, and no two differ.

        Args:
            kind: rounds of one kind are counted together.
            record: what JSON can hold.
            compare: finds what differs between two records.
            absent: what a rank that did not come may be doing, for the message.

        Raises:
            AgreementError: on every rank.
        """
        deadline = time.monotonic() + timeout
        self._say = time.monotonic() + SAID_AFTER, absent
        late = self._meet(deadline)
        if late:
            raise AgreementError(self._no_answer(late, timeout, absent))
        prefix, number = self._open(kind, record)
        self._set(f"{prefix}/open", "")  # not where a rank refuses: that one waits for nobody, and may go on
        texts, alarm = self._collect(prefix, compare, deadline)
        late = [member for member in self._members if member not in texts]
        message = self._differences(texts, compare)
        if not message and late:
            message = alarm or self._no_answer(late, timeout, absent)
        elif not message and alarm:  # all records are alike, but some rank has given up before this one came
            message = f"this rank came too late, and has not run: the others gave up with: {alarm}"
        if message:
            self._set(f"{prefix}/alarm", message)
            raise AgreementError(message)
        self._last[kind] = record
        self._forget(kind, number - 1)

    def refuse(self, kind: str, record: Any, reason: str, patience: float) -> None:
        """Tell the others that this rank does not take part, without waiting for their records."""
        self._say = None
        if not self._meet(time.monotonic() + patience):
            prefix, _ = self._open(kind, record)
            self._set(f"{prefix}/alarm", f"rank {self._rank}: {reason}")

    # ------------------------------------------------------------------------------------------------------------- meeting

    def _meet(self, deadline: float) -> list[int]:
        """Meet every member; those that were not met by the deadline."""
        if self._nonces:
            return []
        self._set(f"{self._prefix}/here/{self._rank}", self._nonce)
        nonces = {self._rank: self._nonce}
        pause, meeting = SHORTEST_PAUSE, ""
        while True:
            missing = self._look_for_missing(nonces)
            if len(nonces) == len(self._members):
                if not meeting:
                    meeting = " ".join(nonces[member] for member in self._members)
                    self._set(f"{self._prefix}/saw/{self._rank}", meeting)
                missing = [member for member in self._members if self._get(f"{self._prefix}/saw/{member}") != meeting]
                if not missing:
                    self._nonces = nonces
                    return []
                if self._forget_replaced(missing, nonces):
                    meeting = ""
            if time.monotonic() >= deadline:
                return missing
            pause = self._pause(pause, deadline, missing)

    def _look_for_missing(self, nonces: dict[int, str]) -> list[int]:
        """The members that had no nonce yet; those of some of them that are there now are added."""
        missing = [member for member in self._members if member not in nonces]
        for member in missing[:AT_ONCE]:
            nonce = self._get(f"{self._prefix}/here/{member}")
            if nonce is not None:
                nonces[member] = nonce
        return missing

    def _forget_replaced(self, members: Sequence[int], nonces: dict[int, str]) -> bool:
        """Drop nonces of earlier processes, which others have replaced; whether there were any."""
        replaced = [m for m in members if self._get(f"{self._prefix}/here/{m}") != nonces[m]]
        for member in replaced:
            del nonces[member]
        return bool(replaced)

    def _replaced(self, members: Sequence[int]) -> list[int]:
        """Members whose place another process has taken since they met."""
        if not self._nonces:
            return []
        return [m for m in members if self._get(f"{self._prefix}/here/{m}") not in (None, self._nonces[m])]

    # -------------------------------------------------------------------------------------------------------------- rounds

    def _open(self, kind: str, record: Any) -> tuple[str, int]:
        """Write this rank's record of the next round; the round's prefix and number."""
        number = self._rounds[kind]
        self._rounds[kind] += 1
        prefix = self._round(kind, number)
        self._set(f"{prefix}/{self._rank}", json.dumps(record, sort_keys=True))
        return prefix, number

    def _round(self, kind: str, number: int) -> str:
        met = hashlib.sha256(" ".join(self._nonces[member] for member in self._members).encode()).hexdigest()[:16]
        return f"{self._prefix}/{met}/{kind}/{number}"

    def _collect(self, prefix: str, compare: Compare, deadline: float) -> tuple[dict[int, str], str | None]:
        """The records by rank, as far as they came, and the alarm of a rank that has given up."""
        texts: dict[int, str] = {}
        pause, alarm = SHORTEST_PAUSE, None
        hurried = False
        while True:
            missing = [member for member in self._members if member not in texts]
            came = len(texts)
            for member in missing[:AT_ONCE]:
                text = self._get(f"{prefix}/{member}")
                if text is not None:
                    texts[member] = text
            alarm = alarm or self._get(f"{prefix}/alarm")
            if len(texts) == len(self._members):
                return texts, alarm
            message = "" if hurried or len(texts) == came else self._differences(texts, compare)
            if not hurried and (message or alarm or self._replaced(missing[:AT_ONCE])):
                hurried, deadline = True, min(deadline, time.monotonic() + GRACE)
                if message and not alarm:
                    self._set(f"{prefix}/alarm", message)
            if time.monotonic() >= deadline:
                return texts, alarm
            pause = SHORTEST_PAUSE if len(texts) > came else self._pause(pause, deadline, missing)

    def _differences(self, texts: dict[int, str], compare: Compare) -> str:
        """What differs from the first rank that came; "" when nothing does."""
        first = next((member for member in self._members if member in texts), None)
        if first is None:
            return ""
        reference = json.loads(texts[first])
        lines = [
            f"rank {member}: {line}"
            for member in self._members
            if texts.get(member, texts[first]) != texts[first]
            for line in compare(reference, json.loads(texts[member]), first)
        ]
        return f"ranks disagree with rank {first}:\n  " + "\n  ".join(lines) if lines else ""

    def _no_answer(self, late: Sequence[int], timeout: float, absent: str) -> str:
        """The text of the error for ranks that did not answer, with what is known of them."""
        names = ", ".join(map(str, late))
        replaced = ", ".join(map(str, self._replaced(late)))
        if replaced:
            return f"rank {replaced} was started again, and this process was not: start all ranks of the group again"
        message = f"no answer from rank {names} of {len(self._members)} within {timeout:g} s"
        earlier = ", ".join(str(member) for member in late if self._met_an_earlier_process(member))
        if earlier:
            return f"{message}: rank {earlier} may be with an earlier process of this rank; start all ranks of the group again"
        return f"{message}{absent and f': {absent}'}"

    def _met_an_earlier_process(self, member: int) -> bool:
        saw = self._get(f"{self._prefix}/saw/{member}")
        return not self._nonces and saw is not None and self._nonce not in saw.split()

    def _forget(self, kind: str, number: int) -> None:
        """Delete a round that all have left: each its own record, and the first rank what is of all."""
        if number < 0:
            return
        prefix = self._round(kind, number)
        for name in (str(self._rank), *(["alarm", "open"] if self._rank == self._members[0] else [])):
            with contextlib.suppress(Exception):  # some stores cannot delete, and each raises another type of error
                self._store.delete_key(f"{prefix}/{name}")

    # --------------------------------------------------------------------------------------------------------------- store

    @property
    def _store(self) -> Any:
        store = self._store_of()
        if store is None:
            raise AgreementError("the process group's store is gone: the group was destroyed")
        return store

    def _set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def _get(self, key: str) -> str | None:
        """The value, None when there is none; never waits for it."""
        store = self._store
        return store.get(key).decode() if store.check([key]) else None

    def _pause(self, pause: float, deadline: float, missing: Sequence[int]) -> float:
        """Sleep, and how long to sleep the next time. Says for whom, once, where that takes long."""
        if self._say is not None and time.monotonic() >= self._say[0]:
            names, absent = ", ".join(map(str, missing)), self._say[1]
            text = "moe_lowering: rank %d has waited for rank %s for %g s, to compare before the next exchange%s"
            log.warning(text, self._rank, names, SAID_AFTER, absent and f": {absent}")
            self._say = None
        if self._stopped.wait(max(0.0, min(pause, deadline - time.monotonic()))):
            raise AgreementError("this process ends")
        return min(1.5 * pause, LONGEST_PAUSE)


# By store, with weak references: the sessions of a store end with it.
_sessions: weakref.WeakKeyDictionary[Any, dict[tuple[tuple[int, ...], int], Session]] = weakref.WeakKeyDictionary()


def session(store: Any, members: Sequence[int], rank: int) -> Session:
    """This process's session with ``members`` through a store; always the same one."""
    of_store = _sessions.setdefault(store, {})
    return of_store.setdefault((tuple(members), rank), Session(store, members, rank))


def group_session(name: str) -> tuple[Session, list[int], float] | None:
    """The session of a process group of real processes, its global ranks, and the seconds that its collectives wait.

    None where ``name`` is no group of this process, or one of a fake backend.
    """
    import torch.distributed as dist

    c10d: Any = dist.distributed_c10d
    if not dist.is_available() or not dist.is_initialized() or not name:
        return None
    try:
        group = process_group(name)
        members = dist.get_process_group_ranks(group)
    except Exception:  # torch says in its own types that a name is not one of this process's groups
        return None
    if dist.get_backend(group) == "fake":
        return None
    joined = session(c10d._get_default_store(), members, dist.get_rank())
    return joined, members, _timeout_of(group)


def _timeout_of(group: Any) -> float:
    """How long a collective of the group waits, in seconds, where its backend says so."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        waits = getattr(options, "_timeout", None)
        if isinstance(waits, datetime.timedelta):
            return waits.total_seconds()
    return LONGEST
