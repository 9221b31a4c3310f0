"""The table of the commands: the parser of each, the request that it makes, and the function that carries it out.

A command is a folder here: ``request`` (a record), ``arguments`` (its parser, and what can be checked without torch), and
``command``, which is imported only when the request is good.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from moe_lowering.cli import collection
from moe_lowering.cli.completion import complete
from moe_lowering.cli.explain import arguments as explain_arguments
from moe_lowering.cli.explain.request import ExplainRequest
from moe_lowering.cli.lower import arguments as lower_arguments
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.cli.matrix import arguments as matrix_arguments
from moe_lowering.cli.matrix.request import MatrixRequest
from moe_lowering.cli.models import arguments as models_arguments
from moe_lowering.cli.models.request import ModelsRequest
from moe_lowering.cli.option_names import OTHER_NAMES
from moe_lowering.cli.parser import HelpFormatter, Parser
from moe_lowering.cli.simulate import arguments as simulate_arguments
from moe_lowering.cli.simulate.request import SimulateRequest
from moe_lowering.cli.usage import UsageError
from moe_lowering.lookup import did_you_mean
from moe_lowering.model_configs.errors import write_value

Request: TypeAlias = LowerRequest | ExplainRequest | MatrixRequest | ModelsRequest | SimulateRequest

DESCRIPTION = "Lower the mixture-of-experts layers of a model to Ascend NPU operators, on a machine without an NPU."

EXAMPLES = """\
examples:
  moe-lowering lower qwen3_moe --ep 2 --comm mc2
      lower a small random Qwen3-MoE on two ranks, run it on CPU, and compare it with transformers' own output
  moe-lowering lower deepseek_v3 --fake --ep 64 --tokens 64
      lower DeepSeek-V3 at its published size for 64 ranks; no weights are allocated, nothing is run
  moe-lowering explain deepseek_v3 --ep 64 --tokens 128
      which implementations are legal for DeepSeek-V3 on 64 ranks, which one is taken, and why
  moe-lowering matrix --ep 2 --comm mc2,fused_mc2 --quant w8a8
      run these implementations on two real ranks, and compare with a dense reference
  moe-lowering models --only qwen3_moe,deepseek_v3 --ways hook
      lower small models of two families of transformers, and compare each layer with the model's own
  moe-lowering simulate -- python serve.py
      run a program on a simulated NPU

moe-lowering COMMAND --help lists the options of a command, with more examples and its exit codes.
"""


class Report(Protocol):
    """What a command found."""

    def problems(self) -> list[str]:
        """Why the exit code is 1, a line each; empty when it is 0."""

    def to_text(self) -> str:
        """The report for a person."""

    def to_json(self) -> str:
        """One JSON object."""


@runtime_checkable
class PageReport(Report, Protocol):
    """What a command with ``--html`` found."""

    def to_html(self) -> str:
        """The page."""


def parse(arguments: list[str] | None) -> Request:
    """The command, or ``UsageError``; ``--help``, ``--version`` and no arguments at all print and exit."""
    parser = Parser(
        prog="moe-lowering",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    lower_arguments.add_command(commands)
    explain_arguments.add_command(commands)
    matrix_arguments.add_command(commands)
    models_arguments.add_command(commands)
    simulate_arguments.add_command(commands)
    complete(parser)
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        parser.exit()
    first, *_ = sys.argv[1:] if arguments is None else arguments
    if first.startswith("-") and first not in ("-h", "--help", "--version"):
        raise UsageError(
            f"argument {first}: stands before COMMAND; accepted: --help, --version, and options behind a command"
        )
    namespace, more = parser.parse_known_args(arguments)
    values = vars(namespace)
    called = values.pop("called")
    if more:
        raise UsageError(_unknown(called, more[0], commands.choices[called], values))
    request: Request = values.pop("request")(**values)
    if isinstance(request, LowerRequest):
        lower_arguments.check(request)
    elif isinstance(request, ExplainRequest):
        explain_arguments.check(request)
    elif isinstance(request, ModelsRequest):
        models_arguments.check(request)
    elif isinstance(request, SimulateRequest):
        simulate_arguments.check(request)
    return request


def _unknown(called: str, word: str, parser: argparse.ArgumentParser, values: dict[str, Any]) -> str:
    """What is said of a word that a command does not take."""
    if not word.startswith("-") and values.get("model"):
        return f"argument MODEL: is given twice, {values['model']} and {write_value(word)}; accepted: one"
    accepted = f"those of moe-lowering {called} --help"
    if called == "simulate":
        accepted += ", and the program with its own options after --"
    option, known = word.partition("=")[0], parser._option_string_actions
    if option in known:
        return f"argument {option}: stands behind --, where no options are read; accepted: options in front of it"
    meant = OTHER_NAMES.get(option.removeprefix("--").replace("-", "_"), "")
    hint = did_you_mean(option, known, cutoff=0.8) if option.startswith("--") else ""
    hint = f" (did you mean {meant}?)" if meant in known else hint
    return f"argument {option}: is no option of {called}{hint}; accepted: {accepted}"


def run(request: Request, progress: Callable[[str], None]) -> Report:
    """Carry out a command that makes a report; torch is imported here. ``simulate`` makes none: it does not come back."""
    if isinstance(request, SimulateRequest):
        from moe_lowering.cli.simulate.command import run_simulate

        run_simulate(request)
    progress("loading torch")
    if isinstance(request, LowerRequest):
        from moe_lowering.cli.lower.command import run_lower

        return run_lower(request, progress)
    if isinstance(request, MatrixRequest):
        from moe_lowering.cli.matrix.command import run_matrix

        return run_matrix(request, progress)
    if isinstance(request, ModelsRequest):
        from moe_lowering.cli.models.command import run_models

        return run_models(request, progress)
    with collection.paused():
        from moe_lowering.cli.explain.command import run_explain

    return run_explain(request, progress)


class _Version(argparse.Action):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "nargs": 0, "default": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            release = version("moe-lowering")
        except PackageNotFoundError:
            release = "unknown (not installed)"
        print(f"moe-lowering {release}")
        parser.exit()
