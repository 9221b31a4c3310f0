"""Equal layers make one graph, and what an experts module computes is read anew when it changes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from moe_lowering import Deployment, MoE, MoeLowering, list_experts, lowering_backend, quantise_experts, shard_experts
from moe_lowering.integrations import transformers as integration

LAYERS, TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 10, 6, 64, 64, 4, 2  # more layers than dynamo's recompile limit of 8


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    integration.register()


def num_experts_of(family: str) -> list[nn.Module]:
    """Experts modules of as many equal layers, with weights of their own."""
    from transformers import GptOssConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K, "num_hidden_layers": 1}
    if family == "gpt_oss":
        config, kind = GptOssConfig(intermediate_size=INNER, num_local_experts=EXPERTS, **sizes), GptOssExperts
    else:
        config = Qwen3MoeConfig(moe_intermediate_size=INNER, num_experts=EXPERTS, **sizes)
        kind = Qwen3MoeExperts
    config._experts_implementation = "moe_lowering"
    torch.manual_seed(0)
    modules = [kind(config) for _ in range(LAYERS)]
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
    return modules


def inputs(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    weights, ids = torch.randn(tokens, EXPERTS, generator=generator).softmax(-1).topk(TOP_K)
    return torch.randn(tokens, HIDDEN, generator=generator), ids, weights


def compile_each(modules: list[nn.Module], dynamic: bool | None = None) -> MoeLowering:
    lowering = MoeLowering(Deployment())
    backend = lowering_backend(lowering)
    for module in modules:
        module.compile(backend=backend, fullgraph=True, dynamic=dynamic)
    return lowering


def prepare(modules: list[nn.Module], how: str) -> None:
    model = nn.ModuleList(modules)
    if how == "sharded":
        shard_experts(model, Deployment())
    elif how == "listed":
        list_experts(model)
    elif how != "as loaded":
        quantise_experts(model.bfloat16(), how)


CASES = [
    *[("qwen3_moe", how) for how in ("as loaded", "sharded", "listed", "w8a8", "w4a8", "w4a16")],
    ("gpt_oss", "as loaded"),
    ("gpt_oss", "sharded"),
]


@pytest.mark.parametrize(("family", "how"), CASES)
@pytest.mark.parametrize("dynamic", [None, True])
def test_equal_layers_make_one_graph(family: str, how: str, dynamic: bool | None):
    modules = num_experts_of(family)
    prepare(modules, how)
    x, ids, weights = inputs()
    x = x.bfloat16() if how.startswith("w") else x
    with torch.no_grad():
        expected = [module(x, ids, weights) for module in modules]
        lowering = compile_each(modules, dynamic)
        found = [module(x, ids, weights) for module in modules]
    assert [len(report.blocks) for report in lowering.reports] == [1]
    assert lowering.reports[0].fully_lowered or how == "w4a8"  # whose rules want larger layers
    for a, b in zip(found, expected, strict=True):
        noise = (a - b).float().norm() / b.float().norm()
        assert noise < (2e-2 if how.startswith("w") else 1e-5)  # 34 dB: rows are rounded to int8 at other places
    assert not torch.equal(expected[0], expected[1])  # layers differ in their weights


def test_a_layer_that_differs_makes_a_graph_of_its_own():
    """The twin: one layer with another activation, one with other flags of its deployment."""
    modules = num_experts_of("qwen3_moe")[:4]
    modules[1].act_fn = nn.GELU(approximate="tanh")
    modules[2].act_fn = nn.GELU()
    lowering = compile_each(modules)
    with torch.no_grad():
        for module in modules:
            module(*inputs())
    assert len(lowering.reports) == 3


def test_layers_of_a_model_are_compiled_one_by_one():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=HIDDEN,
            moe_intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            experts_implementation="moe_lowering",
        )
    ).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        lowering = compile_each(list(model.model.layers))
        found = model(input_ids=tokens, use_cache=False).logits
    assert [len(report.blocks) for report in lowering.reports] == [1]
    torch.testing.assert_close(found, expected)


def test_modules_of_this_package_make_one_graph():
    torch.manual_seed(0)
    modules = [MoE(HIDDEN, INNER, EXPERTS, TOP_K) for _ in range(LAYERS)]
    lowering = compile_each(modules)
    with torch.no_grad():
        for module in modules:
            module(inputs()[0])
    assert len(lowering.reports) == 1


# --- what changes -----------------------------------------------------------------------------------------------------


def gpt_oss_reference(module: nn.Module, x, ids, weights, limit: float, alpha: float) -> torch.Tensor:
    """gpt-oss's experts by their definition: gate and up alternate, both clamped, g * sigmoid(alpha g) * (u + 1). float64."""
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros(HIDDEN, dtype=torch.float64)
        for weight, e in zip(weights[t].double(), ids[t].tolist(), strict=True):
            both = x[t].double() @ module.gate_up_proj[e].double() + module.gate_up_proj_bias[e].double()
            gate, up = both[0::2].clamp(max=limit), both[1::2].clamp(-limit, limit)
            inner = gate * torch.sigmoid(alpha * gate) * (up + 1)
            row += weight * (inner @ module.down_proj[e].double() + module.down_proj_bias[e].double())
        rows.append(row)
    return torch.stack(rows).to(x.dtype)


