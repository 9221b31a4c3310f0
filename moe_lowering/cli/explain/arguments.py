"""Parser of ``moe-lowering explain``: makes an ``ExplainRequest``, and refuses what can be refused without torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from moe_lowering.cli.explain.request import IMPLEMENTATIONS, ExplainRequest
from moe_lowering.cli.files import add_html, check_file
from moe_lowering.cli.option_values import SocAction, parse_digits, parse_positive, parse_several, parse_word
from moe_lowering.cli.options import DTYPES, add_machine, add_policy, add_prices, add_provider, read_measured
from moe_lowering.cli.parser import add_parser
from moe_lowering.cli.usage import UsageError
from moe_lowering.model_configs.check import LARGEST, check_model
from moe_lowering.model_configs.errors import ModelError, write_value
from moe_lowering.model_configs.presets import PRESETS
from moe_lowering.vocabulary import COMMS, EXPERT_FORMATS, FUSED_MODES

SIZE_OPTIONS = ("--hidden", "--intermediate", "--experts", "--topk")
COLOURS = ("auto", "always", "never")

TOKENS = 32

DESCRIPTION = """\
Which implementations are legal for a model's MoE blocks in a deployment, what would be chosen, and why. It reads the
model's config alone: no weights are built, and no NPU is needed."""

EXAMPLES = """\
examples:
  moe-lowering explain deepseek_v3 --ep 64 --tokens 128
      the verdict of every implementation, the choice, and every rule that is broken
  moe-lowering explain --hidden 7168 --intermediate 2048 --experts 256 --topk 8 --soc A2 --ep 64
      the same for a block without a model
  moe-lowering explain ./config.json --ep 16 --why fused_mc2
      every rule for fused_mc2 with its value and source, whether it holds or not
  moe-lowering explain deepseek_v3 --ep 64 --tokens 600 --comm mc2
      is this one legal, and if not, why; the same as MoeLowering(comm="mc2")
  moe-lowering explain qwen3_moe --ep 16 --no-capture
      for graphs that are not captured, where AllToAll may send exactly the rows that there are
  moe-lowering explain qwen3_moe --ep 16 --sweep tokens=1..8192
      where the choice changes with the number of tokens, and which limit sets each boundary
  moe-lowering explain qwen3_235b --soc A2,A3 --ep 16,32,64 --quant none,w8a8 --tokens 1..4096
      one table: the choice in every deployment by ranges of T, what it costs and needs, and why not the others

MODEL is `moe` (this package's own MoE module), a published model, a transformers model type, which means its default config, or
a config.json. Published models:
PRESETS.

SoCs: A2 (910B), A3 (910C), A5 (950), 310P.

exit code: 0 an implementation is chosen; 1 none is legal, or the one of --comm is not; 2 wrong usage
""".replace("PRESETS", ", ".join(PRESETS))


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
    """Refuse what is certain to be wrong: a model, sizes that are missing, options that do not go together, files.

    Raises:
        UsageError: see above.
    """
    if request.html is not None:
        check_file("html", request.html)
    for soc in request.socs:
        read_measured(request.measured, soc)
    for each in request.each():
        _check_deployment(each)
    if request.model is None:
        sizes = dict(
            zip(SIZE_OPTIONS, (request.hidden, request.intermediate, request.experts, request.topk), strict=True)
        )
        if None in sizes.values():
            raise missing_sizes(None, [option for option, size in sizes.items() if size is None])
        return
    try:
        check_model(request.model, needs_type=False, needs_experts=None in (request.experts, request.topk))
    except ModelError as error:
        raise UsageError(f"argument MODEL: {error}") from error


def missing_sizes(model: str | None, options: Sequence[str]) -> UsageError:
    """The error about sizes that neither the model nor an option says."""
    what = "no model is given" if model is None else f"the config of {model} does not say all sizes"
    return UsageError(
        f"argument MODEL: {what}: {', '.join(options)} missing; accepted: a model with MoE layers, or all of "
        f"{' '.join(SIZE_OPTIONS)}"
    )


