"""Quantised experts as vllm-ascend keeps them, and the memory format of each kind, as far as it can be tried without vLLM."""

import sys
from types import SimpleNamespace

import pytest
import torch
from quantised_numbers import pack_int4
from test_vllm_layers import EXPERTS, HIDDEN, TOP_K, WIDTH, engine, layer, moe

from moe_lowering import Deployment
from moe_lowering.integrations import vllm
from moe_lowering.integrations.vllm_deployment import deployment_for_weights, with_loaded_build
from moe_lowering.integrations.vllm_layers import compute_layer, read_layer
from moe_lowering.integrations.vllm_refusals import Refused
from moe_lowering.integrations.vllm_weights import SCHEMES
from moe_lowering.passes.policy import Policy
from moe_lowering.vocabulary import IMPLEMENTATION_FORMS

ONE_RANK = Deployment(soc="A3", max_tokens=256, guards="forbid", weight_format="nz")
METHODS = {scheme.quantisation: name for name, scheme in SCHEMES.items()}
QUANTISED = [word for word in METHODS if word != "none"]


def method(quantisation):
    """A method of vllm-ascend by the name of its class; a quantised layer's is within another one."""
    found = type(METHODS[quantisation], (), {})()
    return found if quantisation == "none" else SimpleNamespace(quant_method=found)


def quantised(quantisation, experts=EXPERTS, hidden=HIDDEN, width=WIDTH):
    """(the attributes of a layer, its weights in float64)."""
    torch.manual_seed(1)
    given, real = {"quant_method": method(quantisation)}, {}
    for name, shape in (("w13", (experts, hidden, 2 * width)), ("w2", (experts, width, hidden))):
        most = 127 if quantisation == "w8a8" else 7
        whole = torch.randint(-most, most + 1, shape)
        scale = torch.rand(experts, shape[2]).add(0.5).div(most * 4).to(torch.bfloat16).float()
        real[name] = whole.double() * scale.double().unsqueeze(1)
        if quantisation == "w8a8":
            given[f"{name}_weight"] = whole.to(torch.int8)
            given[f"{name}_weight_scale"] = scale.to(torch.bfloat16)
        else:
            given[f"{name}_weight"] = pack_int4(whole)
            given[f"{name}_weight_scale"] = scale.view(torch.int32).to(torch.int64)
            if name == "w2":  # vllm-ascend drops the axis of groups of w13's scales alone
                given["w2_weight_scale"] = given["w2_weight_scale"].unsqueeze(1)
            given[f"{name}_scale_bias"] = (8 * real[name].sum(1)).float()
    if quantisation == "w8a8":
        given["w13_weight_scale_fp32"] = given["w13_weight_scale"].float()
    return given, real


def quantised_layer(quantisation, **changes):
    given, real = quantised(quantisation, **changes)
    return SimpleNamespace(**{**vars(layer()), **moe(in_dtype=torch.bfloat16), **given}), real


@pytest.mark.parametrize("quantisation", QUANTISED)
def test_a_quantised_layer_computes_what_its_weights_say(quantisation):
    given, real = quantised_layer(quantisation)
    torch.manual_seed(0)
    x, logits = torch.randn(5, HIDDEN, dtype=torch.bfloat16), torch.randn(5, EXPERTS)
    form = read_layer(given, ONE_RANK)
    assert form.scheme.quantisation == quantisation
    expected = torch.zeros(5, HIDDEN, dtype=torch.float64)
    scores = torch.softmax(logits.double(), -1)
    for token in range(5):
        best = scores[token].topk(TOP_K)
        for weight, expert in zip(best.values / best.values.sum() * 2.5, best.indices, strict=True):
            gate, up = (x[token].double() @ real["w13"][expert]).chunk(2)
            expected[token] += weight * ((torch.nn.functional.silu(gate) * up) @ real["w2"][expert])
    noise = compute_layer(given, form, x, logits).double() - expected
    assert 10 * torch.log10(expected.square().sum() / noise.square().sum()) > 28
    given.w2_weight = given.w2_weight.flip(0)  # the twin: other weights are seen
    other = compute_layer(given, form, x, logits).double() - expected
    assert 10 * torch.log10(expected.square().sum() / other.square().sum()) < 10


@pytest.mark.parametrize("quantisation", QUANTISED)
def test_a_quantised_layer_is_judged_by_its_own_tensors(quantisation):
    given, _ = quantised(quantisation, hidden=512, width=512)
    attributes = {name: value for name, value in given.items() if name not in vars(layer())}
    base = {**{name: value for name, value in given.items() if name in vars(layer())}, **moe(in_dtype=torch.bfloat16)}

    def decide(**others):
        from moe_lowering.integrations.vllm_legality import require_lowered

        full = SimpleNamespace(**{**vars(layer()), **base, **attributes, **others})
        require_lowered(full, read_layer(full, ONE_RANK), Policy(), ONE_RANK, [(1, 256)])

    decide()
    with pytest.raises(Refused, match=r"^\[vllm.arguments\] .*w2_scale"):
        decide(w2_weight_scale=given["w2_weight_scale"][..., :-1])


def test_scales_of_groups_and_missing_tensors_are_refused():
    given, _ = quantised_layer("w4a8")
    read_layer(given, ONE_RANK)
    given.w13_weight_scale = given.w13_weight_scale.unsqueeze(1).repeat(1, 2, 1)
    with pytest.raises(Refused, match=r"^\[vllm.scale_groups\] the layer's w13_weight_scale is of shape \[8, 2, 8\]"):
        read_layer(given, ONE_RANK)
    del given.w13_weight_scale
    with pytest.raises(Refused, match=r"^\[vllm.weight_lists\] the layer's w13_weight_scale is not there; accepted"):
        read_layer(given, ONE_RANK)


