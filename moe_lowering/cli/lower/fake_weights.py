"""A model on device meta becomes one of fake tensors, which say that they are on a device.

A model built under fake tensors runs each operator of its initialisation under them, which takes four times as long as
building it on meta and giving each tensor a fake one in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CPU = torch.device("cpu")


def make_fake(model: nn.Module, mode: FakeTensorMode) -> bool:
    """Replace every tensor of the model by a fake one on CPU with its shape, strides and dtype; tensors in two places stay one.

    To be called outside of the mode, in which each tensor that is looked at is an operator.

    False, and the model is as it was, where a module keeps tensors in a container of its own: only those that modules
    have as parameters, buffers and plain attributes are known to be all.
    """
    if any(_holds_tensors(value) for module in model.modules() for value in _own_values(module)):
        return False
    made: dict[int, Tensor] = {}
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for tensors in places:
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    tensors[name] = made.setdefault(id(tensor), _fake(tensor, mode))
    return True


def _own_values(module: nn.Module) -> list[Any]:
    """What a module has beside what every module has."""
    return [value for name, value in vars(module).items() if name not in _OF_MODULE]


_OF_MODULE = frozenset(vars(nn.Module()))


def _holds_tensors(value: Any) -> bool:
    """Whether a container has a tensor somewhere in it."""
    if isinstance(value, dict):
        value = [*value.values()]
    return isinstance(value, (list, tuple, set)) and any(isinstance(v, Tensor) or _holds_tensors(v) for v in value)


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    if not tensor.is_meta:  # made on CPU whatever the default device was
        return mode.from_tensor(tensor)
    fake = FakeTensor(mode, tensor.detach(), CPU)
    if isinstance(tensor, nn.Parameter):
        fake._is_param = True  # all that makes a Parameter of a tensor of another class
        fake.requires_grad_(tensor.requires_grad)
    return fake
