"""Tables that several pages of ``--html`` have: verdicts with broken rules, costs with bars, deployments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moe_lowering.cli.html.page import Markup, bar, element, items, join, table
from moe_lowering.explanation.memory import TOO_SMALL
from moe_lowering.explanation.table import Row
from moe_lowering.number_words import count_of
from moe_lowering.report.block_costs import BlockCost
from moe_lowering.report.records import Verdict


def verdict_table(verdicts: Mapping[str, Verdict], chosen: str | None) -> Markup:
    """A line for each implementation: whether it is legal, and what it breaks."""
    rows = []
    for name, verdict in verdicts.items():
        form = f" ({verdict.form})" if verdict.form not in ("", name) else ""
        state = "chosen" if name == chosen else "legal" if verdict.legal else "refused"
        rows.append((element("b", name) if name == chosen else name, f"{state}{form}", _broken(verdict)))
    return table(("implementation", "verdict", "what it breaks"), rows)


def _broken(verdict: Verdict) -> Markup:
    each = {(v.code, v.message): v for v in verdict.violations}
    return items(
        join((element("code", f"[{v.code}]"), v.message, element("span", f" {v.advice}", class_="note")))
        for v in each.values()
    )


def cost_table(costs: Sequence[BlockCost]) -> Markup:
    """Kernels, bytes and price of each legal implementation, with bars; empty without one."""
    if not costs:
        return Markup()
    figures = {
        "us": [cost.us for cost in costs],
        "kernels": [float(cost.kernels) for cost in costs],
        "MB moved": [cost.moved / 1e6 for cost in costs],
        "MB sent": [(cost.sent_within + cost.sent_between) / 1e6 for cost in costs],
        "MB buffers": [cost.buffers / 1e6 for cost in costs],
    }
    if any(cost.workspace for cost in costs):
        figures["MB workspace"] = [(cost.workspace or 0) / 1e6 for cost in costs]
    rows = []
    for at, cost in enumerate(costs):
        row: list[object] = [cost.name]
        for what, values in figures.items():
            error = f" +- {cost.error_us:,.0f}" if what == "us" else ""
            digits = 0 if what in ("us", "kernels") else 1
            row.append(join((f"{values[at]:,.{digits}f}{error}", bar(values[at], max(values)))))
        rows.append(row)
    tokens = costs[0].tokens
    return join((element("p", f"One MoE layer at {count_of(tokens, 'token')} of a rank:"), table(("", *figures), rows)))


def deployment_table(rows: Iterable[Row]) -> Markup:
    """The rows of ``explanation.table``."""
    titles = (
        "SoC",
        "EP",
        "quant",
        "T",
        "choice",
        "us",
        "kernels",
        "MB moved",
        "MB sent",
        "GB of memory",
        "HCCL_BUFFSIZE",
        "one change; why not the others",
    )
    return table(titles, [_deployment_row(row) for row in rows])


def _deployment_row(row: Row) -> list[object]:
    piece, cost, memory = row.piece, row.cost, row.memory
    figures: list[object] = ["", "", "", ""]
    if cost is not None:
        sent = (cost.sent_within + cost.sent_between) / 1e6
        price = f"{cost.us:,.0f} +- {cost.error_us:,.0f}"
        figures = [price, cost.kernels, f"{cost.moved / 1e6:,.1f}", f"{sent:,.1f}"]
    changes = [
        f"{name} legal with {' or '.join(c.text for c in found)}" for name, found in row.changes.items() if found
    ]
    others = "; ".join(f"{name} [{'] ['.join(codes)}]" for name, codes in row.others.items())
    needed = Markup(f"{memory.needed / 1e9:.1f}" + ("" if memory.fits else f"<br>[{TOO_SMALL}]"))
    tokens = str(piece.low) if piece.low == piece.high else f"{piece.low} to {piece.high}"
    why = join((element("p", "; ".join(changes)), element("span", others, class_="note")) if changes else (others,))
    return [row.soc, row.ep, row.quantisation, tokens, row.choice or "none", *figures, needed, row.buffer_needed, why]
