"""transformers' experts interface for modules of classes that lack it: the flags, the dispatch, and weights under old names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Interface", "Renamed", "become", "frozen"]


class Interface(nn.Module):
    """The flags of ``@use_experts_implementation``, and its dispatch by the config's implementation."""

    has_gate = True
    has_bias = False
    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True
    _is_expert_parallel = False
    config: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.compute(hidden_states, top_k_index, top_k_weights)

    def compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], ids [T, k], weights [T, k] -> [T, H], by the implementation of the config."""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        name = self.config._experts_implementation
        if name not in ALL_EXPERTS_FUNCTIONS:  # eager: these modules have no loop of their own any more
            name = "grouped_mm"
        result: Tensor = ALL_EXPERTS_FUNCTIONS[name](self, hidden_states, top_k_index, top_k_weights)
        return result


class Renamed(Interface):
    """Weights that are saved and loaded under the names and in the shapes of the class that was replaced.

    ``_save_to_state_dict`` and ``_load_from_state_dict`` are torch's own hooks for that.
    """

    def old_weights(self) -> dict[str, Tensor]:
        """The weights as views or copies under their old names."""
        raise NotImplementedError

    def take_weights(self, old: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The two weights of the interface from the old ones."""
        raise NotImplementedError

    def _is_whole(self) -> bool:
        """Whether the weights are still all of the model's own experts."""
        own = not hasattr(self, "moe_lowering_deployment") and not hasattr(self, "moe_lowering_quantisation")
        return own and isinstance(self._weights()[0], Tensor)

    def _weights(self) -> tuple[Any, Any]:
        return (self.gate_up_proj if self.has_gate else self.up_proj), self.down_proj

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self._is_whole():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, weight in self.old_weights().items():
            destination[prefix + name] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if not self._is_whole():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        own = self.old_weights()
        loaded = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        missing_keys += [prefix + name for name in own if name not in loaded]
        wrong = [name for name, weight in loaded.items() if weight.shape != own[name].shape]
        error_msgs += [f"{prefix}{n} has shape {list(loaded[n].shape)}; accepted: {list(own[n].shape)}" for n in wrong]
        if strict:
            known = {prefix + name for name in own}
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]
        if not wrong and loaded:
            with torch.no_grad():
                for own_weight, new in zip(self._weights(), self.take_weights({**own, **loaded}), strict=True):
                    own_weight.copy_(new)


def frozen(weight: Tensor, like: nn.Parameter) -> nn.Parameter:
    """A parameter that asks for a gradient where ``like`` does."""
    return nn.Parameter(weight, requires_grad=like.requires_grad)


def become(module: Any, *mixins: type) -> None:
    """Make a module one of a class with the same name and bases, and these before them."""
    old = type(module)
    mixed = _CLASSES.get((old, mixins))
    if mixed is None:
        gate = getattr(old, "_apply_gate", None) or _default_gate()
        names: dict[str, Any] = {"__module__": old.__module__, "__doc__": old.__doc__}
        if any(issubclass(each, Interface) for each in (*mixins, old)):
            names["_apply_gate"] = gate
        mixed = _CLASSES[old, mixins] = type(f"MoeLowering{old.__name__}", (*mixins, old), names)
    module.__class__ = mixed


_CLASSES: dict[tuple[type, tuple[type, ...]], type] = {}


def _default_gate() -> Any:
    from transformers.integrations import moe

    return moe._default_apply_gate
