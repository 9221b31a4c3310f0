"""Laws: what a kind of work costs beside its time at the machine's peak, and how wrong that may be.

    us = fixed_us + ideal_us * max(1, slowdown + growth * doublings)

``doublings`` is the logarithm of the number of ranks to base 2, rounded up: what MC2 takes per byte grows with EP. A law that
was fitted on one SoC and is used on another one has ``ELSEWHERE`` more error.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from moe_lowering.limits.sources import Citation, cite, load_sources
from moe_lowering.lookup import look_up
from moe_lowering.prices.machines import read_data
from moe_lowering.prices.rows import WORDS

ELSEWHERE = 0.5


@dataclasses.dataclass(frozen=True)
class Law:
    """See the module.

    Attributes:
        error: a share of the price.
        origin: where the law comes from, in a few words.
        least: of the factor: nothing is faster than the peak, but for what a user has measured.
    """

    fixed_us: float
    slowdown: float
    growth: float
    error: float
    origin: str
    least: float = 1.0

    def factor(self, ranks: int) -> float:
        """How many times slower than the peak."""
        return max(self.least, self.slowdown + self.growth * doublings(ranks))

    def us(self, ideal: float, ranks: int) -> float:
        """The price of work that takes ``ideal`` microseconds at the peak."""
        return self.fixed_us + ideal * self.factor(ranks)


def doublings(ranks: int) -> int:
    """log2, rounded up; of ints, so that it is the same everywhere."""
    return max(ranks - 1, 0).bit_length()


def fitted_laws() -> dict[str, tuple[str, Law]]:
    """Those of ``data/fitted.toml``, each with the SoC whose rows it was fitted to."""
    return {
        what: (raw.pop("soc"), Law(**{**raw, "origin": "fitted to published rows"}))
        for what, raw in read_data("fitted.toml").items()
    }


@functools.cache
def stated_laws() -> dict[str, tuple[Law, tuple[Citation, ...]]]:
    """Those of ``data/stated.toml``, each with its sources."""
    tables = read_data("stated.toml")
    if tuple(tables) != WORDS:
        raise ValueError(f"stated.toml: has {', '.join(tables)}; accepted: {', '.join(WORDS)}, in this order")
    return {what: _stated(raw) for what, raw in tables.items()}


def _stated(raw: dict[str, Any]) -> tuple[Law, tuple[Citation, ...]]:
    sources = tuple(citation for text in raw.pop("source").split("; ") for citation in cite(text, load_sources()))
    return Law(**raw, origin="stated"), sources


@functools.lru_cache(maxsize=64)
def known_law(what: str, soc: str) -> Law:
    """The law of the package's own data for a SoC."""
    law, _ = look_up(stated_laws(), what, "price: law")
    if what not in (fitted := fitted_laws()):
        return law
    fitted_on, law = fitted[what]
    if fitted_on == soc:
        return law
    return dataclasses.replace(law, error=law.error + ELSEWHERE, origin=f"fitted to published rows of {fitted_on}")
