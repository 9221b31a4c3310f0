"""``check_model``: refuses a MODEL argument whose name, file or sizes are certain to be wrong, before torch is imported.

Names of model types are read from the text of transformers' table, not by importing it, which takes seconds. What only the
model's own code can tell is left to it.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_lowering.model_configs.errors import OF_NO_TYPE, SHOWN, ModelError, write_value
from moe_lowering.model_configs.presets import PRESETS, preset_of_hub, preset_of_hub_name
from moe_lowering.model_configs.values import (
    check_config_values,
    check_groups,
    has_experts,
    is_dense,
    turns_halves,
)

OWN = "moe"
ACCEPTED = (
    f"{OWN}, a published model (deepseek_v3, qwen3_235b, kimi_k2, ...), a transformers model type (mixtral, qwen3_moe, ...), or "
    "a path to a config.json"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LARGEST = 2**31 - 1  # of a size, and of a number of tokens: operators take int32
LONGEST_FILE = 2**24  # bytes of a config.json
OWN_SIZES = {"hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8}  # of OWN: DeepSeek-V3's MoE layer

# Names that configs have for one dimension, the first that is there counts: a model with an `intermediate_size` for its
# dense layers has another name for its experts'.
NAMES = {
    "hidden": ("hidden_size", "d_model"),
    "intermediate": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k"),
}
# Sizes beside those that a file may have.
OTHER_SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def check_model(model: str, needs_type: bool = True, needs_experts: bool = True) -> None:
    """Refuse a MODEL that is certain to be wrong.

    Args:
        model: the argument as it was typed.
        needs_type: a file must name a type that transformers knows; else sizes are enough.
        needs_experts: a type must be one with MoE layers; else only its other sizes are wanted.

    Raises:
        ModelError: see above.
    """
    path = path_of(model) if model.strip() else None
    if path is not None:
        _check_hub_id(model, path)
        values = read_config(path)
        check_values(values, path, needs_type)
        text = {**values, **(values.get("text_config") or {})}
        if needs_experts and first_of(text, NAMES["experts"]) is None:
            _check_has_experts(values.get("model_type"), f" in {write_value(str(path))}")
    elif model != OWN and model not in PRESETS:
        _check_name(model)
        if needs_experts:
            _check_has_experts(model)


def path_of(model: str) -> Path | None:
    """The file that a MODEL means; None when it is the name of a type."""
    path = Path(model)
    try:
        if path.is_dir():
            return path / "config.json"
        is_path = path.exists()
    except (OSError, ValueError) as error:  # too long for a name of a file, or with a zero byte
        raise ModelError(
            f"is {write_value(model)}, which is no name ({_error_words(error)}); accepted: {ACCEPTED}"
        ) from error
    return path if is_path or path.suffix == ".json" or "/" in model else None


def read_config(path: Path) -> dict[str, Any]:
    """The object in a config.json.

    Raises:
        ModelError: it cannot be read, is no JSON, or no object.
    """
    try:
        if path.exists() and path.stat().st_size > LONGEST_FILE:
            raise ValueError(f"it has {path.stat().st_size} bytes, more than {LONGEST_FILE}")
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{write_value(str(path))} is not a readable config.json ({_error_words(error)}); accepted: {ACCEPTED}"
        ) from error
    if not isinstance(values, dict):
        raise ModelError(
            f"{write_value(str(path))} holds {type(values).__name__}, not an object; accepted: a JSON object with a "
            "model's config"
        )
    return values


def check_values(values: dict[str, Any], path: Path | None, needs_type: bool) -> None:
    """Refuse a config whose type is no word, or whose sizes no model can have; ``path``: the file that they are from."""
    where = f" in {write_value(str(path))}" if path is not None else ""
    kind = values.get("model_type")
    if not isinstance(kind, str) if needs_type or kind is not None else False:
        raise ModelError(
            f"model_type{where} is {write_value(kind)}; accepted: the name of a model type of transformers"
        )
    known = _types()
    if needs_type and known and kind not in known:
        raise ModelError(
            f"model_type{where} is {write_value(kind)}; accepted: a type that transformers knows; {OF_NO_TYPE}"
        )
    text = values.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise ModelError(f"text_config{where} is {write_value(text)}; accepted: an object")
    merged = {**values, **(text or {})}
    for name in (*(name for names in NAMES.values() for name in names), *OTHER_SIZES):
        check_size(name, merged.get(name), where)
    check_config_values(merged, where)
    _check_divisions(merged, where)
    if needs_type:
        _check_has_experts(kind, where)
    if isinstance(kind, str) and merged.get("head_dim") and merged["head_dim"] % 2 and turns_halves(kind):
        raise ModelError(
            f"head_dim{where} is {merged['head_dim']}; accepted: an even number, of which halves are rotated"
        )


def _check_has_experts(kind: Any, where: str = "") -> None:
    if isinstance(kind, str) and is_dense(kind):
        raise ModelError(f"{kind}{where} has no MoE layers{hint_of_sibling(kind)}; accepted: {ACCEPTED}")


def _check_divisions(values: dict[str, Any], where: str) -> None:
    """Refuse counts of which one must be a part of another."""
    experts, top_k = (first_of(values, NAMES[which]) for which in ("experts", "top_k"))
    if isinstance(experts, int) and isinstance(top_k, int) and 0 < experts < top_k:
        raise ModelError(f"experts of one token{where} are {top_k}; accepted: 1 to its {experts} experts")
    check_groups(values, experts, where)
    heads, shared = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ModelError(f"num_key_value_heads{where} is {shared}; accepted: a divisor of num_attention_heads, {heads}")


def check_size(name: str, value: Any, where: str = "") -> None:
    """Refuse what is no size. None says that a model does without, and so does 0 of experts; lists are per layer."""
    values = value if isinstance(value, (list, tuple)) else [value]
    absent = name in (*NAMES["experts"], *NAMES["top_k"])
    for each in values:
        if each is None or (each == 0 and absent and not isinstance(each, bool)):
            continue
        if not isinstance(each, int) or isinstance(each, bool) or not 1 <= each <= LARGEST:
            raise ModelError(f"{name}{where} is {write_value(each)}; accepted: an integer from 1 to {LARGEST}")


def size_of(config: Any, names: tuple[str, ...]) -> int:
    """The first of these attributes that a config has, 0 when it has none; a list counts when all of its values are the same.

    Raises:
        ModelError: that attribute is no size: another one is not taken in its place.
    """
    for name in names:
        value = getattr(config, name, None)
        check_size(name, value)
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, int) and value > 0:
            return value
    return 0


def first_of(values: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of some names that has a value."""
    return next((values[name] for name in names if values.get(name) is not None), None)


