"""Parser of ``moe-lowering lower``: makes a ``LowerRequest``, and refuses what can be refused without torch."""

from __future__ import annotations

import argparse
from typing import Any

from moe_lowering.cli.assumed_machine import provider_packages
from moe_lowering.cli.files import add_html, check_file
from moe_lowering.cli.lower.configs import check_ranks
from moe_lowering.cli.lower.request import REPLAYS, LowerRequest
from moe_lowering.cli.option_values import SocAction, parse_positive
from moe_lowering.cli.options import (
    DTYPES,
    add_machine,
    add_policy,
    add_prices,
    add_provider,
    check_policy,
    read_measured,
)
from moe_lowering.cli.parser import add_parser
from moe_lowering.cli.usage import UsageError
from moe_lowering.model_configs.check import check_model
from moe_lowering.model_configs.errors import ModelError
from moe_lowering.number_words import count_of
from moe_lowering.vocabulary import AUTO, COMMS, EXPERT_FORMATS, FUSED_MODES, ONE_OPERATOR

SOC_HELP = "Ascend SoC: A2 (910B), A3 (910C), A5 (950), 310P (default A3)"
MOST_REPLAYS = 100_000  # of each captured graph
MOST_LAYERS = 1000
RUN_TOKENS = 2**14  # of one rank, where the model is run: attention on CPU takes memory by their square

DESCRIPTION = "Lower a model's MoE layers, and compare with the model's own output."

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
      what happens without the library that brings the fused operator: the next best is taken, and the report says why
  moe-lowering lower qwen3_moe --ep 2 --comm mc2 --capture --replays 20
      the same as an NPU graph on a simulated device: captured once, and compared at every replay
  moe-lowering lower deepseek_v3 --fake --ep 64 --tokens 64
      lower DeepSeek-V3 at its published size for 64 ranks, equal layers once; no weights are allocated, nothing is run
  moe-lowering lower deepseek_v3 --fake --ep 64 --tokens 64 --whole
      the same from the graph of the whole model, which takes ten times as long
  moe-lowering lower ./config.json --fake --comm fused_mc2 --json
      is FusedMC2 legal for the model of this config.json, and if not, why; as JSON

