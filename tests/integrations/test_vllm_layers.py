"""The plugin of vLLM, as far as it can be tried without vLLM: what it reads of a layer, its settings. The rest: vllm_tests/."""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch

from moe_lowering import Deployment
from moe_lowering.integrations import vllm
from moe_lowering.integrations.vllm_layers import compute_layer, read_layer
from moe_lowering.integrations.vllm_legality import require_lowered, token_ranges_of, unsplit_range
from moe_lowering.integrations.vllm_refusals import Refused
from moe_lowering.passes.policy import Policy
from moe_lowering.vocabulary import IMPLEMENTATION_FORMS

EXPERTS, HIDDEN, WIDTH, TOP_K = 8, 16, 4, 2


class AscendUnquantizedFusedMoEMethod:
    pass


class Other:
    pass


def moe(**changes):
    config = {
        "in_dtype": torch.float32,
        "has_bias": False,
        "is_sequence_parallel": False,
        "dp_size": 1,
        "pcp_size": 1,
        "tp_size": 1,
        **changes,
    }
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
        (moe(pcp_size=2), "context_parallel"),
        (moe(tp_size=2), "tensor_parallel"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes, code):
    with pytest.raises(Refused, match=rf"^\[vllm\.{code}\] .* is .*; accepted: "):
        read_layer(layer(**changes), Deployment())
    read_layer(layer(), Deployment())


def served(**changes):
    """Of vLLM's configuration: what says for which token counts it compiles."""
    given = {"get_compile_ranges": list, "compile_sizes": None, **changes}
    return SimpleNamespace(compilation_config=SimpleNamespace(**given))


def judge(policy, deployment, ranges=((1, 256),), **changes):
    dtype = changes.get("w13_weight", torch.empty(0)).dtype
    given = layer(**{**moe(in_dtype=dtype), **changes})
    require_lowered(given, read_layer(given, deployment), policy, deployment, list(ranges))


def on_ranks(tokens=8192):
    groups = {"ep_size": 2, "ep_group": "ep", "mc2_group": "mc2"}
    return Deployment(soc="A3", **groups, max_tokens=tokens, guards="forbid")


def weights(hidden, width, experts, dtype=torch.bfloat16):
    shapes = {"w13_weight": (experts, hidden, 2 * width), "w2_weight": (experts, width, hidden)}
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


