"""Parser of ``moe-lowering simulate``: makes a ``SimulateRequest``."""

from __future__ import annotations

from typing import Any

from moe_lowering.cli.option_values import SocAction, parse_positive
from moe_lowering.cli.parser import add_parser
from moe_lowering.cli.simulate.request import SimulateRequest
from moe_lowering.cli.usage import UsageError

DESCRIPTION = """\
Run a program on the simulator: where it, or a Python process that it starts, imports torch_npu, it finds an NPU of the SoC,
in host memory. The program itself is not changed. One that relies on torch loading torch_npu by itself (its autoload) needs
TORCH_DEVICE_BACKEND_AUTOLOAD=1 before the command: without CANN this package turns that off, and torch then knows no device
npu until `import torch_npu`."""

EXAMPLES = """\
examples:
  moe-lowering simulate -- python train.py
  moe-lowering simulate --soc A2 -- vllm serve ./model --enforce-eager
  TORCH_DEVICE_BACKEND_AUTOLOAD=1 moe-lowering simulate -- python examples/serve.py npu
      a program that says "npu" and imports torch alone

The program takes the place of this process: its output and its exit code are its own.
exit code: the program's; 2 wrong usage, or the simulator cannot be used here
"""


def add_command(commands: Any) -> None:
    """Add ``simulate`` to the commands of a parser."""
    parser = add_parser(
        commands,
        "simulate",
        SimulateRequest,
        help="run a program, and what it starts, on a simulated NPU",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    parser.add_argument("--soc", action=SocAction, default="A3", help="what the program finds (default A3)")
    parser.add_argument(
        "--devices", type=parse_positive, default=1, metavar="N", help="how many, one for each process (default 1)"
    )
    parser.add_argument("command", nargs="*", metavar="-- PROGRAM ARGUMENT", help="the program and its arguments")


def check(request: SimulateRequest) -> None:
    """Refuse a command without a program.

    Raises:
        UsageError: see above.
    """
    if not request.command:
        raise UsageError("argument PROGRAM: is missing; accepted: a program after --, e.g. -- python serve.py")
