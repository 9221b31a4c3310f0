"""The plugin of vLLM, as far as it can be tried without vLLM: what it reads of a layer, its settings. The rest: vllm_tests/."""

import sys
from types import SimpleNamespace

import pytest
import torch

from moe_lowering import Deployment
from moe_lowering.integrations import vllm
from moe_lowering.integrations.vllm_layers import Refused, compute_layer, read_layer

EXPERTS, HIDDEN, WIDTH, TOP_K = 8, 16, 4, 2


class AscendUnquantizedFusedMoEMethod:
    pass


class Other:
    pass


def moe(**changes):
    config = {"has_bias": False, "is_sequence_parallel": False, "dp_size": 1, "pcp_size": 1, "tp_size": 1, **changes}
    return {"moe_config": SimpleNamespace(**config)}


def layer(**changes):
    """The attributes of vllm-ascend's AscendFusedMoE that are read."""
    attributes = {
        **moe(),
        "quant_method": AscendUnquantizedFusedMoEMethod(),
        "top_k": TOP_K,
        "scoring_func": "softmax",
        "renormalize": True,
        "num_expert_group": None,
        "topk_group": None,
        "_original_routed_scaling_factor": 2.5,
        "e_score_correction_bias": None,
        "global_num_experts": EXPERTS,
        "activation": SimpleNamespace(value="silu"),
        "apply_router_weight_on_input": False,
        "custom_routing_function": None,
        "tid2eid": None,
        "dynamic_eplb": False,
        "mix_placement": False,
        "swiglu_limit": 0,
        "multistream_overlap_gate": False,
        "multistream_overlap_shared_expert": False,
        "enable_shared_expert_dp": False,
        "log2phy": None,
        "ep_size": 1,
        "w13_weight": torch.randn(EXPERTS, HIDDEN, 2 * WIDTH) * 0.3,
        "w2_weight": torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.3,
    }
    assert attributes.keys() >= changes.keys()
    return SimpleNamespace(**{**attributes, **changes})


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_layer_computes_what_vllm_says_of_it(scoring):
    torch.manual_seed(0)
    given, x, logits = layer(scoring_func=scoring), torch.randn(5, HIDDEN), torch.randn(5, EXPERTS)
    form = read_layer(given, Deployment())
    scores = torch.softmax(logits.double(), -1) if scoring == "softmax" else torch.sigmoid(logits.double())
    expected = torch.zeros(5, HIDDEN, dtype=torch.float64)
    for token in range(5):
        best = scores[token].topk(TOP_K)
        for weight, expert in zip(best.values / best.values.sum() * 2.5, best.indices, strict=True):
            gate, up = (x[token].double() @ given.w13_weight[expert].double()).chunk(2)
            expected[token] += weight * ((torch.nn.functional.silu(gate) * up) @ given.w2_weight[expert].double())
    torch.testing.assert_close(compute_layer(given, form, x, logits).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"quant_method": SimpleNamespace(quant_method=Other())}, "quantisation"),
        ({"custom_routing_function": print}, "custom_routing"),
        ({"tid2eid": [1]}, "hash_routing"),
        ({"dynamic_eplb": True}, "dynamic_eplb"),
        ({"mix_placement": True}, "mix_placement"),
        ({"swiglu_limit": 7.0}, "swiglu_limit"),
        ({"multistream_overlap_gate": True}, "overlap_gate"),
        ({"multistream_overlap_shared_expert": True}, "overlap_shared"),
        ({"enable_shared_expert_dp": True}, "shared_expert_dp"),
        ({"scoring_func": "sqrtsoftplus"}, "scoring"),
        ({"scoring_func": "sigmoid", "renormalize": False}, "scoring"),
        ({"activation": "gelu"}, "activation"),
        (moe(has_bias=True), "bias"),
        (moe(is_sequence_parallel=True), "sequence_parallel"),
        (moe(dp_size=2), "data_parallel"),
        (moe(pcp_size=2), "data_parallel"),
        (moe(tp_size=2), "tensor_parallel"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes, code):
    with pytest.raises(Refused, match=rf"^\[vllm\.{code}\] .* is .*; accepted: "):
        read_layer(layer(**changes), Deployment())
    read_layer(layer(), Deployment())


def config(asked):
    return SimpleNamespace(additional_config=asked)


def test_settings():
    assert vllm.settings_of(config(None)) is None and vllm.settings_of(config({})) is None
    assert vllm.settings_of(config({"moe_lowering": {"enable": False}})) is None
    assert vllm.settings_of(config({"moe_lowering": {}})) == vllm.SETTINGS
    assert vllm.settings_of(config({"moe_lowering": {"policy": "auto"}}))["policy"] == "auto"


@pytest.mark.parametrize("asked", [True, {"polcy": "auto"}, {"policy": "best"}, {"strict": 1}, {"enable": "yes"}])
def test_wrong_settings(asked):
    with pytest.raises((ValueError, TypeError), match=r"additional_config\['moe_lowering'\].*accepted"):
        vllm.settings_of(config({"moe_lowering": asked}))


def test_registering_imports_nothing_of_vllm():
    vllm.register()
    vllm.register()
    assert "vllm" not in sys.modules and "vllm_ascend" not in sys.modules
