"""Which keys of a checkpoint make which parameter of a model, and how the pieces are read.

``make_plan`` checks everything from headers alone: transformers' operations run on tensors on device meta, and the
shapes of their results are compared with the model's. ``fill_expert`` and ``read_whole`` then read the values.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lowering.layers.expert_modules import weight_names
from moe_lowering.layers.moe import MoE
from moe_lowering.loading.files import CheckpointError, Scratch, StoredTensor
from moe_lowering.loading.names import Conversion, Source, ignored_keys, read_names, stored_dtype

Sources = tuple[tuple[Source, StoredTensor], ...]
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter or buffer of the model and the keys that it is made of; ``experts`` are those of its module, or 0."""

    name: str
    meta: Tensor
    sources: Sources
    dtype: torch.dtype
    experts: int = 0
    turned: bool = False  # [E, N, K] in the model, [E, K, N] once it is laid out

    @property
    def conversion(self) -> Conversion | None:
        return self.sources[0][0].conversion


def make_plan(
    model: nn.Module, there: Mapping[str, StoredTensor], targets: list[tuple[str, nn.Module]], place: Path
) -> list[Parameter]:
    """What each parameter is made of, in the order of the model; ``place`` is the folder or file of the checkpoint.

    Raises:
        CheckpointError: a parameter without keys, a key without a parameter, one of another shape or dtype.
    """
    of_transformers = hasattr(model, "base_model_prefix") and hasattr(model, "config")
    sources = read_names(model, there) if of_transformers else [Source(key, key) for key in there]
    names: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    by_target: dict[str, list[tuple[Source, StoredTensor]]] = {}
    ignored = ignored_keys(model)
    for source in sources:
        if source.target in names:
            by_target.setdefault(source.target, []).append((source, there[source.key]))
        elif ignored is None or not (ignored.search(source.key) or ignored.search(source.target)):
            place = there[source.key].file
            raise CheckpointError(f"{place}: has {source.key}, for which {type(model).__name__} has no parameter")
    tied = _tied(model, by_target)
    plan: list[Parameter] = []
    filled = set(tied)
    experts = {f"{name}.{weight}".lstrip("."): module for name, module in targets for weight in _expert_tensors(module)}
    for name, meta in names.items():
        if name in by_target:
            parameter = _describe(
                name, meta, tuple(by_target[name]), stored_dtype(model, name, meta.dtype), experts.get(name)
            )
            filled |= _check(parameter, names, model)
            plan.append(parameter)
    ignorable = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = [name for name in names if name not in filled and not any(word in name for word in ignorable)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{place}: has no key for {missing[0]}{more}; accepted: a whole checkpoint")
    return plan


def _tied(model: nn.Module, by_target: Mapping[str, Any]) -> set[str]:
    """Parameters that the model ties to one that is in the checkpoint."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name
        for pair in tied.items()
        for name in pair
        if name not in by_target and any(one in by_target for one in pair)
    }


def _expert_tensors(module: nn.Module) -> list[str]:
    """The tensors of a module that have a line for each expert."""
    names = [f"{name}{suffix}" for name in weight_names(module) for suffix in ("", "_bias")]
    return [name for name in names if isinstance(getattr(module, name, None), Tensor)]


def _describe(
    name: str, meta: Tensor, sources: tuple[tuple[Source, StoredTensor], ...], dtype: torch.dtype, module: Any
) -> Parameter:
    if module is None:
        return Parameter(name, meta, sources, dtype)
    turned = not isinstance(module, MoE) and not module.is_transposed and not name.endswith("_bias")
    return Parameter(name, meta, sources, dtype, int(module.num_experts), turned)


def _check(parameter: Parameter, names: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """The parameters that these keys fill, once shapes and dtypes are right."""
    first = parameter.sources[0][1]
    for source, stored in parameter.sources:
        known = stored.dtype in _FLOATS and parameter.meta.dtype in _FLOATS
        if stored.dtype != parameter.meta.dtype and not known:
            raise CheckpointError(
                f"{stored.file}: {source.key} is {stored.dtype}; accepted: {parameter.meta.dtype}"
                + (", or another float to cast from" if parameter.meta.dtype in _FLOATS else "")
            )
    conversion = parameter.conversion
    if parameter.experts:
        if conversion is not None and conversion.stacks:
            _check_each_expert(parameter)
        elif len(parameter.sources) != 1:
            raise CheckpointError(f"{first.file}: {first.key} and another key are both for {parameter.name}")
        elif not first.shape or first.shape[0] != parameter.experts:
            accepted_shape = [parameter.experts, "..."]
            raise CheckpointError(
                f"{first.file}: {first.key} has shape {list(first.shape)}; accepted: {accepted_shape}"
            )
    elif conversion is None and len(parameter.sources) != 1:
        raise CheckpointError(f"{first.file}: {first.key} and another key are both for {parameter.name}")
    results = _make_on_meta(parameter, model)
    expected = {name: names[name].shape if name in names else torch.Size() for name in results}
    if parameter.experts:
        expected = {parameter.name: torch.Size([1, *parameter.meta.shape[1:]])}
    for name, tensor in results.items():
        if name not in names or tensor.shape != expected[name]:
            shapes = {tuple(stored.shape) for _, stored in parameter.sources}
            accepted = list(names[name].shape) if name in names else "a parameter of the model"
            raise CheckpointError(
                f"{first.file}: {first.key} has shape {', '.join(str(list(shape)) for shape in sorted(shapes))}, which makes "
                f"{name} {list(tensor.shape)}; accepted: {accepted}"
            )
    return set(results)


def _make_on_meta(parameter: Parameter, model: nn.Module) -> dict[str, Tensor]:
    try:
        if parameter.experts:
            return {parameter.name: read_expert(parameter, model, 0, meta=True)}
        return read_whole(parameter, model, meta=True)
    except (RuntimeError, IndexError) as error:  # operations on tensors whose shapes do not go together
        first = parameter.sources[0][1]
        shapes = ", ".join(f"{source.key} {list(stored.shape)}" for source, stored in parameter.sources[:4])
        raise CheckpointError(
            f"{first.file}: {parameter.name} cannot be made of {shapes} ({error}); accepted: what makes "
            f"{list(parameter.meta.shape)}"
        ) from error


def _check_each_expert(parameter: Parameter) -> None:
    """Every pattern of the chain has every expert once, all of one shape."""
    conversion = parameter.conversion
    assert conversion is not None
    first = parameter.sources[0][1]
    for pattern in conversion.sources:
        of_pattern = tuple((source, stored) for source, stored in parameter.sources if source.pattern == pattern)
        numbers = [source.expert for source, _ in of_pattern]
        absent = sorted(set(range(parameter.experts)) - set(numbers))
        if absent:
            raise CheckpointError(
                f"{first.file.parent}: has no {_key_of(absent[0], pattern, of_pattern)} for {parameter.name} "
                f"({len(absent)} of {parameter.experts} experts are missing); accepted: every expert"
            )
        if len(numbers) != parameter.experts:
            raise CheckpointError(
                f"{first.file.parent}: has {len(numbers)} keys {pattern} for {parameter.name}; accepted: {parameter.experts}"
            )
        ((shape, _),) = Counter(stored.shape for _, stored in of_pattern).most_common(1)
        for source, stored in of_pattern:
            if stored.shape != shape:
                raise CheckpointError(
                    f"{stored.file}: {source.key} has shape {list(stored.shape)}; accepted: {list(shape)}, as other experts' have"
                )


def _key_of(expert: int, pattern: str, others: Sources) -> str:
    """The key that an expert would have, from another's; its pattern where there is none, or where it is more than text."""
    for source, _ in others[:1]:
        key = source.key.replace(pattern.replace("*", str(source.expert)), pattern.replace("*", str(expert)))
        if key != source.key:
            return key
    return pattern.replace("*", str(expert))


def read_expert(parameter: Parameter, model: nn.Module, expert: int, *, meta: bool = False) -> Tensor:
    """One expert [1, ...] as the model has it, before it is laid out.

    Raises:
        CheckpointError: the chain may mix experts.
    """
    conversion = parameter.conversion
    whole: tuple[int, ...] = ()
    if conversion is None or not conversion.stacks:
        stored = parameter.sources[0][1]
        size = (1, *stored.shape[1:])
        piece = _empty(size, stored) if meta else stored.read(expert, expert + 1)
        if conversion is None:
            return piece
        parts: dict[str, list[Tensor]] = {parameter.sources[0][0].pattern or "": [piece]}
        whole = stored.shape
    else:
        of_expert = {source.pattern or "": stored for source, stored in parameter.sources if source.expert == expert}
        parts = {pattern: [_empty(each.shape, each) if meta else each.read()] for pattern, each in of_expert.items()}
    chain = conversion.of_one_expert(whole, parameter.meta.shape)
    if chain is None:
        kinds = ", ".join(type(operation).__name__ for operation in conversion.operations)
        raise CheckpointError(
            f"{parameter.sources[0][1].file}: {parameter.name} is made by {kinds}, which may mix experts; accepted: chains "
            "that treat each expert by itself (load all with from_pretrained, then call shard_experts)"
        )
    (tensor,) = chain.run(parts, parameter.name, model).values()
    return tensor


def fill_expert(parameter: Parameter, model: nn.Module, expert: int, into: Tensor, scratch: Scratch) -> None:
    """Read one expert to where it stays: ``into`` has the model's shape [...] of one expert, in whatever layout."""
    conversion = parameter.conversion
    if conversion is None:
        into.copy_(scratch.read(parameter.sources[0][1], expert, expert + 1)[0])
        return
    joined = conversion.joined_in
    if joined is None:
        into.copy_(read_expert(parameter, model, expert)[0])
        return
    begin = 0
    of_expert = {source.pattern: stored for source, stored in parameter.sources if source.expert == expert}
    for pattern in conversion.sources:
        piece = scratch.read(of_expert[pattern])
        size = piece.shape[joined - 1]
        into.narrow(joined - 1, begin, size).copy_(piece)
        begin += size


def read_whole(parameter: Parameter, model: nn.Module, *, meta: bool = False) -> dict[str, Tensor]:
    """Parameters that are no experts', by name: several where a chain splits a key."""
    conversion = parameter.conversion
    if conversion is None:
        stored = parameter.sources[0][1]
        return {parameter.name: _empty(stored.shape, stored) if meta else stored.read()}
    parts: dict[str, list[Tensor]] = {}
    for source, stored in parameter.sources:
        parts.setdefault(source.pattern or "", []).append(_empty(stored.shape, stored) if meta else stored.read())
    results = conversion.run(parts, parameter.name, model)
    cut = next((pattern for pattern in conversion.targets if pattern in parameter.name), "")
    return {
        parameter.name.replace(cut, key, 1) if cut and key in conversion.targets else key: v
        for key, v in results.items()
    }


def _empty(shape: tuple[int, ...], stored: StoredTensor) -> Tensor:
    return torch.empty(shape, dtype=stored.dtype, device="meta")
