"""Experts of transformers models that do not take part in its experts interface, given that interface in place.

    from moe_lowering.integrations.replaced_experts import replace_experts

    replace_experts(model)  # after loading, before shard_experts, quantise_experts and torch.compile

A module of a class in ``REPLACED`` becomes one of a subclass whose forward hands tokens, expert ids and weights to the
implementation of its config, as ``@use_experts_implementation`` does. Weights are the module's own where its layout is
the interface's (llama4, step3p7, longcat_flash, jetmoe); those of dbrx and switch_transformers are laid out once, a layer at a
time, and the old ones freed. ``state_dict`` and ``load_state_dict`` keep the model's own keys and shapes, until experts are
sharded or quantised; the one difference are longcat_flash's weights of zero experts, which nothing reads and which go.

What a class computes is known by the hash of its forward (``expert_gates.gate_fingerprint``): another version is left alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_lowering.argument_checks import require_instance
from moe_lowering.integrations.experts_interface import Interface
from moe_lowering.integrations.replacements import REPLACED
from moe_lowering.layers.expert_modules import EXPERTS_IMPLEMENTATION

__all__ = ["REFUSED", "REPLACED", "reason_not_replaced", "replace_experts"]

# Families that are not replaced, by the class of their experts, and why.
REFUSED = {
    "NllbMoeExperts": "[experts.own_code] it takes the router's mask for expert ids, so that each token goes to experts 0 and 1 "
    "only, many times, and its router drops tokens by a capacity; correct the model's own code first",
}


def replace_experts(model: nn.Module, implementation: str = EXPERTS_IMPLEMENTATION) -> list[str]:
    """Give every experts module of a class in ``REPLACED`` transformers' experts interface, in place.

    Args:
        implementation: the experts implementation that they use from now on.

    Returns:
        Names of the modules that were replaced; a second call replaces none.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a routing that the replacement has not; nothing is replaced then.
    """
    require_instance("replace_experts", "model", model, nn.Module, "a torch.nn.Module")
    targets = [(name, module) for name, module in model.named_modules() if _is_known(module)]
    for _, module in targets:
        REPLACED[type(module).__name__].check(module)
    for _, module in targets:
        REPLACED[type(module).__name__].take(module, _config_of(model, module))
        _experts_of(module).config._experts_implementation = implementation
    return [name for name, _ in targets]


def reason_not_replaced(module: nn.Module) -> str:
    """Why an experts module without transformers' interface is not computed by this package, and what to do."""
    name = type(module).__name__
    if name in REFUSED:
        return REFUSED[name]
    if name == "JetMoeParallelExperts":
        return "[experts.of_attention] it is a projection of attention with experts, not an MLP; run it on one rank as it is"
    if any(name in replacement.code for replacement in REPLACED.values()):
        return (
            "[experts.not_replaced] its class does not use transformers' experts interface; call replace_experts(model)"
        )
    return "[experts.no_interface] its class does not use transformers' experts interface; write the layer as moe_lowering.MoE"


def _is_known(module: nn.Module) -> bool:
    replacement = REPLACED.get(type(module).__name__)
    return replacement is not None and replacement.knows(module)


def _config_of(model: nn.Module, module: nn.Module) -> Any:
    config: Any = getattr(module, "config", None) or model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _experts_of(module: nn.Module) -> Any:
    return module if isinstance(module, Interface) else module.experts
