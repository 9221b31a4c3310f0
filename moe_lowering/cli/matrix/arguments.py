"""Parser of ``moe-lowering matrix``: makes a ``MatrixRequest``, and refuses what can be refused without torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from moe_lowering.cli.matrix.request import FORMS_OF, MatrixRequest
from moe_lowering.cli.option_values import split_list
from moe_lowering.cli.options import add_unpermute_operator
from moe_lowering.cli.parser import add_parser
from moe_lowering.matrix.forms import EP_SIZES, TP_SIZES
from moe_lowering.vocabulary import EXPERT_FORMATS

DESCRIPTION = """\
Lower one small MoE block to every implementation, with every weight format, EP and TP size, run it on real ranks
(processes, gloo, the simulator's kernels), and compare with a dense float64 reference. What must be refused must be
refused with its code."""

EXAMPLES = """\
examples:
  moe-lowering matrix
      the whole table: a few minutes on two cores
  moe-lowering matrix --ep 2 --comm mc2,fused_mc2 --quant w8a8
      some of its cells
  moe-lowering matrix --json
      every cell by itself: signal-to-noise ratio, codes, problems

A number in the table is the worst token's signal-to-noise ratio in dB, over ranks and scenarios (token counts, routings,
masks), at EP 2, TP 1 also over layouts of the weights (one tensor or a list, FRACTAL_NZ or ND); a letter stands for the
code of a cell that is refused in all of them.

exit code: 0 every cell is what it must be; 1 a cell is not; 2 wrong usage
"""


def add_command(commands: Any) -> None:
    """Add ``matrix`` to the commands of a parser."""
    parser = add_parser(
        commands,
        "matrix",
        MatrixRequest,
        help="run every implementation with every weight format on real ranks, and print the table",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    for option, values, metavar, what in (
        ("--ep", EP_SIZES, "N,...", "EP sizes"),
        ("--tp", TP_SIZES, "N,...", "TP sizes"),
        ("--quant", tuple(EXPERT_FORMATS), "FORMAT,...", "weight formats"),
        ("--comm", tuple(FORMS_OF), "NAME,...", "implementations"),
    ):
        accepted = f"{what}, of {', '.join(map(str, values))} (default all)"
        parser.add_argument(option, type=_list_parser(values), default=values, metavar=metavar, help=accepted)
    add_unpermute_operator(parser.add_argument)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def _list_parser(accepted: Sequence[Any]) -> Callable[[str], tuple[Any, ...]]:
    """Parser of a list with commas, in the order of ``accepted``."""

    def parse(text: str) -> tuple[Any, ...]:
        by_name = {str(value): value for value in accepted}
        names = [name.lower() for name in split_list(text)]
        if not all(name in by_name for name in names):
            raise argparse.ArgumentTypeError(f"is {text!r}; accepted: one or more of {','.join(by_name)}, with commas")
        return tuple(value for name, value in by_name.items() if name in names)

    return parse
