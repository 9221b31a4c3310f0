"""Gate and up projections that a model holds as two tensors, put together once instead of in every forward.

A model that is written with its own expert code (torchtitan, gpt-fast) often has ``w1`` and ``w3`` [E, I, H] apart. Ascend's
grouped matmul takes both at once, so a raised layer would concatenate them in every forward, which the report says.
"""

from __future__ import annotations

import torch
from torch import nn

from moe_lowering.argument_checks import require_instance

__all__ = ["join_projections"]


def join_projections(model: nn.Module, gate: str = "w1", up: str = "w3") -> list[str]:
    """Store two parameters of each module as one, of which they become views, in place.

    A module that has parameters ``gate`` and ``up`` of one shape [E, I, H] gets one parameter ``<gate>_<up>`` [E, 2I, H],
    gate first; ``module.w1`` and ``module.w3`` read from it as before. Names in its state_dict change, so load a
    checkpoint before. A second call finds nothing more to do.

    Args:
        gate, up: names of the parameters. Whether they are stored [E, I, H], K last, cannot be seen; of [E, H, I] the layer
            still computes the same, and its projections are put together in every forward as before.

    Returns:
        The names of the modules that were changed.

    Raises:
        TypeError: ``model`` is no module, or a name no text.
        ValueError: no module has both, or (with the module's name) they differ in shape or dtype. Nothing was changed then.
    """
    require_instance("join_projections", "model", model, nn.Module, "a torch.nn.Module")
    for name, value in (("gate", gate), ("up", up)):
        require_instance("join_projections", name, value, str, "the name of a parameter")
    stored = f"{gate}_{up}"
    targets = [(name, m) for name, m in model.named_modules() if {gate, up} <= m._parameters.keys()]
    if not targets and not any(stored in module._parameters for module in model.modules()):
        raise ValueError(
            f"join_projections: no module of {type(model).__name__} has parameters {gate!r} and {up!r}; accepted: the names "
            "of two parameters [E, I, H]"
        )
    for name, module in targets:
        a, b = (module._parameters[each] for each in (gate, up))
        shapes = [None if each is None else (tuple(each.shape), each.dtype, each.device) for each in (a, b)]
        if shapes[0] is None or shapes[0] != shapes[1] or len(shapes[0][0]) != 3:
            raise ValueError(
                f"join_projections: {name or type(module).__name__} has {gate} {shapes[0]} and {up} {shapes[1]}; accepted: two "
                "tensors [E, I, H] of one dtype and device"
            )
    for _, module in targets:
        _join(module, gate, up, stored)
    return [name for name, _ in targets]


def _join(module: nn.Module, gate: str, up: str, stored: str) -> None:
    first, second = module._parameters.pop(gate), module._parameters.pop(up)
    assert first is not None and second is not None
    with torch.no_grad():
        joined = torch.cat([first, second], 1)
    module.register_parameter(stored, nn.Parameter(joined, requires_grad=first.requires_grad))
    rows = first.shape[1]

    def read(start: int, end: int) -> property:
        return property(lambda self: self._parameters[stored][:, start:end])

    kind = type(module)
    members = {gate: read(0, rows), up: read(rows, 2 * rows), "__module__": kind.__module__}
    module.__class__ = type(kind.__name__, (kind,), members)
