"""Fit the laws of prices to the published rows, and print how far each row is from its law: ``python benchmarks/fit_costs.py``.

``--write`` renews ``moe_lowering/prices/data/fitted.toml`` and the tables of docs/costs.md; ``--measured FILE`` fits a
user's rows instead, and writes nothing. A test compares what is written with what is fitted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_lowering.limits.sources import render_citations
from moe_lowering.prices.fit import errors, fit_law
from moe_lowering.prices.laws import Law, stated_laws
from moe_lowering.prices.machines import ideal_of
from moe_lowering.prices.published import published_rows
from moe_lowering.prices.rows import EXCHANGES, WORDS, Row, read_csv

ROOT = Path(__file__).parents[1]
FITTED = ROOT / "moe_lowering" / "prices" / "data" / "fitted.toml"
PAGE = ROOT / "docs" / "costs.md"
BEGIN, END = "<!-- fit -->\n", "<!-- end of fit -->\n"

Fit = tuple[str, str, list[Row], Law]


def fits(rows: Sequence[Row]) -> Iterator[Fit]:
    """(kind, SoC, its rows, the law fitted to them), in the order of ``WORDS``."""
    for what in WORDS:
        for soc in dict.fromkeys(row.soc for row in rows if row.what == what):
            own = [row for row in rows if (row.what, row.soc) == (what, soc)]
            stated, start = stated_laws()[what][0], stated_laws()["exchange"][0].fixed_us
            yield what, soc, own, fit_law(own, stated, "fitted", start if what in EXCHANGES else 0.0)


def toml(found: Sequence[Fit]) -> str:
    """``data/fitted.toml``."""
    lines = [
        "# Written by benchmarks/fit_costs.py --write from published.toml: laws as in stated.toml, fitted on the rows of a SoC."
    ]
    for what, soc, _, law in found:
        lines += ["", f"[{what}]", f'soc = "{soc}"']
        lines += [f"{name} = {getattr(law, name)}" for name in ("fixed_us", "slowdown", "growth", "error")]
    return "\n".join(lines) + "\n"


def tables(found: Sequence[Fit], sources: dict[Row, str]) -> str:
    """Laws, and each row beside its price, as Markdown."""
    head = ("what", "soc", "fixed us", "slowdown", "growth", "error")
    lines = [
        head,
        *(
            (what, soc, f"{law.fixed_us:.2f}", f"{law.slowdown:.3f}", f"{law.growth:.3f}", f"{law.error:.0%}")
            for what, soc, _, law in found
        ),
    ]
    rows = [("what", "ranks", "MB", "measured us", "price us", "off by", "source")]
    for what, _, own, law in found:
        for row, error in zip(own, errors(law, own), strict=True):
            price = law.us(ideal_of(row), row.ranks)
            amount = f"{row.amount / 1e6:,.1f}"
            rows.append(
                (what, str(row.ranks), amount, f"{row.us:,.0f}", f"{price:,.0f}", f"{error:+.0%}", sources.get(row, ""))
            )
    return _markdown(lines) + "\n" + _markdown(rows)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    first, *rest = lines
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (first, ["---"] * len(first), *rest))


def published() -> tuple[list[Fit], dict[Row, str]]:
    """The fits of the published rows, and where each row comes from."""
    rows = published_rows()
    return list(fits([row for row, _ in rows])), {row: render_citations(sources) for row, sources in rows}


def page(old: str, table: str) -> str:
    """docs/costs.md with new tables."""
    before, _, rest = old.partition(BEGIN)
    return before + BEGIN + table + END + rest.partition(END)[2]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="renew data/fitted.toml and docs/costs.md")
    parser.add_argument("--measured", metavar="FILE", help="fit these rows (CSV) instead, and write nothing")
    given = parser.parse_args(arguments)
    if given.measured:
        print(tables(list(fits(read_csv(given.measured))), {}), end="")
        return
    found, sources = published()
    print(tables(found, sources), end="")
    if given.write:
        FITTED.write_text(toml(found), "utf-8")
        PAGE.write_text(page(PAGE.read_text("utf-8"), tables(found, sources)), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
