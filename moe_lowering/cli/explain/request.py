"""The record of one ``explain`` command, as its parser makes it. Imports no torch."""

from __future__ import annotations

import dataclasses

from moe_lowering.cli.assumed_machine import provider_packages
from moe_lowering.cli.options import check_policy
from moe_lowering.cli.usage import UsageError
from moe_lowering.vocabulary import AUTO, IMPLEMENTATION_FORMS, TOKEN_UNPERMUTE

IMPLEMENTATIONS = tuple(IMPLEMENTATION_FORMS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainRequest:
    """One ``explain`` command; None for what was not given.

    Attributes:
        socs, eps, quants: one each, or with commas the rows of a table.
        counts: ranges of T, (first, last); () where none was given.
        taken_as: which aliases of SoCs were taken as which.
    """

    model: str | None = None
    hidden: int | None = None
    intermediate: int | None = None
    experts: int | None = None
    topk: int | None = None
    socs: tuple[str, ...] = ("A3",)
    eps: tuple[int, ...] = (1,)
    tp: int = 1
    counts: tuple[tuple[int, int], ...] = ()
    max_tokens: int = 0
    unequal_tokens: bool = False
    dtype: str | None = None
    quants: tuple[str, ...] = ("none",)
    fused_mode: int = 1
    buffer_mb: int | None = None
    weight_format: str | None = None
    cann: str | None = None
    hierarchy: bool = False
    unpermute_operator: str = TOKEN_UNPERMUTE
    capture: bool = True
    provider: list[tuple[str, str]] | None = None
    comm: str = AUTO
    policy: str = AUTO
    why: str | None = None
    sweep: tuple[int, int] | None = None
    ranks_per_node: int = 0
    measured: str | None = None
    json: bool = False
    html: str | None = None
    color: str = "auto"
    taken_as: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UsageError for what one option says of another."""
        provider_packages(self.provider)
        check_policy(self.comm, self.policy)
        for option, value in (("--why", self.why), ("--sweep", self.sweep)):
            if value is not None and self.is_table:
                raise UsageError(
                    f"argument {option}: is given with several deployments or a range of --tokens, which make a table; accepted: "
                    "with one --soc, --ep, --quant and --tokens"
                )
        if self.unequal_tokens and any(low < high for low, high in self.counts):
            raise UsageError(
                "argument --tokens: is a range with --unequal-tokens, where T is not read; accepted: without --unequal-tokens"
            )

    @property
    def is_table(self) -> bool:
        """Whether the answer is a table: several deployments, several T, or a range."""
        several = max(len(self.socs), len(self.eps), len(self.quants), len(self.counts)) > 1
        return several or any(low < high for low, high in self.counts)

    @property
    def soc(self) -> str:
        """The first SoC, of a command with one the only one; likewise ``ep``, ``quant`` and ``tokens``."""
        return self.socs[0]

    @property
    def ep(self) -> int:
        return self.eps[0]

    @property
    def quant(self) -> str:
        return self.quants[0]

    @property
    def tokens(self) -> int | None:
        return self.counts[0][0] if self.counts else None

    def each(self) -> list[ExplainRequest]:
        """One request for each deployment and quantisation, in the order of the table."""
        return [
            dataclasses.replace(self, socs=(soc,), eps=(ep,), quants=(quant,))
            for soc in self.socs
            for ep in self.eps
            for quant in self.quants
        ]

    @property
    def providers(self) -> tuple[tuple[str, str], ...]:
        """The libraries with fused operators that are taken to be installed."""
        return provider_packages(self.provider)
