"""The MoE modules of a model, this package's ``MoE`` and the experts modules of transformers: which they are, and the names of
what they hold."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from moe_lowering.argument_checks import require_instance
from moe_lowering.deployment import Deployment
from moe_lowering.layers.moe import MoE

SUFFIXES = ("", "_bias", "_scale", "_offset", "_scale_bias")  # of the names of weights: those, and what belongs to them
EXPERTS_IMPLEMENTATION = "moe_lowering"  # this package's name among transformers' experts implementations


def moe_modules(what: str, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of every ``MoE`` and every experts module of transformers; a ValueError when there is none."""
    require_instance(what, "model", model, nn.Module, "a torch.nn.Module")
    modules = list(model.named_modules())
    matches = [(name, module) for name, module in modules if isinstance(module, MoE) or is_experts_module(module)]
    if not matches:
        raise ValueError(
            f"{what}: {type(model).__name__} has no MoE module; accepted: a model with moe_lowering.layers.MoE "
            "or with transformers' experts modules (num_experts, gate_up_proj or up_proj, down_proj, is_transposed, has_bias, "
            "is_concatenated)"
        )
    return matches


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module is an experts module of transformers, by its attributes."""
    names = ("num_experts", "down_proj", "is_transposed", "has_bias", "is_concatenated")
    return all(hasattr(module, name) for name in names) and hasattr(module, weight_names(module)[0])


def weight_names(module: nn.Module) -> tuple[str, str]:
    """The attributes that hold the experts' weights, before and after the activation."""
    if isinstance(module, MoE):
        return "w13", "w2"
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"


def num_experts_of(module: nn.Module) -> int:
    """E of an MoE module; of a sharded one of transformers still that of all ranks."""
    known: Any = module  # two families of modules with the same attribute
    return int(known.num_experts)


def deployment_of(module: nn.Module) -> Deployment | None:
    """The deployment that a module was made or sharded for; None of a whole one."""
    return getattr(module, "moe_lowering_deployment", None)


def refuse_lists(what: str, module: nn.Module) -> None:
    """A ValueError for experts that ``experts.list_experts`` made lists of."""
    if any(isinstance(getattr(module, name, None), nn.ParameterList) for name in weight_names(module)):
        raise ValueError(f"{what} holds one tensor for each expert; accepted: stacked experts (call list_experts last)")


def refuse_computed(what: str, module: nn.Module) -> None:
    """A ValueError for experts' tensors that a module computes, as a parametrization or ``torch.nn.utils.weight_norm`` does:
    nothing can be put in their place."""
    for name in (each + suffix for each in weight_names(module) for suffix in SUFFIXES):
        held = name in module._parameters or name in module._buffers or name in vars(module)
        normed = f"{name}_g" in module._parameters  # weight_norm leaves what it computes as a plain attribute
        if isinstance(getattr(module, name, None), Tensor) and (normed or not held):
            raise ValueError(
                f"{what}: {name} is computed; accepted: a parameter (first torch.nn.utils.parametrize."
                "remove_parametrizations, or torch.nn.utils.remove_weight_norm)"
            )


def warn_of_other_implementations(what: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
    """Say so where transformers' modules are not computed by this package, which alone can read what they now hold."""
    others: dict[str, list[str]] = {}
    for name, module in modules:
        implementation = getattr(getattr(module, "config", None), "_experts_implementation", EXPERTS_IMPLEMENTATION)
        if implementation != EXPERTS_IMPLEMENTATION:
            others.setdefault(str(implementation), []).append(name or type(module).__name__)
    for implementation, names in others.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"{what}: {names[0]}{more} is computed by the experts implementation {implementation!r}, which does not read experts "
            f"as they are now and is not lowered; call model.set_experts_implementation({EXPERTS_IMPLEMENTATION!r}) "
            "(moe_lowering.integrations.transformers.register() first)",
            stacklevel=3,
        )