@pytest.fixture
def ascend_config(monkeypatch):
    """``ascend_config(**settings)``: what vllm-ascend's configuration says of memory formats."""

    def use(enable_fused_mc2=0, weight_nz_mode=1):
        config = SimpleNamespace(enable_fused_mc2=enable_fused_mc2, weight_nz_mode=weight_nz_mode)
        found = SimpleNamespace(get_ascend_config=lambda: config)
        monkeypatch.setitem(sys.modules, "vllm_ascend.ascend_config", found)
        monkeypatch.setitem(sys.modules, "vllm_ascend", SimpleNamespace(ascend_config=found))

    return use


@pytest.mark.parametrize(
    ("quantisation", "settings", "dtype", "word"),
    [
        ("none", {}, torch.bfloat16, "nd"),
        ("none", {"weight_nz_mode": 2}, torch.bfloat16, "nz"),
        ("none", {"weight_nz_mode": 2}, torch.float32, "nd"),
        ("none", {"enable_fused_mc2": 1}, torch.bfloat16, "nz"),
        ("w8a8", {"weight_nz_mode": 0}, torch.bfloat16, "nz"),
        ("w4a8", {}, torch.bfloat16, "nz"),
        ("w4a8", {"weight_nz_mode": 0}, torch.bfloat16, "nd"),
    ],
)
def test_the_memory_format_follows_vllm_ascend(ascend_config, quantisation, settings, dtype, word):
    ascend_config(**settings)
    given = layer() if quantisation == "none" else quantised_layer(quantisation)[0]
    given.moe_config.in_dtype = dtype
    found = deployment_for_weights(Deployment(soc="A3", max_tokens=256), given)
    assert found.weight_format == word
    [source] = [each.source for each in found.detected if each.field == "weight_format"]
    assert source and deployment_for_weights(found, given) is found


def test_layers_of_two_memory_formats_are_not_lowered_together(ascend_config, monkeypatch):
    """One graph has one; the first layer that is taken over says which."""
    ascend_config()
    monkeypatch.setattr(vllm, "check_engine", lambda config: None)
    monkeypatch.setattr(vllm, "take_over", lambda layer, form: None)
    monkeypatch.setattr(vllm, "deployment_of", lambda config: Deployment(soc="A3", max_tokens=256, guards="forbid"))
    config = engine({})
    config.compilation_config.static_all_moe_layers = []
    first, second, third = (
        quantised_layer("w8a8", hidden=512, width=512)[0],
        layer(),
        quantised_layer("w8a8", hidden=64, width=64)[0],
    )
    for name, given in (("first", first), ("second", second), ("third", third)):
        given.vllm_config, given.layer_name = config, name
        vllm._decide(given)
    found = vllm.layers()
    vllm._begin(None)
    assert found["first"] == found["third"] == ""
    assert found["second"].startswith(
        "[vllm.weight_format] the memory format of the experts is nd; accepted: nz, as of"
    )


@pytest.mark.parametrize(("word", "build"), [("A3", "A3"), ("A2", "A2"), ("B9", "unknown")])
def test_the_build_is_that_of_the_module_which_is_imported(monkeypatch, word, build):
    """The simulator says of a wheel for A2 that it is for A3, and a process may have another build than the one on disk."""
    found = SimpleNamespace(__device_type__=word)
    monkeypatch.setitem(sys.modules, "vllm_ascend._build_info", found)
    monkeypatch.setitem(sys.modules, "vllm_ascend", SimpleNamespace(_build_info=found))
    others = ("cann_ops_transformer", "9.1.0", "")
    installed = (("vllm_ascend", "0.23.0", "A2"), others)
    deployment = with_loaded_build(Deployment(soc="A3", installed=installed))
    assert deployment.installed == (("vllm_ascend", "0.23.0", build), others)
    sources = [each.source for each in deployment.detected if each.field == "installed"]
    assert sources == ([] if build == "A2" else ["vllm_ascend._build_info, as imported"])


def test_mc2_and_fused_mc2_take_quantised_experts_on_ranks():
    """What vllm-ascend selects for W8A8 on two ranks is legal here too; unquantised in ND is not, for FusedMC2."""
    groups = {
        "ep_size": 2,
        "ep_group": "ep",
        "mc2_group": "mc2",
        "providers": (("vllm_ascend", "0.23.0"),),
        "installed": (),
    }
    deployment = Deployment(
        soc="A3", **groups, max_tokens=256, guards="forbid", weight_format="nz", hccl_buffer_mb=1024
    )
    given, _ = quantised("w8a8", experts=EXPERTS // 2, hidden=1024, width=256)
    given = SimpleNamespace(**{**vars(layer()), **moe(in_dtype=torch.bfloat16), **given})
    from moe_lowering.integrations.vllm_legality import require_lowered

    for comm in IMPLEMENTATION_FORMS:
        require_lowered(given, read_layer(given, deployment), Policy(comm), deployment, [(1, 256)])
    with pytest.raises(Refused, match=r"fused.weight_format"):
        require_lowered(
            given,
            read_layer(given, deployment),
            Policy("fused_mc2"),
            deployment.replace(weight_format="nd"),
            [(1, 256)],
        )
