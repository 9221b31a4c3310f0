"""Small checkpoints of transformers' models, in several files, and the model that is made of one by other means."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

import moe_lowering
from moe_lowering.families.small_models import TINY, _model_class
from moe_lowering.integrations.transformers import register
from moe_lowering.model_configs.read import read_text_config
from moe_lowering.model_configs.small import shrink

DTYPE = torch.bfloat16


def deployment(ranks: int, rank: int, **fields) -> moe_lowering.Deployment:
    return moe_lowering.Deployment(soc="A3", ep_size=ranks, ep_rank=rank, ep_group="ep", **fields)


def config_of(family: str, layers: int = 2):
    return shrink(read_text_config(family), TINY, layers)


def save(config, folder: Path, size: str = "60KB"):
    """A model of random weights as ``save_pretrained`` writes it, every parameter and buffer of another value."""
    torch.manual_seed(0)
    model = _model_class(config)._from_config(config, dtype=DTYPE)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    model.save_pretrained(folder, max_shard_size=size)


def on_meta(config):
    register()
    with torch.device("meta"):
        return _model_class(config)._from_config(config, dtype=DTYPE, experts_implementation="moe_lowering")


def load_all(config, folder: Path):
    register()
    return _model_class(config).from_pretrained(folder, dtype=DTYPE, experts_implementation="moe_lowering")


def load_all_then_shard(whole, ranks: int, rank: int):
    return moe_lowering.shard_experts(copy.deepcopy(whole), deployment(ranks, rank))
