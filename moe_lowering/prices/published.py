"""The published rows that laws are fitted to (``data/published.toml``), each with its sources."""

from __future__ import annotations

from typing import Any

from moe_lowering.limits.sources import Citation, cite, load_sources
from moe_lowering.prices.machines import ideal_of, read_data
from moe_lowering.prices.rows import Row


def published_rows() -> list[tuple[Row, tuple[Citation, ...]]]:
    """In the order of the file."""
    return [_published(raw) for raw in read_data("published.toml")["row"]]


def _published(raw: dict[str, Any]) -> tuple[Row, tuple[Citation, ...]]:
    row = Row(raw["soc"], raw["what"], raw["ranks"], raw["amount"], raw.get("us", 0.0))
    if "gb_s" in raw:
        row = row._replace(us=row.amount / (raw["gb_s"] * 1e3))
    elif "utilisation" in raw:
        row = row._replace(us=ideal_of(row) / raw["utilisation"])
    return row, cite(raw["source"], load_sources())
