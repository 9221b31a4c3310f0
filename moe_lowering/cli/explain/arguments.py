"""Parser of ``moe-lowering explain``: makes an ``ExplainRequest``, and refuses what can be refused without torch."""

from __future__ import annotations

import argparse
import re
from typing import Any

from moe_lowering.cli.explain.request import IMPLEMENTATIONS, ExplainRequest
from moe_lowering.cli.options import (
    DTYPES,
    HCCL_BUFFER_MB,
    WEIGHT_FORMAT,
    add_parser,
    add_prices,
    add_provider,
    parse_digits,
    parse_positive,
)
from moe_lowering.cli.usage import UsageError
from moe_lowering.model_configs.check import LARGEST, check_model
from moe_lowering.model_configs.errors import ModelError, write_value
from moe_lowering.vocabulary import COMMS, EXPERT_FORMATS, FUSED_MODES, POLICIES, SOCS, WEIGHT_FORMATS

COLOURS = ("auto", "always", "never")

TOKENS = 32

DESCRIPTION = """\
Which implementations are legal for a model's MoE blocks in a deployment, what would be chosen, and why. It reads the
model's config alone: no weights are built, and no NPU is needed."""

EXAMPLES = """\
examples:
  moe-lowering explain deepseek_v3 --ep 16 --tokens 128
      the verdict of every implementation, the choice, and every rule that is broken
  moe-lowering explain --hidden 7168 --intermediate 2048 --experts 256 --topk 8 --soc A2 --ep 64
      the same for a block without a model
  moe-lowering explain ./config.json --ep 16 --why fused_mc2
      every rule for fused_mc2 with its value and source, whether it holds or not
  moe-lowering explain deepseek_v3 --ep 16 --tokens 600 --comm mc2
      is this one legal, and if not, why; the same as MoeLowering(comm="mc2")
  moe-lowering explain qwen3_moe --ep 16 --no-capture
      for graphs that are not captured, where AllToAll may send exactly the rows that there are
  moe-lowering explain qwen3_moe --ep 16 --sweep tokens=1..8192
      where the choice changes with the number of tokens, and which limit sets each boundary

exit code: 0 an implementation is chosen; 1 none is legal, or the one of --comm is not; 2 wrong usage
"""


def add_command(commands: Any) -> None:
    """Add ``explain`` to the commands of a parser."""
    parser = add_parser(
        commands,
        "explain",
        ExplainRequest,
        help="say which implementations are legal for a model's MoE blocks, and why",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    _add_block(parser.add_argument_group("the block (each overrides the model's value)").add_argument)
    _add_deployment(parser.add_argument_group("the deployment").add_argument)
    _add_answer(parser.add_argument_group("the answer").add_argument)


def check(request: ExplainRequest) -> None:
    """Refuse a model that is certain to be wrong.

    Raises:
        UsageError: see above.
    """
    if request.model is None:
        return
    try:
        check_model(request.model, needs_type=False)
    except ModelError as error:
        raise UsageError(f"argument MODEL: {error}") from error


def _add_block(add: Any) -> None:
    add("model", metavar="MODEL", nargs="?", help="moe, a transformers model type, or a path to a config.json")
    add("--hidden", type=parse_positive, metavar="H", help="width of a token")
    add("--intermediate", type=parse_positive, metavar="I", help="width of an expert's hidden layer")
    add("--experts", type=parse_positive, metavar="E", help="routed experts on all ranks")
    add("--topk", type=parse_positive, metavar="K", help="experts of one token")
    add("--dtype", choices=DTYPES, help="of weights and activations (default the config's, else bfloat16)")
    add("--quant", choices=EXPERT_FORMATS, default="none", help="quantisation of the experts (default none)")
    add(
        "--fused-mode",
        type=int,
        choices=FUSED_MODES,
        default=1,
        help="fused operators: 0 none, 1 dispatch_ffn_combine, mega_moe; 2 dispatch_gmm_combine_decode (default 1)",
    )


def _add_deployment(add: Any) -> None:
    add("--soc", choices=SOCS, default="A3", help="Ascend SoC (default A3)")
    add("--ep", type=parse_positive, default=1, metavar="N", help="ranks that share the experts (default 1)")
    add("--tp", type=parse_positive, default=1, metavar="N", help="ranks that hold the same tokens (default 1)")
    add("--tokens", type=_tokens, metavar="T", help=f"tokens of one rank (default {TOKENS})")
    add(
        "--max-tokens",
        type=parse_positive,
        default=0,
        metavar="T",
        help="bound that the deployment declares (default none)",
    )
    add("--unequal-tokens", action="store_true", help="ranks may have different T, up to --max-tokens: T is not read")
    add("--buffer-mb", type=parse_positive, metavar="MB", help=f"HCCL_BUFFSIZE (default {HCCL_BUFFER_MB})")
    add("--weight-format", choices=WEIGHT_FORMATS, help=f"of the experts on the device (default {WEIGHT_FORMAT})")
    add("--cann", type=_version, metavar="V", help="CANN version (default unknown: all rules apply)")
    add("--hierarchy", action="store_true", help="MC2 in two levels, within and between nodes")
    add(
        "--capture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the graph is captured, so that nothing may need a size on the host (default yes)",
    )
    add_provider(add)
    add_prices(add)


def _add_answer(add: Any) -> None:
    add("--comm", choices=COMMS, default="auto", help="the only implementation to choose (default auto: any legal one)")
    add(
        "--policy",
        choices=POLICIES,
        default="auto",
        help="how to choose among what is legal (default auto: by cost; fixed: with --comm, what that asks for)",
    )
    add("--why", choices=IMPLEMENTATIONS, metavar="IMPLEMENTATION", help="every rule for one implementation")
    add("--sweep", type=_sweep, metavar="tokens=LOW..HIGH", help="where the choice changes, and what sets the boundary")
    add("--json", action="store_true", help="print one JSON object instead of the report")
    add("--color", choices=COLOURS, default="auto", help="colour the report (default auto: on a terminal)")


def _tokens(text: str) -> int:
    value = parse_digits(text)
    if value is None or value > LARGEST:
        raise argparse.ArgumentTypeError(f"is {write_value(text)}; accepted: an integer from 0 to {LARGEST}")
    return value


def _version(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\w+)*", text):
        raise argparse.ArgumentTypeError(f"is {text!r}; accepted: a version such as 8.5.0 or 8.2.RC1")
    return text


def _sweep(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"tokens=(\d+)\.\.(\d+)", text, re.ASCII)
    low, high = (parse_digits(number) for number in match.groups()) if match else (None, None)
    if low is None or high is None or not low <= high <= LARGEST:
        raise argparse.ArgumentTypeError(
            f"is {write_value(text)}; accepted: tokens=LOW..HIGH with 0 <= LOW <= HIGH <= {LARGEST}"
        )
    return low, high
