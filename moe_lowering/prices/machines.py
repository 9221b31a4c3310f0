"""Peak figures of each SoC (``data/machines.toml``), and how long work takes at them."""

from __future__ import annotations

import dataclasses
import functools
from importlib import resources
from typing import Any

from moe_lowering.limits.sources import Citation, cite, load_sources
from moe_lowering.limits.toml import loads
from moe_lowering.lookup import look_up
from moe_lowering.prices.rows import Row
from moe_lowering.vocabulary import SOCS

FILE = "machines.toml"


@dataclasses.dataclass(frozen=True)
class Link:
    """Between two ranks: GB/s one way, and the latency in microseconds."""

    gb_s: float
    latency_us: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """One die or card.

    Attributes:
        ranks_per_node: of a server.
        memory: GB/s. memory_gib: its size, 0 where it is not known.
        within, between: the links of a node, and those between nodes.
        tops: 10**12 operations a second of matmuls, by the words ``16bit``, ``int8``, ``float32``.
        sources: where all of it comes from.
    """

    ranks_per_node: int
    memory: float
    memory_gib: int
    within: Link
    between: Link
    tops: tuple[tuple[str, float], ...]
    sources: tuple[Citation, ...]


def read_data(name: str) -> dict[str, Any]:
    """A file of ``data``."""
    return loads(resources.files("moe_lowering.prices").joinpath("data").joinpath(name).read_text("utf-8"))


@functools.cache
def machines() -> dict[str, Machine]:
    """Every SoC of the vocabulary, by its name."""
    tables = read_data(FILE)
    if tables.keys() != SOCS.keys():
        raise ValueError(f"{FILE}: has {sorted(tables)}; accepted: {', '.join(SOCS)}, each of them")
    return {soc: _machine(raw) for soc, raw in tables.items()}


def machine_of(soc: str) -> Machine:
    """Raises ValueError for a SoC that is not known."""
    return look_up(machines(), soc, "price: soc")


def _machine(raw: dict[str, Any]) -> Machine:
    fields = {**raw, "tops": tuple(raw["tops"].items()), "sources": cite(raw["source"], load_sources())}
    fields |= {link: Link(**raw[link]) for link in ("within", "between")}
    del fields["source"]
    return Machine(**fields)


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends to others, or gets of them, by tier of links; no more than the nodes' own count."""

    within: int
    between: int

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.within + other.within, self.between + other.between)


def split_by_tier(amount: int, ranks: int, ranks_per_node: int) -> Sent:
    """A payload that is spread evenly over the ranks of a group, its own among them. Ranks of a node are neighbours."""
    in_node = min(ranks, ranks_per_node)
    return Sent(amount * (in_node - 1) // ranks, amount * (ranks - in_node) // ranks)


def ideal_us(machine: Machine, what: str, amount: int, ranks: int, ranks_per_node: int) -> float:
    """Time of a kind of work at the machine's peak.

    Args:
        what: a word of ``rows.WORDS``. amount: what a row of ``rows`` has.
    """
    if what == "vector":
        return 0.0
    if what == "memory":
        return amount / (machine.memory * 1e3)
    if what.startswith("matmul_"):
        rate = look_up(dict(machine.tops), what.removeprefix("matmul_"), "price: dtype of a matmul")
        return amount / (rate * 1e6)
    return ideal_link_us(machine, split_by_tier(amount, ranks, ranks_per_node))


def ideal_link_us(machine: Machine, sent: Sent) -> float:
    """One tier after the other: a group that spans nodes is no faster per byte for having two."""
    return sent.within / (machine.within.gb_s * 1e3) + sent.between / (machine.between.gb_s * 1e3)


def ideal_of(row: Row) -> float:
    """Time of a measured row's work at the machine's peak, in microseconds."""
    machine = machine_of(row.soc)
    return ideal_us(machine, row.what, row.amount, row.ranks, row.ranks_per_node or machine.ranks_per_node)
