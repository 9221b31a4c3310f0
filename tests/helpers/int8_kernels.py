"""int8 rows and what is computed from them, for tests of CPU kernels."""

from __future__ import annotations

import torch


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def int8s(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape).to(torch.int8)


EXPERTS = [0, 0, 2, 2, 2]  # of the first five rows; rows 5 and 6 belong to none


def assert_undefined(values: torch.Tensor, scale: torch.Tensor) -> None:
    assert (values == -128).all()
    assert scale.isnan().all()