def qwen_reference(module: nn.Module, x, ids, weights, gate_function) -> torch.Tensor:
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros(HIDDEN, dtype=torch.float64)
        for weight, e in zip(weights[t].double(), ids[t].tolist(), strict=True):
            gate, up = (module.gate_up_proj[e].double() @ x[t].double()).chunk(2)
            row += weight * (module.down_proj[e].double() @ (gate_function(gate) * up))
        rows.append(row)
    return torch.stack(rows).to(x.dtype)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("changed", ["limit", "alpha"])
def test_a_changed_number_makes_the_graph_anew(changed: str, dynamic: bool | None):
    module = num_experts_of("gpt_oss")[0]
    lowering = compile_each([module], dynamic)
    x, ids, weights = inputs()
    graphs, results = [], []
    for value in (1.25, 0.5, 0.5, 2.0):
        setattr(module, changed, value)
        with torch.no_grad():
            results.append(module(x, ids, weights))
            expected = gpt_oss_reference(module, x, ids, weights, module.limit, module.alpha)
        torch.testing.assert_close(results[-1], expected, rtol=1e-4, atol=1e-5)
        graphs.append(len(lowering.reports))
    assert graphs == [1, 2, 2, 3]
    assert not torch.allclose(results[0], results[1], rtol=1e-2)


def test_a_replaced_activation_makes_the_graph_anew():
    module = num_experts_of("qwen3_moe")[0]
    lowering = compile_each([module])
    x, ids, weights = inputs()
    gelu = torch.nn.functional.gelu
    for act, function, graphs in ((module.act_fn, silu, 1), (nn.GELU(), gelu, 2), (nn.SiLU(), silu, 3)):
        module.act_fn = act
        with torch.no_grad():
            found, expected = module(x, ids, weights), qwen_reference(module, x, ids, weights, function)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert len(lowering.reports) == graphs


def test_an_argument_of_an_activation_makes_the_graph_anew():
    module = num_experts_of("qwen3_moe")[0]
    module.act_fn = nn.GELU()
    lowering = compile_each([module])
    x, ids, weights = inputs()
    for approximate in ("none", "tanh"):
        module.act_fn.approximate = approximate
        with torch.no_grad():
            found = module(x, ids, weights)
            expected = qwen_reference(
                module, x, ids, weights, lambda gate, a=approximate: nn.functional.gelu(gate, approximate=a)
            )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(lowering.reports) == 2


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_replaced_gate_is_not_computed_as_the_old_one(where: str, monkeypatch):
    """It is a gate that nobody knows: transformers' own implementation computes it, and says so."""
    module = num_experts_of("qwen3_moe")[0]
    lowering = MoeLowering(Deployment())
    module.compile(backend=lowering_backend(lowering), fullgraph=True)
    x, ids, weights = inputs()

    def twice(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return 2 * silu(gate) * up

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = module(x, ids, weights)
        if where == "class":
            monkeypatch.setattr(type(module), "_apply_gate", twice)
        else:
            module._apply_gate = twice.__get__(module)
        torch.testing.assert_close(module(x, ids, weights), 2 * before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flag", ["has_gate", "is_concatenated", "_is_expert_parallel"])
def test_a_changed_flag_is_seen_by_old_graphs(flag: str):
    module = num_experts_of("qwen3_moe")[0]
    shard_experts(nn.ModuleList([module]), Deployment())
    module.moe_lowering_deployment = Deployment(ep_size=2, ep_group="g")  # then what is not known is an error
    torch.manual_seed(0)
    forms = []

    def form_backend(gm, example_inputs):
        forms.append(None)
        return gm.forward

    read = torch.compile(lambda: integration.form_of(module).unrecognised, backend=form_backend, fullgraph=True)
    assert read() == ""
    setattr(module, flag, not getattr(module, flag))
    assert read() != ""


def test_an_activation_that_was_changed_on_the_instance_is_not_guessed():
    changes = {
        "hook": lambda act: act.register_forward_hook(lambda module, args, result: 2 * result),
        "hook before": lambda act: act.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        "forward": lambda act: setattr(act, "forward", lambda x: 3 * x),
    }
    for module, change in zip(num_experts_of("qwen3_moe"), changes.values(), strict=False):
        assert integration.form_of(module).activation == "swiglu"
        module.act_fn = type(module.act_fn)()  # transformers may share one
        change(module.act_fn)
        assert "hooks or a forward of its own" in integration.form_of(module).unrecognised