def test_a_layer_that_the_pass_lowers_is_taken_over():
    judge(Policy("auto", "vllm_ascend_main"), Deployment(soc="A3", max_tokens=256, guards="forbid"))
    judge(Policy("mc2"), on_ranks(), [(1, 64), (32, 32)], **weights(1024, 64, EXPERTS // 2))


@pytest.mark.parametrize("comm", [name for name in IMPLEMENTATION_FORMS if name != "allgather"])
def test_a_layer_that_the_pass_would_leave_stays(comm):
    """On one rank nothing but AllGather is legal."""
    deployment = Deployment(soc="A3", max_tokens=256, guards="forbid")
    with pytest.raises(Refused, match=rf"^\[vllm.not_lowered\] .* 1 to 256 tokens .*{comm}: \[.*accepted: .*comm"):
        judge(Policy(comm), deployment)
    judge(Policy("allgather"), deployment)


@pytest.mark.parametrize("bad", [(1, 8192), (4096, 4096)])
def test_each_range_and_size_is_judged(bad):
    """MC2 ends at its capacity: a layer stays where one graph of several would not be lowered, and the range is named."""
    given = weights(1024, 64, EXPERTS // 2)
    judge(Policy("mc2"), on_ranks(), [(1, 64), (8, 8)], **given)
    with pytest.raises(Refused, match=rf"^\[vllm.not_lowered\] .* {bad[0]} to {bad[1]} tokens is none \(mc2 was asked"):
        judge(Policy("mc2"), on_ranks(), [(1, 64), bad, (8, 8)], **given)
    judge(Policy("auto"), on_ranks(), [(1, 64), bad, (8, 8)], **given)


def test_a_communicator_that_vllm_uses_is_none_for_mc2():
    """Said before the layer is taken over: in the graph it would be too late."""
    groups = {"ep_size": 2, "ep_group": "ep", "mc2_group": "tp", "tp_size": 2}
    shared = Deployment(soc="A3", **groups, tp_group="tp", max_tokens=64, guards="forbid")
    given = weights(1024, 64, EXPERTS // 2)
    with pytest.raises(Refused, match=r"^\[vllm.not_lowered\] .*mc2: \[mc2.shared_communicator\]"):
        judge(Policy("mc2"), shared, [(1, 64)], **given)
    judge(Policy("mc2"), shared.replace(mc2_group="mc2"), [(1, 64)], **given)


@pytest.mark.parametrize(
    ("policy", "changes", "ranges", "hints"),
    [
        ("vllm_ascend_main", {}, [(1, 256)], True),
        ("vllm_ascend_main", {}, [(1, 8), (9, 256)], False),
        ("vllm_ascend_main", {"mc2_capacity": 0}, [(1, 256)], False),
        ("vllm_ascend_main", {"ep_size": 1}, [(1, 256)], False),
        ("auto", {}, [(1, 256)], False),
    ],
)
def test_a_range_beyond_the_capacity_is_hinted_at(policy, changes, ranges, hints):
    deployment = on_ranks().replace(mc2_capacity=8).replace(**changes)
    hint = unsplit_range(Policy("auto", policy), deployment, ranges)
    assert bool(hint) == hints
    assert not hints or ("1 to 256 tokens" in hint and "'compile_ranges_endpoints': [8]" in hint)


def test_what_the_weights_say_is_judged():
    deployment, policy = Deployment(soc="A3", max_tokens=256, guards="forbid"), Policy()
    with pytest.raises(Refused, match=r"^\[vllm.arguments\] .*float64"):
        judge(policy, deployment, **weights(HIDDEN, WIDTH, EXPERTS, torch.float64))
    judge(policy, deployment, **weights(HIDDEN, WIDTH, EXPERTS))
    with pytest.raises(Refused, match=r"^\[vllm.uneven_experts\] the number of experts is 3 of 8 on one of 2 ranks"):
        judge(policy, on_ranks(), **weights(HIDDEN, WIDTH, 3))
    with pytest.raises(Refused, match=r"^\[vllm.compile_range\] a compile range is 300 to 400 tokens; accep"):
        judge(policy, deployment, [(300, 400)])


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ({"apply_router_weight_on_input": True, "top_k": 2}, {"apply_router_weight_on_input": True, "top_k": 1}),
        ({"num_expert_group": 3, "topk_group": 1}, {"num_expert_group": 4, "topk_group": 2}),
        ({"top_k": EXPERTS + 1}, {"top_k": EXPERTS}),
        ({"log2phy": torch.zeros(EXPERTS)}, {"log2phy": torch.arange(EXPERTS)}),
    ],
)
def test_what_would_fail_the_trace_stays(bad, good):
    deployment = Deployment(soc="A3", max_tokens=256, guards="forbid")
    with pytest.raises(Refused, match=r"^\[vllm.arguments\] "):
        judge(Policy(), deployment, **bad)
    judge(Policy(), deployment, **good)


def test_the_token_counts_of_a_configuration():
    class Range(SimpleNamespace):
        pass

    ends = [Range(start=1, end=512), Range(start=513, end=8192)]
    split = served(get_compile_ranges=lambda: ends, compile_sizes=[4])
    assert token_ranges_of(split, on_ranks()) == [(1, 512), (513, 8192), (4, 4)]
    assert token_ranges_of(served(), on_ranks()) == [(1, 8192)]


def engine(asked):
    """What is read of vLLM's configuration before a layer is taken over, with the plugin's settings."""
    return SimpleNamespace(additional_config={"moe_lowering": asked}, **vars(served()))


@pytest.fixture
def decide(monkeypatch):
    """``decide(vllm_config)``: what becomes of a layer on one rank in an engine whose graphs come by; ("", entry) if taken."""
    monkeypatch.setattr(vllm, "check_engine", lambda config: None)
    deployment = Deployment(soc="A3", max_tokens=256, guards="forbid")
    monkeypatch.setattr(vllm, "deployment_of", lambda config: deployment)
    monkeypatch.setattr(vllm, "deployment_for_weights", lambda deployment, layer: deployment)
    monkeypatch.setattr(vllm, "take_over", lambda layer, form: taken.append(layer))
    taken = []

    def run(config, name="mlp.experts"):
        config.compilation_config.static_all_moe_layers = ["mlp.experts"]
        given = layer()
        given.vllm_config, given.layer_name = config, name
        vllm._decide(given)
        return vllm.layers(), given in taken, config.compilation_config.static_all_moe_layers

    yield run
    vllm._begin(None)


def test_a_layer_that_is_not_lowered_keeps_its_operator(decide, caplog):
    assert decide(engine({})) == ({"mlp.experts": ""}, True, [])
    why, taken, opaque = decide(engine({"comm": "mc2"}))  # another engine in one process is decided anew
    assert not taken and opaque == ["mlp.experts"] and why["mlp.experts"].startswith("[vllm.not_lowered] ")
    assert "mlp.experts stays with vllm-ascend's operator: [vllm.not_lowered]" in caplog.text
    with pytest.raises(ValueError, match=r"strict.*mlp.experts: \[vllm.not_lowered\]"):
        decide(engine({"comm": "mc2", "strict": True}))


def test_a_deployment_that_is_not_known_takes_nothing_over(decide, monkeypatch):
    def fail(config):
        raise ValueError("Deployment: max_tokens is -1; accepted: more")

    monkeypatch.setattr(vllm, "deployment_of", fail)
    why, taken, _ = decide(engine({}))
    assert not taken and why == {"mlp.experts": "[vllm.deployment] Deployment: max_tokens is -1; accepted: more"}


def config(asked):
    return SimpleNamespace(additional_config=asked)


def test_settings():
    assert vllm.settings_of(config(None)) is None and vllm.settings_of(config({})) is None
    assert vllm.settings_of(config({"moe_lowering": {"enable": False}})) is None
    assert vllm.settings_of(config({"moe_lowering": {}})) == vllm.SETTINGS
    assert vllm.settings_of(config({"moe_lowering": {"policy": "auto"}}))["policy"] == "auto"
    # vllm-ascend's rule chooses by itself: with ``comm`` alone it is not the policy
    assert vllm.settings_of(config({"moe_lowering": {"comm": "mc2"}}))["policy"] == "auto"


@pytest.mark.parametrize(
    "asked",
    [
        True,
        {"polcy": "auto"},
        {"policy": "best"},
        {"strict": 1},
        {"enable": "yes"},
        {"comm": "mc3"},
        {"comm": "mc2", "policy": "vllm_ascend_main"},
        {"policy": "fixed"},
    ],
)
def test_wrong_settings(asked):
    with pytest.raises((ValueError, TypeError), match=r"additional_config\['moe_lowering'\].*accepted"):
        vllm.settings_of(config({"moe_lowering": asked}))


def test_registering_imports_nothing_of_vllm():
    vllm.register()
    vllm.register()
    assert "vllm" not in sys.modules and "vllm_ascend" not in sys.modules


def test_layers_are_watched_once_whoever_wrapped_their_method(monkeypatch):
    """vllm-ascend may decorate the method itself; a second engine of the process asks again."""
    decided, loaded = [], []

    def load(self, layer):
        loaded.append(layer)

    @functools.wraps(load)
    def decorated(self, layer):
        load(self, layer)

    module = SimpleNamespace(
        AscendUnquantizedFusedMoEMethod=type("Method", (), {"process_weights_after_loading": decorated})
    )
    monkeypatch.setattr(vllm, "_decide", decided.append)
    for _ in range(2):
        vllm._watch_layers(module)
    module.AscendUnquantizedFusedMoEMethod().process_weights_after_loading("layer")
    assert loaded == decided == ["layer"]