def _error_words(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def _check_hub_id(model: str, path: Path) -> None:
    """Refuse what is no file and looks like a repository of the Hugging Face hub: nothing is downloaded."""
    if path.exists() or path.suffix == ".json" or Path(model).exists() or not HUB_ID.fullmatch(model):
        return
    preset = preset_of_hub(model)
    also = f"{preset.name}, which has its sizes, or " if preset is not None else ""
    name = model.rpartition("/")[2]
    raise ModelError(
        f"is {model}, which is no folder here and looks like an id of the Hugging Face hub, from which nothing is downloaded; "
        f"accepted: {also}a local folder with its config.json (hf download {model} config.json --local-dir {name})"
    )


def _check_name(model: str) -> None:
    known = _types()
    if known and model not in known:
        raise ModelError(f"is {write_value(model)}{hint_of(model, known)}; accepted: {ACCEPTED}")


def hint_of(model: str, known: Iterable[str]) -> str:
    """What was meant by a name that is none, of ``known`` names: presets and types with MoE layers alone. The last part of a
    preset's hub id means that preset."""
    if (preset := preset_of_hub_name(model)) is not None:
        return f" (did you mean {preset.name}?)"
    close = difflib.get_close_matches(model[:SHOWN].lower(), [OWN, *PRESETS, *sorted(known)], n=12)
    close = [name for name in dict.fromkeys(close) if name == OWN or name in PRESETS or has_experts(name)][:3]
    return f" (did you mean {', '.join(close)}?)" if close else ""


def hint_of_sibling(dense: str) -> str:
    """What was meant by a type without MoE layers: the presets and types with them of the same family, the nearest first."""
    named = re.sub(r"[\W_]", "", dense)
    close = [name for name in (*PRESETS, *_types()) if named and re.sub(r"[\W_]", "", name).startswith(named)]
    close = sorted(name for name in close if name in PRESETS or (has_experts(name) and not name.endswith("_text")))
    best = sorted(dict.fromkeys(close), key=lambda name: ("moe" not in name, name in PRESETS, len(name)))[:3]
    return f" (did you mean {', '.join(best)}?)" if best else ""


def models_from(prefix: str) -> list[str]:
    """What a MODEL that begins so may be, files aside: the package's own, presets, types with MoE layers."""
    begun = [name for name in dict.fromkeys((OWN, *PRESETS, *sorted(_types()))) if name.startswith(prefix)]
    return [name for name in begun if name == OWN or name in PRESETS or has_experts(name)]


def _types() -> set[str]:
    """Names of transformers' model types; none where it is not installed, or its table is elsewhere."""
    spec = importlib.util.find_spec("transformers")
    names: set[str] = set()
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in ("auto_mappings.py", "configuration_auto.py"):
            table = Path(folder, "models", "auto", file)
            if table.exists():
                names |= set(re.findall(r'\("([\w.-]+)", "\w+Config"\)', table.read_text("utf-8")))
    return names
