"""transformers' experts implementation ``moe_lowering`` against its ``grouped_mm``, on small random models."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import reference
import torch
from torch import nn

from moe_lowering import Deployment
from moe_lowering.integrations import transformers as integration
from moe_lowering.integrations.expert_gates import gate_fingerprint
from moe_lowering.layers import shard_experts

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "glm4_moe")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
# Largest max|a - b| / max|b| of an experts module's output. Measured: float32 4e-7, bfloat16 9e-3.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()
    integration.register()  # a second time changes nothing


def make(model_type: str, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    default = AutoConfig.for_model(model_type)
    sizes = {name: value for name, value in SIZES.items() if hasattr(default, name)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        type(default)(**{**sizes, **changes}),
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="grouped_mm",
    )
    return randomised(model.eval().requires_grad_(False))


def randomised(model: nn.Module) -> nn.Module:
    """Weights of scale 1/sqrt(inputs) and non-zero biases: many families start biases and routers at zero."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape)
        if tensor.dim() > 1 and not name.endswith("bias"):
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)
        elif name.endswith(("bias", "weight", "sinks")):
            tensor.add_((0.1 * noise).to(tensor.dtype))
    return model


def experts(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]


def inputs(module: nn.Module, tokens: int = 32) -> tuple[torch.Tensor, ...]:
    dtype = module.down_proj.dtype
    top_k, hidden = 2, SIZES["hidden_size"]
    ids = torch.rand(tokens, SIZES["num_experts"]).topk(top_k).indices
    return torch.randn(tokens, hidden).to(dtype), ids, torch.rand(tokens, top_k)


