"""``assert_agreement``: refuses to run a graph until every rank of its EP group is about to run one that fits it.

It stands before the first exchange of a graph. The comparison is made when a graph runs, not when it is compiled: a rank
that finds its graph in a compile cache never runs the pass, and ranks with unequal token counts compile other numbers of
graphs. Only the first run of a content waits; then all that a call costs is a look into a dictionary. It reads a shape
and the store, both on the host: nothing of it is on the device, and a captured graph has compared when it was captured.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moe_lowering.agreement_records import (
    BLOCKS_ABSENT,
    SETTINGS_ABSENT,
    block_differences,
    block_key,
    setting_differences,
)
from moe_lowering.agreement_rounds import AgreementError, Session, group_session
from moe_lowering.custom_ops.library import register
from moe_lowering.custom_ops.sizes import token_count

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


def check(tokens: int, group: str, timeout: float, settings: str, blocks: str) -> None:
    """Compare with the other ranks, unless they agreed on the same before.

    Args:
        tokens: T of this call; ``UNKNOWN`` when the caller cannot tell.
        group: name of the EP group. Nothing is compared where it is no group of real processes.
        timeout: seconds to wait for the slowest rank; ``PATIENT`` for as long as the group's collectives do.
        settings, blocks: JSON, see ``agreement_records``; ``passes.agreement_check`` writes them.

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
        if not _compare(session, seconds, json.loads(settings), json.loads(blocks), tokens):
            return  # not stored: the graph refuses to run each time, and the next node gives the error
    contents.add(key)


def _compare(session: Session, timeout: float, settings: Any, blocks: Any, tokens: int) -> bool:
    """Whether all ranks agreed. False when this graph refuses to run in any case; the other ranks have then been
    notified."""
    if blocks["refuses"]:
        patience = min(timeout, REFUSAL_PATIENCE)
        with contextlib.suppress(AgreementError):  # this rank then raises its own reason, not that of the comparison
            session.agree_once("settings", settings, setting_differences, patience, SETTINGS_ABSENT)
        session.refuse("blocks", {**blocks, "T": None}, blocks["refuses"], patience)
        return False
    session.agree_once("settings", settings, setting_differences, timeout, SETTINGS_ABSENT)
    actual = tokens if blocks["equal_tokens"] and tokens != UNKNOWN else None
    record = {**blocks, "T": actual}
    session.agree_once("blocks", record, block_differences, timeout, BLOCKS_ABSENT, key=block_key(blocks))
    return True


def _real(x: Tensor, group: str, timeout: float, settings: str, blocks: str) -> None:
    """``check`` with T, the product of the leading dimensions of ``x [..., H]``."""
    if (group, settings, blocks) in _AGREED.contents and _AGREED.world() is dist.group.WORLD:
        return  # the path of every step but the first: one look-up and no more
    check(token_count(x.shape), group, timeout, settings, blocks)


def _fake(x: Tensor, group: str, timeout: float, settings: str, blocks: str) -> None:
    """Does nothing: ranks are compared when a graph runs, not when it is traced."""


register(SCHEMA, cpu=_real, npu=_real, fake=_fake, side_effect=True)

__all__ = ["PATIENT", "UNKNOWN", "AgreementError", "check"]
