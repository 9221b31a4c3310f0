"""``count_moe_layers``: how many layers of a config have experts, in the words by which configs of transformers say it.

Source: transformers.models: the decoder layer of each type, and its config class.
"""

from __future__ import annotations

from typing import Any

MOE = "moe"  # of layers_block_type
# Of mlp_layer_types: whether such a layer has experts
WORDS = {"sparse": True, "moe": True, "hash_moe": True, "dense": False}
# What a config says to have experts at all, where its type may be dense
SWITCHES = ("is_moe", "enable_moe_block")
# Layers of this type have two attentions each, and `num_hidden_layers` counts those.
_COUNTED_BY = {"longcat_flash": "num_layers"}


def count_moe_layers(config: Any) -> int | None:
    """How many layers have experts; None where the config does not say how many layers there are, or in words that are not
    known here. Where one of ``SWITCHES`` is False none has.

    The first of these that a config has counts: a word for each layer (``mlp_layer_types``, ``layers_block_type``), the layers by
    number (``moe_layers``), every n-th one (``expert_layer_period``; ``moe_layer_interval``, from and up to a number). Else
    dense are the first ``first_k_dense_replace`` or ``num_dense_layers``, ``mlp_only_layers``, and all but every n-th one.
    """
    if any(getattr(config, switch, None) is False for switch in SWITCHES):
        return 0
    count = _whole(config, _COUNTED_BY.get(getattr(config, "model_type", ""), "num_hidden_layers"), 0, 1)
    if count is None:
        return None
    words = _listed(config, "mlp_layer_types")
    if words is not None:
        return sum(WORDS[word] for word in words[:count]) if WORDS.keys() >= {*words} else None
    blocks = _listed(config, "layers_block_type")
    if blocks is not None and MOE in blocks:
        return sum(word == MOE for word in blocks[:count])
    numbers = _listed(config, "moe_layers")
    if numbers is not None:
        return sum(number in numbers for number in range(count))
    if getattr(config, "expert_layer_period", None) is not None:
        return _count_of_periods(config, count)
    if getattr(config, "moe_layer_interval", None) is not None:
        return _count_of_intervals(config, count)
    return _count_behind_dense(config, count)


def _count_of_periods(config: Any, count: int) -> int | None:
    period, offset = _whole(config, "expert_layer_period", 1, 1), _whole(config, "expert_layer_offset", 0, 0)
    if period is None or offset is None:
        return None
    return sum(layer % period == offset for layer in range(count))


def _count_of_intervals(config: Any, count: int) -> int | None:
    interval, start = _whole(config, "moe_layer_interval", 1, 1), _whole(config, "moe_layer_start_index", 0, 0)
    end = _whole(config, "moe_layer_end_index", -1, -1)  # -1: the last layer
    if interval is None or start is None or end is None:
        return None
    last = count - 1 if end == -1 else min(end, count - 1)
    return sum((layer + 1) % interval == 0 for layer in range(start, last + 1))


def _count_behind_dense(config: Any, count: int) -> int | None:
    named = "first_k_dense_replace" if getattr(config, "num_dense_layers", None) is None else "num_dense_layers"
    dense = _whole(config, named, 0, 0)
    step, every = _whole(config, "decoder_sparse_step", 1, 1), _whole(config, "moe_layer_freq", 1, 1)
    only = getattr(config, "mlp_only_layers", None) or ()
    if dense is None or step is None or every is None or not isinstance(only, (list, tuple)):
        return None
    with_experts = [
        layer for layer in range(dense, count) if layer not in only and (layer + 1) % step == 0 and layer % every == 0
    ]
    return len(with_experts)


def _whole(config: Any, name: str, default: int, least: int) -> int | None:
    """A whole number of a config; None for what is none, or too small."""
    value = getattr(config, name, None)
    value = default if value is None else value
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= least else None


def _listed(config: Any, name: str) -> list[Any] | None:
    """A list of a config that is not empty."""
    value = getattr(config, name, None)
    return list(value) if isinstance(value, (list, tuple)) and value else None
