"""``assert_agreement``: refuses to run a graph until every rank of its EP group is about to run one that fits it.

It stands before the first exchange of a graph. The comparison is made when a graph runs, not when it is compiled: a rank
that finds its graph in a compile cache never runs the pass, and ranks with unequal token counts compile other numbers of
graphs. Only the first run of a content waits; then all that a call costs is a look into a dictionary. It reads a shape
and the store, both on the host: nothing of it is on the device, and a captured graph has compared when it was captured.

With ``MOE_LOWERING_COMPARE_EVERY_RUN=1`` in the environment of every rank each run waits for all: for a search, since what was
agreed on before is not compared again otherwise, and ranks that run different ones of such graphs hang.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import weakref
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moe_lowering.agreement_records import (
    BLOCKS_ABSENT,
    COMPARE_EVERY_RUN,
    RUN_ABSENT,
    SETTINGS_ABSENT,
    block_changes,
    block_differences,
    block_key,
    setting_differences,
)
from moe_lowering.agreement_rounds import AgreementError, Session, group_session
from moe_lowering.custom_ops.library import register
from moe_lowering.custom_ops.sizes import token_count

log = logging.getLogger(__name__)

PATIENT = -1.0  # timeout: as long as a collective of the group waits
REFUSAL_PATIENCE = 10.0  # seconds that a graph which refuses to run waits for others to tell
UNKNOWN = -1  # T of a call that does not show it
SCHEMA = "assert_agreement(Tensor x, str group, float timeout, str settings, str blocks) -> ()"


class _Agreed:
    """The contents that all ranks have agreed on, for the present default process group."""

    def __init__(self) -> None:
        self.world: Any = None  # a weak reference, so that a destroyed group is not kept alive
        self.contents: set[tuple[str, str, str]] = set()

    def of(self, world: Any) -> set[tuple[str, str, str]]:
        if self.world is None or self.world() is not world:
            self.world, self.contents = weakref.ref(world), set()
        return self.contents


_AGREED = _Agreed()


def expect(group: str, settings: str, blocks: str) -> None:
    """A graph with this check was compiled: its first run looks for ranks that wait with another one (``_join_waiting``)."""
    _AGREED.contents.discard((group, settings, blocks))


def check(tokens: int, group: str, timeout: float, settings: str, blocks: str, synchronous: bool = False) -> None:
    """Compare with the other ranks, unless they agreed on the same before.

    Args:
        tokens: T of this call; ``UNKNOWN`` when the caller cannot tell.
        group: name of the EP group. Nothing is compared where it is no group of real processes.
        timeout: seconds to wait for the slowest rank; ``PATIENT`` for as long as the group's collectives do.
        settings, blocks: JSON, see ``agreement_records``; ``passes.agreement_check`` writes them.
        synchronous: an exchange that this process was part of has ended when the next one begins, which a device's need not.

    Raises:
        AgreementError: on every rank.
    """
    world = dist.group.WORLD if dist.is_available() else None
    if world is None:
        return
    contents = _AGREED.of(world)
    key = (group, settings, blocks)
    if key in contents:
        return
    meeting = group_session(group)
    if meeting is not None:
        session, _, patience = meeting
        seconds = patience if timeout == PATIENT else timeout
        if not _compare(session, seconds, json.loads(settings), json.loads(blocks), tokens, synchronous):
            return
    contents.add(key)


def _compare(session: Session, timeout: float, settings: Any, blocks: Any, tokens: int, synchronous: bool) -> bool:
    """Whether the next run needs no comparison. False when each run is compared, and when this graph refuses to run in any
    case: the other ranks have then been notified, and the next node gives the error."""
    if blocks["refuses"]:
        patience = min(timeout, REFUSAL_PATIENCE)
        with contextlib.suppress(AgreementError):  # this rank then raises its own reason, not that of the comparison
            session.agree_once("settings", settings, setting_differences, patience, SETTINGS_ABSENT)
        session.refuse("blocks", {**blocks, "T": None, "every_run": _every_run()}, blocks["refuses"], patience)
        return False
    session.agree_once("settings", settings, setting_differences, timeout, SETTINGS_ABSENT)
    actual = tokens if blocks["equal_tokens"] and tokens != UNKNOWN else None
    record, key = {**blocks, "T": actual, "every_run": _every_run()}, block_key(blocks)
    if record["every_run"]:
        session.agree("blocks", record, block_differences, timeout, _describe_absent(RUN_ABSENT, session, record))
        return False
    if session.has_agreed("blocks", key):
        _join_waiting(session, timeout, record, synchronous)
    else:
        absent = _describe_absent(BLOCKS_ABSENT, session, record)
        session.agree_once("blocks", record, block_differences, timeout, absent, key=key)
    return True


def _every_run() -> bool:
    """Whether the user asks for a comparison at every run, to learn why ranks wait for each other."""
    return os.environ.get(COMPARE_EVERY_RUN, "") not in ("", "0")


def _describe_absent(absent: str, session: Session, record: Any) -> str:
    """What a rank that does not come may be doing, and how this graph differs from the last one that was agreed on."""
    last = session.last("blocks")
    changes = "" if last is None else block_changes(last, record)
    return absent + (f". This graph beside the last one on which all agreed: {changes}" if changes else "")


def _join_waiting(session: Session, timeout: float, record: Any, synchronous: bool) -> None:
    """The first run of a graph that was compiled again, on which all agreed before. No other rank need compile it again, so
    that none is waited for. But one that waits with a graph of its own would wait in vain.

    That is certain where exchanges end on the host: a rank comes to its next graph after all have begun the one before, so
    that one which waits is not ahead of this one. A rank with a device may be. It is certain too after a rank has given up.
    """
    if not any(kind["strict"]["exchange"] for kind in record["kinds"]) or not session.is_asked("blocks"):
        return
    if synchronous or session.is_asked("blocks", gave_up=True):
        session.agree("blocks", record, block_differences, timeout)
    else:
        log.warning(
            "moe_lowering: a rank waits with a graph on which the ranks have not agreed, while this one runs a graph on which "
            "they have: if no rank goes on, their graphs differ (docs/ranks.md)"
        )


def _real(x: Tensor, group: str, timeout: float, settings: str, blocks: str) -> None:
    """``check`` with T, the product of the leading dimensions of ``x [..., H]``."""
    if (group, settings, blocks) in _AGREED.contents and _AGREED.world() is dist.group.WORLD:
        return  # the path of every step but the first: one look-up and no more
    tokens = token_count(x.shape)
    # gloo ends an exchange of nothing at once
    check(tokens, group, timeout, settings, blocks, synchronous=x.device.type == "cpu" and tokens > 0)


def _fake(x: Tensor, group: str, timeout: float, settings: str, blocks: str) -> None:
    """Does nothing: ranks are compared when a graph runs, not when it is traced."""


register(SCHEMA, cpu=_real, npu=_real, fake=_fake, side_effect=True)

__all__ = ["PATIENT", "UNKNOWN", "AgreementError", "check", "expect"]