def _check_deployment(request: ExplainRequest) -> None:
    """What one option of a deployment says of another."""
    if request.ep % request.tp:
        raise UsageError(f"argument --tp: is {request.tp}; accepted: a divisor of --ep, {request.ep}")
    if not request.unequal_tokens:
        return
    if not request.max_tokens:
        raise UsageError("argument --max-tokens: is not given, and --unequal-tokens needs it; accepted: 1 or more")
    if not 1 <= (request.tokens or 1) <= request.max_tokens:
        raise UsageError(f"argument --tokens: is {request.tokens}; accepted: 1 to --max-tokens, {request.max_tokens}")
    if request.sweep and request.sweep[0] < 1:
        raise UsageError("argument --sweep: starts at 0; accepted with --unequal-tokens: a bound of 1 or more")


def _add_block(add: Any) -> None:
    add(
        "model",
        metavar="MODEL",
        nargs="?",
        help="moe, a published model, a transformers model type, or a path to a config.json",
    )
    add("--hidden", type=parse_positive, metavar="H", help="width of a token")
    add("--intermediate", type=parse_positive, metavar="I", help="width of an expert's hidden layer")
    add("--experts", type=parse_positive, metavar="E", help="routed experts on all ranks")
    add("--topk", type=parse_positive, metavar="K", help="experts of one token")
    add("--dtype", choices=DTYPES, help="of weights and activations (default the config's, else bfloat16)")
    add(
        "--quant",
        dest="quants",
        type=parse_several(parse_word(tuple(EXPERT_FORMATS))),
        default=("none",),
        metavar="FORMAT,...",
        help=f"quantisation of the experts, of {', '.join(EXPERT_FORMATS)} (default none)",
    )
    add(
        "--fused-mode",
        type=int,
        choices=FUSED_MODES,
        default=1,
        help="fused operators: 0 none, 1 dispatch_ffn_combine, mega_moe; 2 dispatch_gmm_combine_decode (default 1)",
    )


def _add_deployment(add: Any) -> None:
    add(
        "--soc",
        dest="socs",
        action=SocAction,
        several=True,
        default=("A3",),
        metavar="SOC,...",
        help="Ascend SoC (default A3)",
    )
    add(
        "--ep",
        dest="eps",
        type=parse_several(parse_positive),
        default=(1,),
        metavar="N,...",
        help="ranks that share the experts (default 1)",
    )
    add("--tp", type=parse_positive, default=1, metavar="N", help="ranks that hold the same tokens (default 1)")
    add(
        "--tokens",
        dest="counts",
        type=parse_several(_token_range),
        default=(),
        metavar="T,LOW..HIGH,...",
        help=f"tokens of one rank, or ranges of them (default {TOKENS})",
    )
    add_machine(add, "max_tokens")
    add(
        "--capture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the deployment captures its graphs, so that nothing may need a size on the host (default yes); nothing "
        "is run, as lower --capture does",
    )
    add_provider(add)
    add_prices(add)


def _add_answer(add: Any) -> None:
    add(
        "--comm",
        type=str.lower,
        choices=COMMS,
        default="auto",
        help="the only implementation to choose (default auto: any legal one)",
    )
    add_policy(add)
    add("--why", choices=IMPLEMENTATIONS, metavar="IMPLEMENTATION", help="every rule for one implementation")
    add("--sweep", type=_sweep, metavar="tokens=LOW..HIGH", help="where the choice changes, and what sets the boundary")
    add("--json", action="store_true", help="print one JSON object instead of the report")
    add_html(add)
    add("--color", choices=COLOURS, default="auto", help="colour the report (default auto: on a terminal)")


def _token_range(text: str) -> tuple[int, int]:
    low, dots, high = text.partition("..")
    first, last = parse_digits(low), parse_digits(high if dots else low)
    if first is None or last is None or not first <= last <= LARGEST:
        raise argparse.ArgumentTypeError(
            f"is {write_value(text)}; accepted: T, or LOW..HIGH with 0 <= LOW <= HIGH <= {LARGEST}"
        )
    return first, last


def _sweep(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"tokens=(\d+)\.\.(\d+)", text, re.ASCII)
    low, high = (parse_digits(number) for number in match.groups()) if match else (None, None)
    if low is None or high is None or not low <= high <= LARGEST:
        raise argparse.ArgumentTypeError(
            f"is {write_value(text)}; accepted: tokens=LOW..HIGH with 0 <= LOW <= HIGH <= {LARGEST}"
        )
    return low, high
