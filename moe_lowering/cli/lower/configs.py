"""Configs of the models that ``lower`` takes, in full or in a small size. No model is built, and no torch is imported."""

from __future__ import annotations

from typing import Any

from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.cli.usage import UsageError
from moe_lowering.model_configs.check import ACCEPTED, NAMES, OWN, OWN_SIZES, first_of, path_of, read_config
from moe_lowering.model_configs.errors import ModelError
from moe_lowering.model_configs.read import read_text_config
from moe_lowering.model_configs.small import Dimensions, shrink, with_layers
from moe_lowering.number_words import count_of

# Dimensions of a small instance, for every implementation the same. They are the smallest that MC2 takes (hidden 1024)
# with experts for 8 ranks of two or more; heads are few and the vocabulary small because they do not matter here.
SMALL = Dimensions(
    hidden=1024,
    intermediate=512,
    experts=16,
    top_k=4,
    heads=8,
    head_dim=128,
    rank=64,
    vocabulary=256,
    groups=4,  # of models whose default is grouped: 8 experts remain, of which 4
    topk_groups=2,
)
EXPERT_COUNTS = NAMES["experts"]
SMALL_LAYERS = 2
FULL_OWN_LAYERS = 4  # of OWN with its full sizes


def config_of(request: LowerRequest) -> Any:
    """The config of a type or of a file, with the command's number of layers; of a type, small unless ``--fake``.

    Raises:
        UsageError: one line with what is wrong with the model.
    """
    try:
        config = read_text_config(request.model)
    except ModelError as error:
        raise UsageError(f"argument MODEL: {error}") from error
    try:
        if path_of(request.model) is None and not request.fake:
            return shrink(config, SMALL, request.layers or SMALL_LAYERS)
        return config if request.layers is None else with_layers(config, request.layers)
    except ModelError as error:
        raise UsageError(f"argument MODEL: {error}") from error


def check_ranks(request: LowerRequest) -> None:
    """Refuse ranks that cannot share the experts equally, where their number is known without transformers.

    Raises:
        UsageError: one line with the numbers.
    """
    path = path_of(request.model) if request.model != OWN else None
    name, experts = request.model, None
    if request.model == OWN:
        experts = OWN_SIZES["experts"] if request.fake else SMALL.experts
    elif path is not None:
        values = read_config(path)
        experts = first_of({**values, **(values.get("text_config") or {})}, EXPERT_COUNTS)
        name = str(values.get("model_type"))
    elif not request.fake:
        experts = SMALL.experts
    if isinstance(experts, int) and experts > 1:
        refuse_uneven(request, name, experts)


def is_small(request: LowerRequest) -> bool:
    """Whether a small instance with random weights is built: of a name, without ``--fake``."""
    return not request.fake and (request.model == OWN or path_of(request.model) is None)


def refuse_uneven(request: LowerRequest, name: str, experts: int) -> None:
    """Refuse a number of ranks that does not divide the experts."""
    if experts % request.ep:
        what = f"the small {name} that runs without --fake" if is_small(request) else name
        raise UsageError(
            f"argument --ep: is {request.ep}, and {what} has {count_of(experts, 'expert')}; accepted: a divisor of that"
        )


def num_experts_of(config: Any) -> int:
    """Number of routed experts."""
    for part in (config, getattr(config, "ffn_config", None)):
        for name in EXPERT_COUNTS:
            if isinstance(value := getattr(part, name, None), int) and value > 1:
                return value
    raise UsageError(f"argument MODEL: {config.model_type} has no MoE layers; accepted: {ACCEPTED}")
