"""The range of T (tokens of a rank) that a lowered graph accepts, enforced in the graph by ``assert_tokens``.

It refuses any T outside of the range that a choice rests on. It also refuses any T with which this rank leaves a block
that other ranks may have lowered, since the ranks would wait for each other.

Contract. ``assert_tokens`` is emitted once for each range of one T, in front of what rests on it. When a block's edits
are taken back, its ``assert_tokens`` go too and are forgotten here (``forget``), so that the next block emits its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.custom_ops.assert_tokens import NOTHING
from moe_lowering.deployment import Deployment
from moe_lowering.limits import TokenRange
from moe_lowering.limits.bounds import as_argument
from moe_lowering.limits.wording import make_wording
from moe_lowering.passes.blocks import Block, size_key
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.legality import Refusal
from moe_lowering.passes.raise_foreign.records import ForeignBlock
from moe_lowering.passes.run.messages import log_warning
from moe_lowering.passes.token_ranges import request_guard

ASSERT_TOKENS = torch.ops.moe_lowering.assert_tokens.default


class TokenBounds:
    """What one run made its graph assert.

    Args:
        foreign: the layers that others wrote, by the combine of their generic form. replaced: what stands for an erased
            result. Both grow while the run goes on.
        rewrite: runs one rewrite with a key of what it emits, and takes it back where it fails.

    Attributes:
        refused: blocks for whose sake the graph refuses to run, and why.
    """

    def __init__(
        self,
        deployment: Deployment,
        foreign: Mapping[Node, ForeignBlock],
        replaced: dict[Node, Node],
        rewrite: Callable[[Callable[[Emitter], None], tuple[Any, ...]], object],
    ) -> None:
        self._deployment = deployment
        self._foreign = foreign
        self._replaced = replaced
        self._rewrite = rewrite
        self._enforced: set[Any] = set()
        self.refused: list[tuple[Block, Refusal]] = []

    def forget(self) -> None:
        """After edits were taken back: the assert_tokens of a block went with it, the next block of its T brings its own."""
        self._enforced.clear()

    def is_refused(self, block: Block) -> bool:
        """Whether the graph refuses to run for the sake of this block, or of one that stands at the same combine."""
        return any(other.combine is block.combine for other, _ in self.refused)

    def take_back(self, block: Block) -> Refusal | None:
        """Forget a block whose edits are taken back; why the graph refused to run for its sake."""
        refusal = next((why for other, why in self.refused if other is block), None)
        self.refused = [pair for pair in self.refused if pair[0] is not block]
        self.forget()
        return refusal

    def enforce(self, block: Block, interval: TokenRange, emit: Emitter) -> None:
        """The graph refuses to run outside of the range that its choice rests on, once per range of one T."""
        if (size_key(block.spec.tokens), interval) not in self._enforced:
            self._emit(block, interval, emit, min(emit.created))

    def keep(self, block: Block, interval: TokenRange | None) -> None:
        """The block was rewritten, and with it stays what it enforces."""
        self._enforced.add((size_key(block.spec.tokens), interval))

    def request_guard(self, block: Block, interval: TokenRange) -> None:
        """After the block is rewritten, or left because no size nearby is legal; never for one that was undone."""
        try:
            request_guard(block.spec.tokens, interval)
        except Exception:
            # The graph itself refuses sizes outside of its range: without the guard they are refused, not recompiled for
            log_warning("moe_lowering: no guard on %s could be requested for %s", interval, block.name)

    def refuse_to_run(self, block: Block, refusal: Refusal) -> None:
        """The others communicate as they decided, so this rank must not run its generic operators beside them."""
        self.refused.append((block, refusal))
        x, layer = self._tokens_of(block), self._foreign.get(block.combine)
        position = block.dispatch if layer is None else layer.first or layer.result
        args = (x, *_assert_bounds(refusal.accepted))
        if not any(user.target is ASSERT_TOKENS and user.args == args for user in x.users):
            key = ("refuse", block.spec)
            self._rewrite(lambda emit: self._emit(block, refusal.accepted, emit, position), key)

    def refuse_if_ranks_differ(self, block: Block) -> str:
        """After an undone rewrite: what to add to the reason where ranks with another T may have succeeded."""
        if self._deployment.ep_size == 1 or self._deployment.equal_tokens:
            return ""
        text = "; ranks with another T may have lowered it: the graph refuses to run"
        self.refuse_to_run(block, Refusal(make_wording(text)))
        return text

    def _emit(self, block: Block, interval: TokenRange | None, emit: Emitter, position: Node) -> None:
        with emit.at(position, position):
            emit.call(ASSERT_TOKENS, self._tokens_of(block), *_assert_bounds(interval), **self._declared())

    def _tokens_of(self, block: Block) -> Node:
        """Its x; of a layer that others wrote the one that stays when the layer is left."""
        layer = self._foreign.get(block.combine)
        return block.x if layer is None else layer.reading(self._replaced).x

    def _declared(self) -> dict[str, int]:
        """The range of T that the deployment declares, if any, for what ``assert_tokens`` says."""
        if not self._deployment.max_tokens:
            return {}
        return {"min_tokens": self._deployment.min_tokens, "max_tokens": self._deployment.max_tokens}


def _assert_bounds(interval: TokenRange | None) -> tuple[int, int]:
    """The bounds of ``assert_tokens`` that accept a range; None is no T at all."""
    return (0, NOTHING) if interval is None else (interval.low, as_argument(interval.high))
