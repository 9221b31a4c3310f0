"""Ids and activations for tests of the generic operators on one rank."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lowering import vocabulary


def random_ids(lead: tuple[int, ...], experts: int, top_k: int) -> Tensor:
    return torch.rand(*lead, experts).topk(top_k, dim=-1).indices.to(torch.int32)


ACTIVATIONS = [
    ("swiglu", 0.0, False),
    ("swiglu", 0.0, True),
    ("swiglu_clamp", 0.5, False),
    ("swiglu_oai", 0.7, True),
    ("gelu", 0.0, False),
    ("gelu_tanh", 0.0, True),
    ("swiglu_softcap", 0.8, False),
    ("swiglu_clamp_after", 0.4, True),
    ("relu", 0.0, False),
    ("relu2", 0.0, False),
    ("silu", 0.0, False),
    ("gelu_ungated", 0.0, False),
    ("gelu_tanh_ungated", 0.0, False),
]


def width(activation: str, intermediate: int) -> int:
    return intermediate * vocabulary.ACTIVATIONS[activation].parts