def outputs(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("grouped_mm", "moe_lowering"):
        module.config._experts_implementation = name
        found[name] = module(*arguments)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_agree_with_grouped_mm(family: str, dtype: torch.dtype):
    module = experts(make(family, dtype))[0]
    arguments = inputs(module)
    found = outputs(module, arguments)
    assert found["moe_lowering"].dtype == found["grouped_mm"].dtype
    assert reference.relative_error(found["moe_lowering"], found["grouped_mm"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_broken_variant_is_seen(family: str):
    """The twin of the test above: gate and up exchanged, and biases dropped, exceed even bfloat16's tolerance."""
    module = experts(make(family))[0]
    arguments = inputs(module)
    expected = outputs(module, arguments)["grouped_mm"]
    broken = [lambda m: m.gate_up_proj.copy_(m.gate_up_proj.flip(-1 if m.is_transposed else -2))]
    if module.has_bias:
        broken += [lambda m: m.gate_up_proj_bias.zero_(), lambda m: m.down_proj_bias.zero_()]
    for change in broken:
        kept = {name: value.clone() for name, value in module.state_dict().items()}
        change(module)
        assert reference.relative_error(module(*arguments), expected) > TOLERANCE[torch.bfloat16]
        module.load_state_dict(kept)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_models_compile_whole(family: str, dynamic: bool):
    """fullgraph, one backend call for several lengths when dynamic, and constants stay constants of the operators."""
    torch._dynamo.reset()
    model = make(family)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    lengths = (16, 24) if dynamic else (16,)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in lengths:
        ids = torch.randint(1, 128, (2, length))
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        model.set_experts_implementation("grouped_mm")
        expected = model(**call).logits
        model.set_experts_implementation("moe_lowering")
        with torch._dynamo.config.patch(specialize_float=True):
            assert reference.relative_error(compiled(**call).logits, expected) < TOLERANCE[torch.float32]
    assert len(graphs) == 1
    nodes = graphs[0].graph.find_nodes(op="call_function", target=torch.ops.moe_lowering.grouped_mlp.default)
    assert len(nodes) == len(experts(model))
    assert all(type(node.args[i]) is float for node in nodes for i in (8, 9))


def test_limit_and_alpha_stay_constants_without_specialize_float():
    torch._dynamo.reset()
    model = make("gpt_oss")
    model.set_experts_implementation("moe_lowering")
    graphs = []
    compiled = torch.compile(
        model, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    ids = torch.randint(1, 128, (2, 16))
    compiled(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    nodes = graphs[-1].graph.find_nodes(op="call_function", target=torch.ops.moe_lowering.grouped_mlp.default)
    assert [node.args[8:11] for node in nodes] == [(7.0, 1.702, True)] * 2


@pytest.mark.parametrize("ep_rank", [0, 1])
def test_sharded_modules_hold_their_experts_and_the_global_count(ep_rank: int):
    """The generic operators run in one process here only with one rank, so the trace is looked at, not run."""
    model = make("gpt_oss")
    whole = experts(model)[0].gate_up_proj.clone()
    deployment = Deployment(ep_size=2, ep_rank=ep_rank, ep_group="0", max_tokens=64)
    shard_experts(model, deployment)
    module = experts(model)[0]
    torch.testing.assert_close(module.gate_up_proj, whole[4 * ep_rank : 4 * ep_rank + 4])
    module.config._experts_implementation = "moe_lowering"
    arguments, graphs = inputs(module), []

    def backend(graph, example_inputs):
        graphs.append(graph.graph)
        return lambda *unused: (torch.empty_like(arguments[0]),)

    torch._dynamo.reset()
    torch.compile(module, fullgraph=True, backend=backend)(*arguments)
    (node,) = graphs[0].find_nodes(op="call_function", target=torch.ops.moe_lowering.dispatch.default)
    assert node.args[4:7] == (8, "0", 2)  # num_experts, ep_group, ep_size


OWN_GATES = {
    "gpt_oss": ("GptOssExperts", ("swiglu_oai", 7.0, 1.702, True)),
    "openai_privacy_filter": ("OpenAIPrivacyFilterExperts", ("swiglu_oai", 7.0, 1.702, False)),
    "minimax_m3_vl": ("MiniMaxM3VLExperts", ("swiglu_oai", 7.0, 1.702, False)),
    "deepseek_v4": ("DeepseekV4Experts", ("swiglu_clamp", 7.0, 1.702, False)),
    "hy_v4": ("HYV4Experts", ("swiglu_clamp", 7.0, 1.702, False)),
    "glm5_next": ("Glm5NextTextExperts", ("swiglu_clamp", 7.0, 1.702, False)),
    "beam": ("BeamExperts", ("swiglu", 0.0, 1.702, False)),
}


def bare(model_type: str, class_name: str, act_fn: nn.Module | None = None) -> nn.Module:
    """An experts module of a family, with attributes set by hand: no config of the family is needed."""
    from importlib import import_module

    modeling = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    cls = getattr(modeling, class_name)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    transposed = model_type in ("gpt_oss", "openai_privacy_filter")
    sizes = [(8, 64, 64), (8, 32, 64)] if transposed else [(8, 64, 64), (8, 64, 32)]
    flags = {
        "has_gate": True, "has_post_expert_norm": False, "is_transposed": transposed, "has_bias": transposed,
        "is_concatenated": model_type != "gpt_oss", "_is_expert_parallel": False, "num_experts": 8,
        "limit": 7.0, "swiglu_limit": 7.0, "alpha": 1.702, "swiglu_alpha": 1.702, "act_fn": act_fn or nn.SiLU(),
        "config": SimpleNamespace(_experts_implementation="grouped_mm"),
        "gate_up_proj": nn.Parameter(5 * torch.randn(sizes[0])), "down_proj": nn.Parameter(torch.randn(sizes[1])),
        "gate_up_proj_bias": nn.Parameter(torch.randn(8, 64)), "down_proj_bias": nn.Parameter(torch.randn(8, 64)),
    }  # fmt: skip
    for name, value in flags.items():
        setattr(module, name, value)
    return module.requires_grad_(False)


@pytest.mark.parametrize("family", OWN_GATES)
def test_known_gates_of_their_own_are_recognised_and_agree(family: str):
    """Weights are large enough here for the clamps to act."""
    class_name, form = OWN_GATES[family]
    module = bare(family, class_name)
    assert tuple(integration._read_form(module)) == (*form, "")
    found = outputs(module, inputs(module))
    assert reference.relative_error(found["moe_lowering"], found["grouped_mm"]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "gelu_new", "silu", "swish"])
def test_known_activations_agree(name: str):
    from transformers.activations import ACT2FN

    module = bare("mixtral", "MixtralExperts", ACT2FN[name])
    found = outputs(module, inputs(module))
    assert not integration._read_form(module).unrecognised
    assert reference.relative_error(found["moe_lowering"], found["grouped_mm"]) < TOLERANCE[torch.float32]


def unknown_gate(module: nn.Module) -> None:
    class Experts(type(module)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate.clamp(max=1.0)) * up

    module.__class__ = Experts


UNRECOGNISED = {
    "_apply_gate of its own": unknown_gate,
    "replaced on the instance": lambda m: vars(m).update(_apply_gate=lambda x: x.chunk(2, -1)[0]),
    "activation is ReLU": lambda m: setattr(m, "act_fn", nn.ReLU()),
    "activation is QuickGELU": lambda m: setattr(m, "act_fn", _activation("quick_gelu")),
    "is_concatenated=False": lambda m: setattr(m, "is_concatenated", False),
}


def _activation(name: str) -> nn.Module:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


@pytest.mark.parametrize("reason", UNRECOGNISED)
def test_an_unrecognised_form_falls_back_with_one_warning(reason: str):
    integration._warned.clear()
    module = bare("mixtral", "MixtralExperts")
    UNRECOGNISED[reason](module)
    arguments = inputs(module)
    module.config._experts_implementation = "moe_lowering"
    with pytest.warns(UserWarning, match=f"{type(module).__name__} is not supported: .*{reason}"):
        actual = module(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*arguments)
    module.config._experts_implementation = "grouped_mm"
    assert torch.equal(actual, module(*arguments))


def test_an_unrecognised_form_warns_from_inside_a_compile():
    torch._dynamo.reset()
    integration._warned.clear()
    module = bare("mixtral", "MixtralExperts", nn.ReLU())
    module.config._experts_implementation = "moe_lowering"
    with pytest.warns(UserWarning, match="MixtralExperts is not supported"):
        torch.compile(module, fullgraph=True, backend="eager")(*inputs(module))


def test_flags_that_change_the_meaning_are_not_recognised():
    module = bare("mixtral", "MixtralExperts")
    assert not integration._read_form(module).unrecognised
    module._is_expert_parallel = True
    assert integration._read_form(module).unrecognised


def test_an_unrecognised_form_with_sharded_experts_raises():
    module = bare("mixtral", "MixtralExperts", nn.ReLU())
    module.moe_lowering_deployment = Deployment(ep_size=2, ep_group="0", max_tokens=64)
    module.config._experts_implementation = "moe_lowering"
    with pytest.raises(NotImplementedError, match="MixtralExperts is not supported"):
        module(*inputs(module))


def test_capabilities_name_every_experts_module():
    model = make("qwen3_moe")
    experts(model)[1].act_fn = nn.ReLU()
    assert integration.capabilities(model) == [
        ("model.layers.0.mlp.experts", True, "swiglu"),
        ("model.layers.1.mlp.experts", False, "its activation is ReLU, not SiLU or GELU"),
    ]


def test_capabilities_list_models_without_the_interface():
    class LegacyExperts(nn.Module):
        pass

    model = nn.Sequential(LegacyExperts())
    assert [(name, ok) for name, ok, _ in integration.capabilities(model)] == [("0", False)]


def test_fingerprints_ignore_comments_and_docstrings_but_not_code():
    def one(self, x):
        """A docstring."""
        return x.clamp(max=self.limit)  # a comment

    def same(self, x):
        return x.clamp(
            max=self.limit,
        )

    def other(self, x):
        return x.clamp(min=self.limit)

    assert gate_fingerprint(one) == gate_fingerprint(same)
    assert gate_fingerprint(one) != gate_fingerprint(other)
    assert gate_fingerprint(len) == ""
