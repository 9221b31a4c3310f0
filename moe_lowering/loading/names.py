"""How transformers turns the keys of a checkpoint into a model's parameters: which keys, by which operations.

The rules are transformers' own (``get_model_conversion_mapping``): keys are renamed, and those of one parameter go through a
chain of operations. ``of_one_expert`` says whether such a chain treats every expert by itself.
Source: transformers.core_model_loading: ``convert_and_load_state_dict_in_model``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converter of transformers, with its patterns of sources and targets and its operations."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Any, ...]

    def run(self, parts: Mapping[str, Sequence[Tensor]], name: str, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of a chain, by target pattern; ``parts`` are the tensors of each source pattern."""
        tensors: dict[str, Any] = {pattern: list(each) for pattern, each in parts.items()}
        for operation in self.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=list(self.sources),
                target_patterns=list(self.targets),
                full_layer_name=name,
                model=model,
                config=getattr(model, "config", None),
                missing_keys=None,
            )
        return {key: value[0] if isinstance(value, list) else value for key, value in tensors.items()}

    @property
    def joined_in(self) -> int | None:
        """The dimension of one expert [1, ...] in which its sources stand one behind the other, or None."""
        later = self.operations[1:]
        if not self.stacks or len(self.targets) != 1:
            return None
        if not later:
            return 1 if len(self.sources) == 1 else None
        plain = len(later) == 1 and type(later[0]).__name__ == "Concatenate" and later[0].dim > 0
        return int(later[0].dim) if plain else None

    @property
    def stacks(self) -> bool:
        """Whether a source is one tensor for each expert, which the chain stacks first."""
        return type(self.operations[0]).__name__ == "MergeModulelist"

    def of_one_expert(self, whole: Sequence[int], parameter: Sequence[int]) -> Conversion | None:
        """The chain for one expert of a stack of ``whole`` shape, or None where an operation may mix experts."""
        operations = []
        for place, operation in enumerate(self.operations):
            kind = type(operation).__name__
            if kind == "Transpose" and operation.check_dims:
                if tuple(whole) == tuple(parameter):
                    continue
                operation = type(operation)(operation.dim0, operation.dim1)
            dims = [getattr(operation, name, None) for name in ("dim", "dim0", "dim1")]
            within = all(dim is None or dim > 0 for dim in dims)
            stacks = kind == "MergeModulelist" and place == 0 and operation.dim == 0
            if not stacks and not (kind in ("Concatenate", "Interleave", "Transpose") and within):
                return None
            operations.append(operation)
        return dataclasses.replace(self, operations=tuple(operations)) if len(self.targets) == 1 else None


@dataclasses.dataclass(frozen=True)
class Source:
    """One key of a checkpoint: the parameter that it belongs to, and the pattern of the chain, or None for a plain copy."""

    key: str
    target: str
    pattern: str | None = None
    conversion: Conversion | None = None
    expert: int | None = None  # of a key for one expert


def read_names(model: nn.Module, keys: Iterable[str]) -> list[Source]:
    """What each key is for, in transformers' order.

    Raises:
        ImportError: this transformers has no such rules; accepted: 5.20 or newer.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    known: Any = model
    rules = get_model_conversion_mapping(known)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    conversions = {
        pattern: Conversion(tuple(rule.source_patterns), tuple(rule.target_patterns), tuple(rule.operations))
        for rule in converters
        for pattern in rule.source_patterns
    }
    names = dict(model.state_dict())
    prefix = known.base_model_prefix
    sources = []
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if target not in names and key in names:
            target, pattern = rename_source_key(key, [], [], prefix, names)
        conversion = conversions[pattern] if pattern is not None else None
        expert = _expert_of(key, pattern) if conversion is not None and conversion.stacks else None
        sources.append(Source(key, target, pattern, conversion, expert))
    return sources


def _expert_of(key: str, pattern: str | None) -> int | None:
    """The number in the place of the star: of an expert, where transformers counts positions."""
    end = (pattern or "").rpartition("*")[2].replace("\\", "").rstrip("$")
    match = re.search(rf"\.(\d+){re.escape(end)}", key)
    return int(match[1]) if match else None


def ignored_keys(model: nn.Module) -> re.Pattern[str] | None:
    """Keys of a checkpoint that the model says it does not read."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns))) if patterns else None


def stored_dtype(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a parameter gets: that of the model, or float32 where its class keeps it so, as ``from_pretrained`` does."""
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    kept = dtype in (torch.float16, torch.bfloat16) and any(
        re.search(each.replace("*", ".*"), name) for each in patterns
    )
    return torch.float32 if kept else dtype
