"""The record of one ``lower`` command, with the sizes and flags that follow from its options. Imports no torch."""

from __future__ import annotations

import dataclasses

from moe_lowering.cli.assumed_machine import provider_packages
from moe_lowering.vocabulary import EXPERT_FORMATS, TOKEN_UNPERMUTE

REPLAYS = 8  # of each captured graph, where the command does not say


@dataclasses.dataclass(frozen=True)
class LowerRequest:
    """One ``lower`` command; None for what was not given.

    Attributes:
        tokens: of one rank. declared: the bound that the deployment declares, 0 for the most tokens that a rank runs.
        taken_as: which alias of a SoC was taken as which.
    """

    model: str
    comm: str = "auto"
    ep: int = 1
    soc: str = "A3"
    tp: int = 1
    quant: str = "none"
    fused_mode: int = 1
    provider: list[tuple[str, str]] | None = None
    tokens: int = 32
    layers: int | None = None
    dtype: str = "bfloat16"
    dynamic: bool = False
    fake: bool = False
    whole: bool = False
    capture: bool = False
    replays: int | None = None
    ranks_per_node: int = 0
    measured: str | None = None
    declared: int = 0
    unequal_tokens: bool = False
    buffer_mb: int | None = None
    weight_format: str | None = None
    cann: str | None = None
    hierarchy: bool = False
    unpermute_operator: str = TOKEN_UNPERMUTE
    policy: str = "auto"
    overlap: bool = False
    verbose: bool = False
    json: bool = False
    html: str | None = None
    taken_as: tuple[str, ...] = ()

    @property
    def quantised(self) -> bool:
        """Whether the experts are quantised."""
        return EXPERT_FORMATS[self.quant].quantised

    @property
    def batch(self) -> int:
        """Sequences per rank: two when the tokens can be halved."""
        return 2 if self.tokens % 2 == 0 and self.tokens > 2 else 1

    @property
    def lengths(self) -> list[int]:
        """Sequence lengths to run, the asked one first; with ``dynamic`` a longer and a shorter one too."""
        length = self.tokens // self.batch
        if not self.dynamic:
            return [length]
        return [length, length + max(1, length // 2), *([length // 2] if length >= 4 else [])]

    @property
    def max_tokens(self) -> int:
        """The bound that the deployment declares: what the command says, or the most tokens that one rank runs."""
        return self.declared or self.most_run

    @property
    def most_run(self) -> int:
        """The most tokens that one rank runs."""
        return self.batch * max(self.lengths)

    @property
    def providers(self) -> tuple[tuple[str, str], ...]:
        """The libraries with fused operators that are taken to be installed."""
        return provider_packages(self.provider)
