"""All that prices in one deployment depend on: its machine, and the laws of each kind of work."""

from __future__ import annotations

import dataclasses
import functools

from moe_lowering.lookup import look_up
from moe_lowering.prices.fit import fit_law
from moe_lowering.prices.laws import Law, doublings, known_law
from moe_lowering.prices.machines import Machine, Sent, ideal_link_us, ideal_us, machine_of
from moe_lowering.prices.rows import WORDS, Row, require_rows


@dataclasses.dataclass(frozen=True)
class Rates:
    """All that prices in one deployment depend on.

    Attributes:
        soc: by its name.
        ranks_per_node: ranks that share the links of a node.
        laws: by word, in the order of ``rows.WORDS``.
    """

    soc: str
    ranks_per_node: int
    laws: tuple[tuple[str, Law], ...]

    @property
    def machine(self) -> Machine:
        return machine_of(self.soc)

    @functools.cached_property
    def _by_name(self) -> dict[str, Law]:
        return dict(self.laws)

    def law(self, what: str) -> Law:
        return look_up(self._by_name, what, "price: law")

    def ideal(self, what: str, amount: int, ranks: int = 1) -> float:
        """Time at the peak, in microseconds."""
        return ideal_us(self.machine, what, amount, ranks, self.ranks_per_node)

    def link(self, sent: Sent) -> float:
        """Time of bytes on links at the peak, in microseconds."""
        return ideal_link_us(self.machine, sent)

    def latency(self, ranks: int) -> float:
        """Of a collective: a step for each doubling, on the slowest link that it uses."""
        machine = self.machine
        link = machine.between if ranks > self.ranks_per_node else machine.within
        return link.latency_us * doublings(ranks)


@functools.lru_cache(maxsize=64)
def rates_of(soc: str, ranks_per_node: int = 0, measured: tuple[Row, ...] = ()) -> Rates:
    """Of a SoC, with a user's rows in place of the package's laws of the same kind.

    Args:
        ranks_per_node: 0 for the SoC's server.

    Raises:
        MeasuredError: there are rows, and none of this SoC.
    """
    own = [row for row in require_rows("measured", measured, soc) if row.soc == soc]
    laws = []
    for what in WORDS:
        rows = [row for row in own if row.what == what]
        known = known_law(what, soc)
        laws.append((what, fit_law(rows, known, "fitted to measured rows") if rows else known))
    return Rates(soc, ranks_per_node or machine_of(soc).ranks_per_node, tuple(laws))
