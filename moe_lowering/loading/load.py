"""``load_experts``: fill a model on device meta from safetensors, with only this rank's experts.

1. Plan: each key of the checkpoint is matched with its parameter, and each parameter with its keys, from headers alone;
   shapes and dtypes are checked with tensors on device meta.
2. Buffers that no checkpoint has are made.
3. Read: pieces go straight into the tensors that stay, expert by expert, in the layout of ``shard_experts``.
4. Shard the model, assign the tensors, tie what the model ties. Whatever fails from step 2 on, the model is as it was, on meta.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lowering.argument_checks import refuse, require_instance
from moe_lowering.deployment import Deployment
from moe_lowering.layers.sharding import require_shardable, shard_experts
from moe_lowering.loading.files import CheckpointError, Scratch, StoredTensor, open_checkpoint
from moe_lowering.loading.plan import Parameter, fill_expert, make_plan, read_whole
from moe_lowering.loading.undo import as_it_was

__all__ = ["CheckpointError", "load_experts"]

_PIECE = 1 << 24  # bytes that are held beside what stays, where a whole tensor is cast or moved


def load_experts(
    model: nn.Module, path: str | os.PathLike[str], deployment: Deployment, *, device: torch.device | str | None = None
) -> nn.Module:
    """Fill a model on device meta from a checkpoint in safetensors, and shard it: of the experts only this rank's are read.

    Keys are renamed and joined as transformers' ``from_pretrained`` does; a model that is not of transformers has its state
    dict's keys. Floats are cast to the parameters' dtypes. Buffers that no checkpoint has are made by the model's own
    initialisation. Experts are laid out as by ``shard_experts``, which need not be called. Beside what the rank keeps, one
    expert or 16 MB are held.

    Args:
        model: made under ``torch.device("meta")``, with all experts.
        path: a folder with ``model.safetensors`` or, without that, ``model.safetensors.index.json``; or one such file.
        deployment: as for ``shard_experts``, without shared-expert ranks.
        device: where the weights go; the CPU when None.

    Returns:
        ``model``.

    Raises:
        CheckpointError: a file or key is missing, damaged or not for this model; a shape or dtype is another.
        ValueError: the model is not on meta, nothing can be on ``device``, or what ``shard_experts`` raises. The model is as
            it was then.
    """
    require_instance("load_experts", "path", path, (str, os.PathLike), "the path of a folder or file")
    targets, deployment = require_shardable("load_experts", model, deployment)
    _check_model(model, targets, deployment)
    place = _place(device)
    block = deployment.own_experts
    plan = make_plan(model, open_checkpoint(Path(path)), targets, Path(path))
    with as_it_was(model):
        _make_buffers(model, place)
        tensors, scratch = dict[str, Tensor](), Scratch()
        for each in plan:
            tensors |= _read(each, model, block(each.experts) if each.experts else None, place, scratch)
        shard_experts(model, deployment)
        for name, tensor in tensors.items():
            _assign(model, name, tensor)
        if hasattr(model, "tie_weights"):
            known: Any = model
            known.tie_weights()
    return model


def _place(device: torch.device | str | None) -> torch.device:
    """The device of the weights, on which a tensor can be made."""
    accepted = "a torch.device of this machine, its name, or None for the CPU"
    try:
        place = torch.device("cpu" if device is None else device)
        torch.empty(0, device=place)
    except (RuntimeError, TypeError, AssertionError) as error:  # AssertionError: cuda, of a build without it
        problem = str(error).partition("\n")[0]
        raise refuse("load_experts", "device", device, f"{accepted} ({problem})") from error
    if place.type == "meta":
        raise refuse("load_experts", "device", device, accepted)
    return place


def _check_model(model: nn.Module, targets: list[tuple[str, nn.Module]], deployment: Deployment) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_meta:
            what = f"{name} on {tensor.device}"
            raise refuse("load_experts", "model", what, 'a model that was made under torch.device("meta")')
    for name, module in targets:
        if getattr(module, "moe_lowering_deployment", None) is not None:
            raise ValueError(
                f"load_experts: {name} was sharded before; accepted: a whole model, load_experts shards it"
            )
        if getattr(module, "moe_lowering_quantisation", "none") != "none":
            raise ValueError(
                f"load_experts: {name} is quantised; accepted: a model of floats, quantise_experts comes after"
            )
    if deployment.shared_expert_ranks:
        ranks = deployment.shared_expert_ranks
        raise refuse(
            "load_experts", "deployment.shared_expert_ranks", ranks, "0 (else load all, and call shard_experts)"
        )


def _read(
    parameter: Parameter, model: nn.Module, block: slice | None, device: torch.device, scratch: Scratch
) -> dict[str, Tensor]:
    """The tensors that stay, by name."""
    dtype = parameter.dtype
    with torch.no_grad():
        if block is not None:
            _, *rest = parameter.meta.shape
            shape = (block.stop - block.start, *(reversed(rest) if parameter.turned else rest))
            out = torch.empty(shape, dtype=dtype, device=device)
            for row, expert in enumerate(range(block.start, block.stop)):
                into = out[row].transpose(0, 1) if parameter.turned else out[row]
                fill_expert(parameter, model, expert, into, scratch)
            return {parameter.name: out}
        if parameter.conversion is not None:
            made = read_whole(parameter, model)
            return {name: tensor.to(device=device, dtype=dtype).contiguous() for name, tensor in made.items()}
        return {parameter.name: _copy(parameter.sources[0][1], dtype, device, scratch)}


def _copy(stored: StoredTensor, dtype: torch.dtype, device: torch.device, scratch: Scratch) -> Tensor:
    """A stored tensor, read to its place; a piece at a time where it is cast or moved."""
    if not stored.shape:
        return stored.read().to(device=device, dtype=dtype)
    out = torch.empty(stored.shape, dtype=dtype, device=device)
    if dtype == stored.dtype and device.type == "cpu":
        stored.read_into(out)
        return out
    for start, stop in _pieces(stored):
        out[start:stop].copy_(scratch.read(stored, start, stop))
    return out


def _pieces(stored: StoredTensor) -> Iterator[tuple[int, int]]:
    line = max(1, torch.Size(stored.shape[1:]).numel() * stored.dtype.itemsize)
    step = max(1, _PIECE // line)
    for start in range(0, stored.shape[0], step):
        yield start, min(start + step, stored.shape[0])


def _make_buffers(model: nn.Module, device: torch.device) -> None:
    """Make the buffers that are not in state dicts, by the model's own initialisation.

    Raises:
        ValueError: the model's initialisation leaves one as it was.
    """
    buffers = []
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            old = module._buffers[name]
            if old is not None:
                buffers.append((module, name))
                module._buffers[name] = torch.empty_like(old, device=device)
    before = [getattr(module, name)._version for module, name in buffers]
    for module in model.modules():  # transformers passes over what was initialised, and here nothing is
        vars(module).pop("_is_hf_initialized", None)
    if buffers and hasattr(model, "initialize_weights"):
        known: Any = model
        known.initialize_weights()  # of the weights nothing is written: they are on meta
    for (module, name), version in zip(buffers, before, strict=True):
        if getattr(module, name)._version == version:
            what = f"{type(module).__name__}.{name}"
            accepted = "buffers that are in the checkpoint, or that the model's init makes"
            raise refuse("load_experts", "model", what, accepted)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        old: Any = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
