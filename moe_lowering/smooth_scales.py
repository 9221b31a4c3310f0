"""Smooth scales of a hand-written W8A8 model that change nothing: parameters that are all ones, taken out before compiling.

W8A8 chains multiply tokens and activations by smooth scales before they are quantised (``scales`` of dispatch, ``quant_scale``
of npu_dequant_swiglu_quant). Checkpoints that were quantised without smoothing fill them with ones. A graph cannot tell, as
they are its inputs; the model can, before it is compiled. torch_npu's operators take None in their place, and the result is
the same, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_lowering.argument_checks import refuse, require_instance

__all__ = ["drop_unit_smooth_scales"]

_WORD = "smooth"


def drop_unit_smooth_scales(model: nn.Module, word: str = _WORD) -> list[str]:
    """Set every parameter and buffer to None whose own name has ``word`` in it and that is all ones; in place.

    A model that does more with one than to hand it to an operator (a cast, a slice) fails on None: it must ask first.
    On several ranks all must come to the same: the scales of a rank's own experts may differ. Compare what is returned.

    Args:
        model: with its real weights.
        word: part of the names.

    Returns:
        Their names, sorted, as ``named_parameters`` has them.

    Raises:
        ValueError: ``model`` is no module, ``word`` no text; a scale has no data (a fake or meta tensor), or there is no such
            name at all.
    """
    require_instance("drop_unit_smooth_scales", "model", model, nn.Module, "a torch.nn.Module")
    if not isinstance(word, str) or not word:
        raise refuse("drop_unit_smooth_scales", "word", word, "a part of the names of the scales")
    targets = list(_scales(model, word))
    if not targets:
        raise ValueError(
            f"drop_unit_smooth_scales: no parameter or buffer of {type(model).__name__} has {word!r} in its name; accepted: a "
            "part of the names that the model's smooth scales have"
        )
    unit = [(module, name, path) for module, name, path, value in targets if _is_one(path, value)]
    for module, name, _ in unit:
        setattr(module, name, None)
    return sorted(path for *_, path in unit)


def _scales(model: nn.Module, word: str) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """(its module, its name there, its name in the model, itself)."""
    for prefix, module in model.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and word in name:
                yield module, name, f"{prefix}.{name}".removeprefix("."), value


def _is_one(path: str, value: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(value, FakeTensor) or value.is_meta:
        raise ValueError(f"drop_unit_smooth_scales: {path} has no data; accepted: a model whose weights are loaded")
    return bool(torch.all(value == 1))
