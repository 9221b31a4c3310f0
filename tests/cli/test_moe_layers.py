"""How many MoE layers ``explain`` says that a model has, of which its figures of memory are: as transformers' own code makes."""

import types

import pytest
import torch

from moe_lowering.explanation.configs import describe_config
from moe_lowering.explanation.moe_layers import SWITCHES, count_moe_layers


@pytest.mark.parametrize(("kind", "values", "layers"), [
    ("deepseek_v3", {}, 58),
    ("jamba", {}, 16),
    ("longcat_flash", {}, 28),
    ("llama4_text", {"interleave_moe_layer_step": 2}, 24),
    ("ernie4_5_moe", {}, 27),
    ("ernie4_5_moe", {"moe_layer_interval": 2}, 14),
    ("glm4_moe_lite", {}, 46),
    ("lfm2_moe", {"layer_types": ["conv"] * 32}, 30),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, 11),
])  # fmt: skip
def test_layers_with_experts_are_counted_as_the_model_has_them(kind, values, layers):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(kind, **values)
    assert describe_config(config).layers == layers
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert sum(type(module).__name__.endswith("Experts") for module in model.modules()) == layers


@pytest.mark.parametrize(("values", "layers"), [
    ({"mlp_layer_types": ["dense", "hash_moe", "moe"]}, 2),
    ({"mlp_layer_types": ["dense", "sparse", "other"]}, None),
    ({"layers_block_type": ["attention", "moe", "mlp"]}, 1),
    ({"layers_block_type": ["attention", "mamba", "mamba"]}, 3),  # says nothing of experts
    ({"moe_layers": [2]}, 1),
    ({"expert_layer_period": 2, "expert_layer_offset": 1}, 1),
    ({"expert_layer_period": "two"}, None),
    ({"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 1}, 1),
    ({"num_dense_layers": 2}, 1),
    ({"moe_layer_freq": [0, 1, 1]}, None),
    ({"num_hidden_layers": None}, None),
])  # fmt: skip
def test_what_a_config_says_of_its_layers(values, layers):
    assert count_moe_layers(types.SimpleNamespace(**{"num_hidden_layers": 3, **values})) == layers


NO_EXPERTS = "an unnamed model has a layer with experts (by its config none has)"


@pytest.mark.parametrize(("dense", "moe"), [
    *[({switch: False}, {switch: True}) for switch in SWITCHES],
    ({"mlp_layer_types": ["dense"] * 2}, {"mlp_layer_types": ["dense", "sparse"]}),
    ({"moe_layers": [7]}, {"moe_layers": [1]}),
    ({"expert_layer_period": 3, "expert_layer_offset": 2}, {"expert_layer_period": 2, "expert_layer_offset": 1}),
    ({"moe_layer_interval": 3}, {"moe_layer_interval": 2}),
    ({"first_k_dense_replace": 2}, {"first_k_dense_replace": 1}),
])  # fmt: skip
def test_a_config_of_which_no_layer_has_experts_is_told(dense, moe):
    """It is judged as if one had, as the model has none to judge."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    described = [describe_config({**sizes, "num_hidden_layers": 2, **values}) for values in (dense, moe)]
    assert [NO_EXPERTS in block.assumptions for block in described] == [True, False]
    assert described[0].layers is None and described[1].layers


def test_the_switches_are_of_transformers_configs():
    """And of no model that always has experts."""
    from transformers import AutoConfig, DogeConfig, Gemma4TextConfig

    assert [name for name in SWITCHES if getattr(DogeConfig(), name, None) is False] == ["is_moe"]
    assert [name for name in SWITCHES if getattr(Gemma4TextConfig(), name, None) is False] == ["enable_moe_block"]
    assert not any(getattr(AutoConfig.for_model("qwen3_moe"), name, None) is False for name in SWITCHES)
