"""The command line of ``moe-lowering``: parsing and what can be checked without torch."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import TYPE_CHECKING, Any, NoReturn

from moe_lowering.cli.model_check import LARGEST, check_model
from moe_lowering.cli.model_error import ModelError, shown
from moe_lowering.providers import declarable
from moe_lowering.vocabulary import AUTO, COMMS, EXPERT_FORMATS, FUSED_MODES, ONE_OPERATOR, PROVIDERS, SOCS

if TYPE_CHECKING:
    from moe_lowering.cli.explain_arguments import ExplainRequest
    from moe_lowering.cli.matrix import MatrixRequest

DTYPES = ("float32", "float16", "bfloat16")
REPLAYS, MOST_REPLAYS = 8, 100_000  # of each captured graph
MOST_LAYERS = 1000
RUN_TOKENS = 2**14  # of one rank, where the model is run: attention on CPU takes memory by their square

# What `lower` and `explain` assume of a machine that is not described.
ASSUMED_PROVIDERS = (("vllm_ascend", "0.23.0"),)
HCCL_BUFFER_MB = 1024  # enough for MC2 with the published sizes at 64 tokens per rank; CANN's own default is 200
WEIGHT_FORMAT = "nz"

DESCRIPTION = "Lower the mixture-of-experts layers of a model to Ascend NPU operators, on a machine without an NPU."

EXAMPLES = """\
examples:
  moe-lowering lower qwen3_moe
      lower a small random Qwen3-MoE for an A3, run it on CPU, and compare with transformers' own output
  moe-lowering lower qwen3_moe --ep 2 --comm mc2
      the same on two ranks (processes) that hold half of the experts each, with MC2
  moe-lowering lower qwen3_moe --ep 4 --tp 2 --comm alltoall --quant w8a8
      four ranks of which pairs hold the same tokens (TP), equal-split AllToAll, experts quantised to int8
  moe-lowering lower qwen3_moe --ep 4 --comm fused_mc2 --quant w8a8 --fused-mode 2
      the second fused operator of vllm-ascend, dispatch_gmm_combine_decode
  moe-lowering lower qwen3_moe --ep 4 --comm fused_mc2 --provider none
      what happens without the library that brings the fused operator: refused, with the rule that says so
  moe-lowering lower qwen3_moe --ep 2 --comm mc2 --capture --replays 20
      the same as an NPU graph on a simulated device: captured once, and compared at every replay
  moe-lowering lower deepseek_v3 --fake --ep 64 --tokens 64
      lower DeepSeek-V3 at its published size for 64 ranks; no weights are allocated, nothing is run
  moe-lowering lower ./config.json --fake --comm fused_mc2 --json
      is FusedMC2 legal for the model of this config.json, and if not, why; as JSON

MODEL is `moe` (this package's own MoE module), a transformers model type with MoE layers (mixtral, qwen3_moe,
deepseek_v3, olmoe, gpt_oss, glm4_moe, ...), or a config.json. For a type, without --fake, a small instance with random
weights is built: hidden 1024, intermediate 512, 16 experts, 2 layers.

The report lists, for each block, the implementation, its sizes and what each other implementation breaks, with sources.
Where the implementation of --comm is refused by the options alone, nothing is built: the report says why and ends there.