MODEL is `moe` (this package's own MoE module), a published model (qwen3_235b, kimi_k2, glm_4_5, ...), a transformers model
type with MoE layers (mixtral, qwen3_moe, deepseek_v3, olmoe, gpt_oss, ...), or a config.json. For a name, without --fake, a small
instance with random weights is built: hidden 1024, intermediate 512, 16 experts, 2 layers.

The report lists, for each block, the implementation, its sizes and what each other implementation breaks, with sources.
Where the implementation of --comm is refused by the options alone, nothing is built: the report says why and ends there.

exit code: 0 all blocks lowered and the outputs agree; 1 a block was left unlowered or the outputs differ; 2 wrong usage
"""


def add_command(commands: Any) -> None:
    """Add ``lower`` to the commands of a parser."""
    parser = add_parser(
        commands,
        "lower",
        LowerRequest,
        help="lower a model's MoE layers, and compare with the model's own output",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    _add_options(parser)


def check(request: LowerRequest) -> None:
    """Refuse what is certain to be wrong: options that do not go together, the model, ranks that cannot share its experts.

    Raises:
        UsageError: see above.
    """
    _check_options(request)
    try:
        check_model(request.model, needs_type=True)
    except ModelError as error:
        raise UsageError(f"argument MODEL: {error}") from error
    check_ranks(request)


def _check_options(request: LowerRequest) -> None:
    """What one option says of another."""
    provider_packages(request.provider)
    check_policy(request.comm, request.policy)
    if request.declared and request.declared < request.most_run:
        raise UsageError(
            f"argument --max-tokens: is {request.declared}, and a rank runs {count_of(request.most_run, 'token')}; accepted: "
            f"{request.most_run} or more"
        )
    if request.html is not None:
        check_file("html", request.html)
    read_measured(request.measured, request.soc)
    if not request.fake and request.tokens > RUN_TOKENS:
        raise UsageError(
            f"argument --tokens: is {request.tokens}; accepted: 1 to {RUN_TOKENS}, as the model is run on CPU, or --fake"
        )
    for name, value, most in (("layers", request.layers, MOST_LAYERS), ("replays", request.replays, MOST_REPLAYS)):
        if value is not None and value > most:
            raise UsageError(f"argument --{name}: is {value}; accepted: 1 to {most}")
    if request.ep % request.tp or request.tp > request.ep:
        raise UsageError(f"argument --tp: is {request.tp} with --ep {request.ep}; accepted: a divisor of --ep")
    if request.quantised and request.dtype == "float32":
        raise UsageError(f"argument --quant: is {request.quant} with --dtype float32; accepted: with a 16-bit dtype")
    if request.fused_mode != 1 and request.comm not in (*ONE_OPERATOR, AUTO):
        raise UsageError(
            f"argument --fused-mode: is {request.fused_mode} with --comm {request.comm}; accepted: with "
            f"{', '.join(ONE_OPERATOR)} or auto"
        )
    if request.whole and not request.fake:
        raise UsageError(
            "argument --whole: is given without --fake; accepted: with it, as a model that runs is compiled whole"
        )
    if request.capture and request.fake:
        raise UsageError(
            "argument --capture: is given with --fake; accepted: without, as a graph is captured by running it"
        )
    if request.replays is not None and not request.capture:
        raise UsageError(f"argument --replays: is {request.replays}, and needs --capture; accepted: both, or neither")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="moe, a published model, a transformers model type, or a path to a config.json")
    add(
        "--comm",
        type=str.lower,
        choices=COMMS,
        default="auto",
        help="implementation to use (auto: the cheapest legal one)",
    )
    add("--ep", type=parse_positive, default=1, metavar="N", help="ranks that share the experts (default 1)")
    add(
        "--tp", type=parse_positive, default=1, metavar="N", help="ranks of these that hold the same tokens (default 1)"
    )
    add("--quant", type=str.lower, choices=EXPERT_FORMATS, default="none", help="quantise the experts (default none)")
    add("--fused-mode", type=int, choices=FUSED_MODES, default=1,
        help="fused operators: 1 dispatch_ffn_combine or mega_moe, 2 dispatch_gmm_combine_decode (default 1)")  # fmt: skip
    add_machine(add, "declared")
    add_policy(add)
    add("--overlap", action="store_true", help="shared experts on a side stream, where the graph has stream scopes")
    add_provider(add)
    add_prices(add)
    add(
        "--soc",
        action=SocAction,
        default="A3",
        metavar="SOC",
        help=SOC_HELP,
    )
    add("--tokens", type=parse_positive, default=32, metavar="T", help="tokens of one rank (default 32)")
    add(
        "--layers",
        type=parse_positive,
        metavar="L",
        help="decoder layers (default 2; with --fake or a file, the config's)",
    )
    add("--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations (default bfloat16)")
    add("--dynamic", action="store_true", help="compile with dynamic shapes and run several token counts")
    add("--fake", action="store_true", help="full size, with fake tensors: lower only, run nothing")
    add("--whole", action="store_true", help="with --fake: trace the whole model, not each kind of layer once")
    add(
        "--capture",
        action="store_true",
        help="run the lowered model as an NPU graph on a simulated device, and compare every replay (another than explain's "
        "--capture, which says how a deployment runs; layers are lowered for captured graphs with and without it)",
    )
    add(
        "--replays",
        type=parse_positive,
        metavar="N",
        help=f"calls of each captured graph, with new inputs and routings (default {REPLAYS})",
    )
    add("--verbose", action="store_true", help="print the traceback of an error, too")
    add_html(add)
    add("--json", action="store_true", help="print one JSON object instead of the report")
