"""What a lowered layer costs on a device, counted from its operators: ``make costs``; ``--write`` renews docs/costs.md.

Sizes are those of a decode step of DeepSeek-V3: 128 tokens a rank, H 7168, I 2048, 8 of 256 experts; without the router.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from moe_lowering import simulator  # first: it lets torch be imported where torch_npu is installed without CANN

simulator.enable()

from layers import LayerSizes, emitted, lower_layer  # noqa: E402

from moe_lowering.custom_ops.fused import FORMATS as FUSED_FORMATS  # noqa: E402
from moe_lowering.passes.implementations import IMPLEMENTATIONS  # noqa: E402
from moe_lowering.report.block_costs import BlockCost  # noqa: E402
from moe_lowering.report.graph_costs import Cost, total_cost  # noqa: E402
from moe_lowering.vocabulary import EXPERT_FORMATS, FINALIZE_ROUTING  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "costs.md"
EP_SIZES = (16, 32)
NO_SUCH = {("fused_mc2", name) for name in EXPERT_FORMATS if name not in FUSED_FORMATS}
HEAD = (
    "EP", "weights", "implementation", "kernels", "exchanges", "MB moved", "MB outside of exchanges", "once per graph",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer: EP size, weight format, implementation and its form, its cost, that of what all layers share, what the
    report says, and the operator that brings rows back, where it is not the default."""

    ep_size: int
    quantisation: str
    name: str
    layer: Cost
    once: Cost
    told: BlockCost | None = None
    operator: str = ""

    def cells(self) -> tuple[str, ...]:
        layer, outside = self.layer, self.layer.moved - self.layer.exchanged
        weights = "bf16" if self.quantisation == "none" else self.quantisation.upper()
        counts = (layer.kernels, layer.collectives, f"{layer.moved / 1e6:,.1f}", f"{outside / 1e6:,.1f}")
        name = ", ".join(filter(None, (self.name, self.operator)))
        return (str(self.ep_size), weights, name, *map(str, counts), str(self.once.kernels))


def measure(comm: str, ep_size: int, quantisation: str, operator: str = "") -> Row:
    """Lower one layer and count it."""
    fields = {"unpermute_operator": operator} if operator else {}
    lowered = lower_layer(LayerSizes(), comm, ep_size, quantisation, **fields)
    (block,) = lowered.report.blocks
    form = block.verdicts[comm].form
    layer, constants = map(total_cost, emitted(lowered))
    name = comm if form == comm else f"{comm} ({form})"
    return Row(ep_size, quantisation, name, layer, constants, block.costs[0], operator)


def measured() -> Iterator[Row]:
    """Every implementation and weight format, at every EP size; and those that unpermute with the other operator, at one."""
    for ep_size in EP_SIZES:
        for quantisation in EXPERT_FORMATS:
            for comm in IMPLEMENTATIONS:
                if (comm, quantisation) not in NO_SUCH:
                    yield measure(comm, ep_size, quantisation)
    for quantisation in EXPERT_FORMATS:
        for comm in ("allgather", "alltoall"):
            yield measure(comm, EP_SIZES[0], quantisation, FINALIZE_ROUTING)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [HEAD, tuple("--:" if name not in HEAD[1:3] else "---" for name in HEAD), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(rows: list[Row], old: str) -> str:
    """docs/costs.md with a new table."""
    before, _, rest = old.partition("| EP |")
    after = rest.split("\n\n", 1)[1] if "\n\n" in rest else ""
    return before + table(rows) + ("\n" + after if after else "")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="renew the table of docs/costs.md")
    given = parser.parse_args(arguments)
    rows = list(measured())
    print(table(rows), end="")
    if given.write:
        PAGE.write_text(page(rows, PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
