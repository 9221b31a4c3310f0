"""The config object of transformers for a model type or a config.json: the part of it that makes text. No model is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lowering.model_configs.check import ACCEPTED, OWN, hint_of, path_of, read_config
from moe_lowering.model_configs.errors import OF_NO_TYPE, ModelError, write_value
from moe_lowering.model_configs.presets import PRESETS


def read_text_config(model: str) -> Any:
    """The config of a published model, of a model type, with the type's own values, or of a file.

    Raises:
        ModelError: transformers does not import; it does not know the type; the file is no config of it; no decoder.
        ImportError: the config's own module does not import, as those that need torch_npu where there is no CANN.
    """
    path = path_of(model)
    if path is not None:
        return config_of_values(read_config(path), path)
    classes = _config_classes(model)
    if model in PRESETS:
        return config_of_values(PRESETS[model].config)
    if model in classes:
        return text_part(classes[model]())
    raise ModelError(f"is {model!r}{hint_of(model, classes)}; accepted: {ACCEPTED}")


def is_known_type(kind: Any) -> bool:
    """Whether transformers is there and has a model type."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return False
    return isinstance(kind, str) and kind in CONFIG_MAPPING


def text_part(config: Any) -> Any:
    """The part of a config that makes text.

    Raises:
        ModelError: it has none that is a decoder.
    """
    text = config.get_text_config()
    if getattr(text, "num_hidden_layers", None) is None or getattr(text, "vocab_size", None) is None:
        raise ModelError(f"{config.model_type} is not a decoder; accepted: {ACCEPTED}")
    return text


def _config_classes(model: str) -> Any:
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        raise ModelError(
            f"{model} needs transformers, which does not import ({error}); accepted: {OWN}, or install it with: "
            "pip install 'moe-lowering[transformers]'"
        ) from error
    return CONFIG_MAPPING


def config_of_values(values: Mapping[str, Any], path: Path | None = None) -> Any:
    """The config of the values of a config.json, of a type that transformers knows.

    Args:
        path: the file, for errors.

    Raises:
        ModelError: no such type; not valid for it; no decoder.
        ImportError: as ``read_text_config``.
    """
    kind = values.get("model_type")
    classes = _config_classes(str(path or kind))
    if not isinstance(kind, str) or kind not in classes:
        where = f" in {path}" if path is not None else ""
        raise ModelError(
            f"model_type{where} is {write_value(kind)}; accepted: a type that transformers knows; {OF_NO_TYPE}"
        )
    # how the file's weights are quantised does not matter: the weights are random, in the dtype that is asked for
    values = {name: value for name, value in values.items() if name != "quantization_config"}
    try:
        return text_part(classes[kind].from_dict(values))
    except (ModelError, ImportError):
        raise
    except Exception as error:  # whatever a config class raises for its values
        raise ModelError(f"{path or 'the config'} is not a valid {kind} config: {error}") from error
