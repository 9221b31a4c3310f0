"""The record of one ``explain`` command, as its parser makes it. Imports no torch."""

from __future__ import annotations

import dataclasses

from moe_lowering.cli.options import provider_packages
from moe_lowering.cli.usage import UsageError
from moe_lowering.vocabulary import AUTO, FIXED, IMPLEMENTATION_FORMS

IMPLEMENTATIONS = tuple(IMPLEMENTATION_FORMS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainRequest:
    """One ``explain`` command; None for what was not given."""

    model: str | None = None
    hidden: int | None = None
    intermediate: int | None = None
    experts: int | None = None
    topk: int | None = None
    soc: str = "A3"
    ep: int = 1
    tp: int = 1
    tokens: int | None = None
    max_tokens: int = 0
    unequal_tokens: bool = False
    dtype: str | None = None
    quant: str = "none"
    fused_mode: int = 1
    buffer_mb: int | None = None
    weight_format: str | None = None
    cann: str | None = None
    hierarchy: bool = False
    capture: bool = True
    provider: list[tuple[str, str]] | None = None
    comm: str = AUTO
    policy: str = AUTO
    why: str | None = None
    sweep: tuple[int, int] | None = None
    ranks_per_node: int = 0
    measured: str = ""
    json: bool = False
    color: str = "auto"

    def __post_init__(self) -> None:
        """Raises UsageError for what one option says of another."""
        provider_packages(self.provider)
        if self.comm == AUTO and self.policy == FIXED:
            raise UsageError(
                f"argument --policy: is {FIXED} without --comm; accepted: with --comm {{{','.join(IMPLEMENTATIONS)}}}"
            )
        if self.comm != AUTO and self.policy not in (AUTO, FIXED):
            raise UsageError(
                f"argument --policy: is {self.policy} with --comm {self.comm}, which leaves nothing to choose; accepted: "
                f"{FIXED}, or without --comm"
            )

    @property
    def providers(self) -> tuple[tuple[str, str], ...]:
        """The libraries with fused operators that are taken to be installed."""
        return provider_packages(self.provider)
