"""``check_config_values``: refuses the values of a config.json that no model takes: groups of experts, words, dtypes, flags.

It does so without importing transformers, which takes seconds and whose errors do not name the key. Names of activations, and
whether a type has experts at all, are read from the text of transformers' files; where they cannot be found, nothing is
refused. Sizes are checked in ``check``.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path
from typing import Any

from moe_lowering.model_configs.errors import ModelError, write_value

# For the routing in groups, the first name is the number of groups, the second how many of them a token may use.
GROUPS = ("n_group", "topk_group")
DTYPES = ("dtype", "torch_dtype")
KNOWN_DTYPES = ("auto", "float32", "float16", "bfloat16", "float64", "float", "half", "double")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
OBJECTS = ("rope_scaling", "rope_parameters", "quantization_config")
FLAGS = ("norm_topk_prob", "attention_bias", "tie_word_embeddings", "use_cache")
NUMBERS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "norm_eps",
    "rope_theta",
    "initializer_range",
    "attention_dropout",
    "routed_scaling_factor",
    "router_aux_loss_coef",
)


def check_config_values(values: dict[str, Any], where: str) -> None:
    """Refuse values that no model takes. None stands for a value that is not given.

    Args:
        values: the config of the part that makes text.
        where: " in <path>", for the message.

    Raises:
        ModelError: one line with the name, the value and what is accepted.
    """

    def refuse(name: str, accepted: str) -> None:
        raise ModelError(f"{name}{where} is {write_value(values[name])}; accepted: {accepted}")

    present = {name: value for name, value in values.items() if value is not None}
    for name in (name for name in OBJECTS if name in present):
        if not isinstance(present[name], dict):
            refuse(name, "an object")
    for name in (name for name in FLAGS if name in present):
        if not isinstance(present[name], bool):
            refuse(name, "true or false")
    for name in (name for name in NUMBERS if name in present):
        if (
            isinstance(present[name], bool)
            or not isinstance(present[name], (int, float))
            or not 0 <= present[name] < 1e300
        ):
            refuse(name, "a number of 0 or more")
    for name in (name for name in DTYPES if name in present):
        if not isinstance(present[name], str) or present[name].removeprefix("torch.") not in KNOWN_DTYPES:
            refuse(name, ", ".join(KNOWN_DTYPES))
    known = activations_of_transformers()
    for name in (name for name in ACTIVATIONS if name in present):
        if not isinstance(present[name], str) or (known and present[name] not in known):
            close = difflib.get_close_matches(str(present[name]), sorted(known), n=3)
            hint = f" (did you mean {', '.join(close)}?)" if close else ""
            refuse(name, f"an activation that transformers knows, such as silu or gelu{hint}")


def check_groups(values: dict[str, Any], experts: Any, where: str) -> None:
    """Refuse groups that the experts cannot be split into; 0 and 1 groups are none."""
    groups, used = (values.get(name) for name in GROUPS)
    for name, value in zip(GROUPS, (groups, used), strict=True):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ModelError(f"{name}{where} is {write_value(value)}; accepted: an integer of 0 or more")
    if not groups or groups == 1:
        return
    if isinstance(experts, int) and experts % groups:
        raise ModelError(f"{GROUPS[0]}{where} is {groups}; accepted: a divisor of its {experts} experts")
    if used is not None and not 1 <= used <= groups:
        raise ModelError(f"{GROUPS[1]}{where} is {used}; accepted: 1 to {GROUPS[0]}, {groups}")


def is_dense(kind: str) -> bool:
    """Whether a model type makes text and its code does not speak of experts; false where the code is not found.

    A model that has a ``text_config`` may be made of any model for text, so its own code says nothing.
    """
    text = _modeling_text(kind) or ""
    makes_text = "ForCausalLM" in text or "LMHeadModel" in text
    return makes_text and "text_config" not in text and "expert" not in text.lower()


def has_experts(kind: str) -> bool:
    """Whether the code of a model type makes text and routes tokens to experts; false where the code is not found."""
    text = _modeling_text(kind) or ""
    makes_text = "ForCausalLM" in text or "ConditionalGeneration" in text
    return makes_text and re.search(r"class \w*(Experts|Moe|MoE|Router)\w*\(", text) is not None


def turns_halves(kind: str) -> bool:
    """Whether the code of a model type rotates halves of a head, which an odd head has not."""
    text = _modeling_text(kind)
    return text is not None and "rotate_half" in text


def activations_of_transformers() -> set[str]:
    """Names of activations, from the text of transformers' table; none where it is not installed, or elsewhere."""
    text = _text("activations.py") or ""
    table = re.search(r"^ACT2CLS = \{(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    return set(re.findall(r'^\s*"([\w.-]+)":', table[1], re.MULTILINE)) if table else set()


def _modeling_text(kind: str) -> str | None:
    folder = kind.replace("-", "_").removesuffix("_text")
    return _text("models", folder, f"modeling_{folder}.py")


def _text(*parts: str) -> str | None:
    spec = importlib.util.find_spec("transformers")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(place, *parts)
        if file.is_file():
            return file.read_text("utf-8")
    return None