exit code: 0 all blocks lowered and the outputs agree; 1 a block was left unlowered or the outputs differ; 2 wrong usage
"""


class UsageError(Exception):
    """The command cannot be carried out as it was given: one line that names argument, value and what is accepted."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One ``lower`` command. ``layers`` is None when not given; ``tokens`` are those of one rank."""

    model: str
    comm: str = "auto"
    ep: int = 1
    soc: str = "A3"
    tp: int = 1
    quant: str = "none"
    fused_mode: int = 1
    provider: list[tuple[str, str]] | None = None
    tokens: int = 32
    layers: int | None = None
    dtype: str = "bfloat16"
    dynamic: bool = False
    fake: bool = False
    capture: bool = False
    replays: int | None = None
    json: bool = False

    @property
    def batch(self) -> int:
        """Sequences per rank: two when the tokens can be halved."""
        return 2 if self.tokens % 2 == 0 and self.tokens > 2 else 1

    @property
    def lengths(self) -> list[int]:
        """Sequence lengths to run, the asked one first; with ``dynamic`` a longer and a shorter one too."""
        length = self.tokens // self.batch
        if not self.dynamic:
            return [length]
        return [length, length + max(1, length // 2), *([length // 2] if length >= 4 else [])]

    @property
    def max_tokens(self) -> int:
        """The bound that the deployment declares: the most tokens that one rank runs."""
        return self.batch * max(self.lengths)

    @property
    def providers(self) -> tuple[tuple[str, str], ...]:
        """The libraries with fused operators that are taken to be installed."""
        return installed(self.provider)


class _Parser(argparse.ArgumentParser):
    """Errors as one line, with the same prefix for every command."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(arguments: list[str] | None) -> Request | ExplainRequest | MatrixRequest:
    """The command, or ``UsageError``; ``--help`` and ``--version`` print and exit."""
    from moe_lowering.cli import configs, explain_arguments, matrix  # they need this module

    parser = _Parser(
        prog="moe-lowering",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    lower = commands.add_parser(
        "lower",
        help="lower a model's MoE layers, and compare with the model's own output",
        description="Lower a model's MoE layers, and compare with the model's own output.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_options(lower)
    lower.set_defaults(request=Request)
    explain_arguments.add_command(commands)
    matrix.add_command(commands)
    given = vars(parser.parse_args(arguments))
    request = given.pop("request")(**given)
    if isinstance(request, Request):
        _check(request)
    if not isinstance(request, matrix.MatrixRequest) and request.model is not None:
        try:
            check_model(request.model, needs_type=isinstance(request, Request))
        except ModelError as error:
            raise UsageError(f"argument MODEL: {error}") from error
    if isinstance(request, Request):
        configs.check_ranks(request)
    return request


def _check(request: Request) -> None:
    """What one option says of another."""
    installed(request.provider)
    if not request.fake and request.tokens > RUN_TOKENS:
        raise UsageError(
            f"argument --tokens: is {request.tokens}; accepted: 1 to {RUN_TOKENS}, as the model is run on CPU, or --fake"
        )
    for name, value, most in (("layers", request.layers, MOST_LAYERS), ("replays", request.replays, MOST_REPLAYS)):
        if value is not None and value > most:
            raise UsageError(f"argument --{name}: is {value}; accepted: 1 to {most}")
    if request.ep % request.tp or request.tp > request.ep:
        raise UsageError(f"argument --tp: is {request.tp} with --ep {request.ep}; accepted: a divisor of --ep")
    if EXPERT_FORMATS[request.quant].quantised and request.dtype == "float32":
        raise UsageError(f"argument --quant: is {request.quant} with --dtype float32; accepted: with a 16-bit dtype")
    if request.fused_mode != 1 and request.comm not in (*ONE_OPERATOR, AUTO):
        raise UsageError(
            f"argument --fused-mode: is {request.fused_mode} with --comm {request.comm}; accepted: with "
            f"{', '.join(ONE_OPERATOR)} or auto"
        )
    if request.capture and request.fake:
        raise UsageError(
            "argument --capture: is given with --fake; accepted: without, as a graph is captured by running it"
        )
    if request.replays is not None and not request.capture:
        raise UsageError(f"argument --replays: is {request.replays} without --capture; accepted: with it")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="moe, a transformers model type, or a path to a config.json")
    add("--comm", choices=COMMS, default="auto", help="implementation to use (auto: the cheapest legal one)")
    add("--ep", type=positive, default=1, metavar="N", help="ranks that share the experts (default 1)")
    add("--tp", type=positive, default=1, metavar="N", help="ranks of these that hold the same tokens (default 1)")
    add("--quant", choices=EXPERT_FORMATS, default="none", help="quantise the experts (default none)")
    add("--fused-mode", type=int, choices=FUSED_MODES, default=1,
        help="fused operators: 1 dispatch_ffn_combine or mega_moe, 2 dispatch_gmm_combine_decode (default 1)")  # fmt: skip
    add_provider(add)
    add("--soc", choices=SOCS, default="A3", help="Ascend SoC (default A3)")
    add("--tokens", type=positive, default=32, metavar="T", help="tokens of one rank (default 32)")
    add("--layers", type=positive, metavar="L", help="decoder layers (default 2; with --fake or a file, the config's)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations (default bfloat16)")
    add("--dynamic", action="store_true", help="compile with dynamic shapes and run several token counts")
    add("--fake", action="store_true", help="full size, with fake tensors: lower only, run nothing")
    add("--capture", action="store_true",
        help="run the lowered model as an NPU graph on a simulated device, and compare every replay")  # fmt: skip
    add("--replays", type=positive, metavar="N",
        help=f"calls of each captured graph, with new inputs and routings (default {REPLAYS})")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead of the report")


def add_provider(add: Any) -> None:
    """Add ``--provider`` to a command."""
    assumed = "=".join(ASSUMED_PROVIDERS[0])
    add(
        "--provider",
        type=_provider,
        action="append",
        metavar="NAME=VERSION",
        help=f"installed library with fused operators, once for each, or none (default {assumed})",
    )


def installed(given: list[tuple[str, str]] | None) -> tuple[tuple[str, str], ...]:
    """The providers of a command; the assumed ones when none was named.

    Raises:
        UsageError: ``none`` beside others, or one that is named twice.
    """
    if given is None:  # of what is assumed, the version that is there
        return tuple((name, dict(declarable()).get(name, version)) for name, version in ASSUMED_PROVIDERS)
    names = [name for name, _ in given]
    if "none" in names and len(names) > 1:
        raise UsageError("argument --provider: is none and others; accepted: none alone, or each library once")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"argument --provider: {twice} is given twice; accepted: none alone, or each library once")
    return () if names == ["none"] else tuple(given)


def _provider(text: str) -> tuple[str, str]:
    name, _, version = text.partition("=")
    if text != "none" and not (name in PROVIDERS and re.fullmatch(r"\d+(\.\w+)*", version)):
        raise argparse.ArgumentTypeError(
            f"is {text!r}; accepted: NAME=VERSION, e.g. vllm_ascend=0.23.0, or none; names: {', '.join(PROVIDERS)}"
        )
    return name, version


def positive(text: str) -> int:
    """An option's value as an integer from 1 to ``LARGEST``."""
    value = whole(text)
    if value is None or not 1 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"is {shown(text)}; accepted: an integer from 1 to {LARGEST}")
    return value


def whole(text: str) -> int | None:
    """Digits as an integer; None for anything else, and for more digits than any option takes."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else None


class _Version(argparse.Action):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "nargs": 0, "default": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("moe-lowering")
        except PackageNotFoundError:
            found = "unknown (not installed)"
        print(f"moe-lowering {found}")
        parser.exit()
