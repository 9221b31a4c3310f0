"""MoE layers that the pass cannot lower are told, with the line and what to do; what only looks alike is not."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_layers import FOREIGN, ROUTER, W2, W13, X, routed
from layers_without_moe import NO_MOE
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

import moe_lowering
from moe_lowering import Deployment, MoeLowering, simulator, testing
from moe_lowering.backends.aot import lowering_backend
from moe_lowering.passes.leftovers import find_foreign, foreign_operators
from moe_lowering.passes.pipeline import LoweringError
from moe_lowering.report.text import render

simulator.enable()  # operators of torch_npu are listed when tests are collected


def lower(function, *args, **options):
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        return testing.lower_graph(function, *args, deployment=Deployment(), **options)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FOREIGN)
def test_a_form_is_told(form, dynamic):
    code, function, args = FOREIGN[form]
    lowered = lower(function, *args, dynamic=dynamic, lowering=MoeLowering(Deployment(), raise_foreign="off"))
    (layer,) = lowered.report.foreign
    assert layer.code == code and layer.operators and "foreign_layers.py:" in layer.line
    assert not lowered.report.fully_lowered
    assert code in render(lowered.report) and "moe_lowering.moe_experts" in layer.advice
    assert re.fullmatch(r"\w+ \([\w.]+(\[\d+\])?\)", layer.place), "a function has no module: the node and its operator"
    with pytest.raises(AssertionError, match=re.escape(code)):
        testing.assert_lowered(lowered)
    testing.assert_refused(lowered, code=code)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NO_MOE)
def test_what_looks_alike_is_not_told(name, dynamic):
    function, args = NO_MOE[name]
    lowered = lower(function, *args, dynamic=dynamic, strict=True)
    assert lowered.report.foreign == () and lowered.report.fully_lowered


def test_strict_raises_with_place_line_and_advice():
    _, function, args = FOREIGN["grouped"]
    with pytest.raises(
        LoweringError, match=r"\[foreign.grouped_mm\].*2 x aten._grouped_mm.*at .*foreign_layers.py:\d+"
    ):
        lower(function, *args, strict=True)


# ---------------------------------------------------------------------------------------------------------- transformers


def qwen(layers=2):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


def compile_model(model, strict=False, fullgraph=True, **options):
    lowering = MoeLowering(Deployment(), strict=strict, **options)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lowering_backend(lowering), fullgraph=fullgraph)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        compiled(torch.arange(8).reshape(1, 8), use_cache=False)
    return lowering.reports


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_every_layer_of_a_model_with_its_own_experts_is_told(implementation):
    model = qwen()
    model.set_experts_implementation(implementation)
    (report,) = compile_model(model, raise_foreign="off")
    assert [layer.place for layer in report.foreign] == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    assert all("set_experts_implementation" in layer.advice for layer in report.foreign)
    ((where, _),) = report.unlowered  # equal layers are one line, whatever their number
    assert where == "model.layers.{0-1}.mlp.experts"


def test_a_loop_that_breaks_the_graph_is_told():
    model = qwen(1)
    model.set_experts_implementation("eager")
    found = [layer for report in compile_model(model, fullgraph=False) for layer in report.foreign]
    assert [layer.code for layer in found] == [
        "foreign.routing_alone"
    ] * 2  # ids leave one graph, their matrix the next
    assert [dict(layer.operators) for layer in found] == [{"aten.topk": 1}, {"aten.eq": 1}]


def loops() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """How models ask which experts have tokens, at which dynamo ends the graph."""

    def by_expert(x):
        weights, ids = routed(x)
        y = torch.zeros_like(x)
        for e in range(ids.unique().numel()):
            token, slot = torch.where(ids == e)
            y = y.index_add(0, token, (x[token] @ W13[e][:, :32]) * weights[token, slot, None])
        return y

    def by_counts(x):
        weights, ids = routed(x)
        order, counts = ids.view(-1).argsort(), torch.bincount(ids.view(-1), minlength=len(W13)).tolist()
        rows = torch.cat([rows @ w[:, :32] for rows, w in zip(x[order // 2].split(counts), W13, strict=True)])
        return torch.zeros_like(x).index_add(0, order // 2, rows * weights.view(-1)[order, None])

    def by_order(x):
        weights, ids = routed(x)
        ordered, order = ids.view(-1).sort()
        ends = torch.searchsorted(ordered, torch.arange(len(W13) + 1)).tolist()
        parts = [x[order[a:b] // 2] @ w[:, :32] for a, b, w in zip(ends, ends[1:], W13, strict=False)]
        return torch.zeros_like(x).index_add(0, order // 2, torch.cat(parts) * weights.view(-1)[order, None])

    class MoeGate(torch.nn.Module):  # which normalises nothing
        def forward(self, x):
            return (x @ ROUTER.t()).sigmoid().topk(1)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = MoeGate()

        def forward(self, x):
            weights, ids = self.gate(x)
            return x @ W13[ids[0].item()][:, :32] * weights

    return {"where": by_expert, "counts": by_counts, "order": by_order, "named": Layer()}


@pytest.mark.parametrize("loop", ["where", "counts", "order", "named"])
def test_ids_that_leave_a_graph_which_breaks_are_told(loop):
    found = [layer for report in compile_function(loops()[loop], X) for layer in report.foreign]
    assert [layer.code for layer in found] == ["foreign.routing_alone"], found


@pytest.mark.parametrize("classes", [8, 2000])
def test_the_best_classes_are_no_experts(classes):
    """A classifier's best five; and of so many words a sampler's, normalised."""
    head = torch.randn(classes, 32)

    def best(x):
        values, ids = (x @ head.t()).softmax(-1).topk(5)
        return (values / values.sum(-1, keepdim=True) if classes == 2000 else values), ids

    assert [layer for report in compile_function(best, X) for layer in report.foreign] == []


def compile_function(function, *args):
    lowering = MoeLowering(Deployment())
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=lowering_backend(lowering))(*args)
    return lowering.reports


def test_the_same_model_with_our_experts_is_lowered():
    from moe_lowering.integrations import transformers as integration

    integration.register()
    model = qwen(1)
    model.set_experts_implementation("moe_lowering")
    (report,) = compile_model(model, strict=True)
    assert report.foreign == () and report.fully_lowered and len(report.blocks) == 1


def test_a_dense_model_passes_strict():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    (report,) = compile_model(LlamaForCausalLM(config).eval(), strict=True)
    assert report.blocks == () and report.fully_lowered


# ------------------------------------------------------------------------------------------------------ Ascend operators


def chain(x):
    """A hand-written chain for one rank, and after it the router that it takes its ids from."""
    weights, ids = routed(x)
    rows, index, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x, ids.int(), active_num=ids.numel(), expert_num=8, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[0, 8],
    )  # fmt: skip
    grouped = {"group_list": counts, "split_item": 3, "group_type": 0, "group_list_type": 1}
    h = torch.ops.npu.npu_swiglu(torch.ops.npu.npu_grouped_matmul([rows], [W13], **grouped)[0])
    y = torch.ops.npu.npu_grouped_matmul([h], [W2], **grouped)[0]
    return torch.ops.npu.npu_moe_token_unpermute(y, index.abs(), weights)


def test_a_hand_written_chain_is_one_layer():
    (layer,) = lower(chain, X, lowering=MoeLowering(Deployment(), raise_foreign="off")).report.foreign
    assert layer.code == "foreign.npu_operator"
    assert dict(layer.operators)["npu.npu_grouped_matmul"] == 2 and len(layer.operators) == 3


def gate(x, experts):
    weights, ids, _ = torch.ops.npu.npu_moe_gating_top_k(x @ ROUTER.t(), 2)
    return experts(x, weights, ids)


def generic(x, weights, ids):
    return moe_lowering.moe_experts(x, weights, ids, W13, W2, num_experts=8)


def test_a_router_is_told_only_where_its_experts_are_unknown():
    assert lower(gate, X, generic, strict=True).report.fully_lowered
    (layer,) = lower(gate, X, lambda x, weights, ids: (weights, ids)).report.foreign
    assert layer.code == "foreign.router"


@pytest.mark.parametrize("tokens", [None, [2, 2, 2]], ids=["dense", "experts"])
def test_npu_ffn_is_told_where_it_has_experts(tokens):
    node = torch.fx.Graph().call_function(
        torch.ops.npu.npu_ffn.default, (None, None, None, "gelu"), {} if tokens is None else {"expert_tokens": tokens}
    )
    assert foreign_operators.is_used_for_experts(node) is (tokens is not None)


LOOKS_LIKE = re.compile(
    r"moe|expert|grouped_mat|grouped_mm|ffn|routing|gating|mega|swiglu_group|group_quant|group_norm_s"
)


def registered():
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    return sorted(name for name in names if name.startswith("npu::") and LOOKS_LIKE.search(name))


@pytest.mark.parametrize("name", registered())
def test_every_operator_of_torch_npu_is_classified(name):
    """A new one that looks like MoE is taken for it, or has a reason in the table."""
    packet = getattr(torch.ops.npu, name.removeprefix("npu::"))
    kind = foreign_operators.kind_of(getattr(packet, packet.overloads()[0]))
    assert (kind is None) == (name.removeprefix("npu::") in foreign_operators.NOT_MOE)


@pytest.fixture(scope="module")
def operators():
    """Operators of other packages, and one of a torch_npu that is yet to come, by schema alone."""
    with (
        torch.library._scoped_library("vllm", "FRAGMENT") as vllm,
        torch.library._scoped_library("npu", "FRAGMENT") as npu,
        torch.library._scoped_library("_C_ascend", "FRAGMENT") as ascend,
    ):
        for library, names in (
            (vllm, ("moe_forward", "moe_forward_shared", "outplace_fused_experts", "unified_attention")),
            (npu, ("npu_moe_of_tomorrow_v9", "npu_attention_of_tomorrow")),
            (ascend, ("dispatch_ffn_combine", "mega_moe", "dispatch_gmm_combine_decode", "rotary")),
        ):
            for name in names:
                library.define(f"{name}(Tensor x) -> Tensor")
        yield


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vllm.moe_forward", foreign_operators.OPAQUE),
        ("vllm.moe_forward_shared", foreign_operators.OPAQUE),
        ("vllm.outplace_fused_experts", foreign_operators.OPAQUE),
        ("vllm.unified_attention", None),
        ("npu.npu_moe_of_tomorrow_v9", foreign_operators.TORCH_NPU),
        ("npu.npu_attention_of_tomorrow", None),
        ("_C_ascend.dispatch_ffn_combine", foreign_operators.TORCH_NPU),
        ("_C_ascend.dispatch_gmm_combine_decode", foreign_operators.TORCH_NPU),
        ("_C_ascend.mega_moe", foreign_operators.TORCH_NPU),
        ("_C_ascend.rotary", None),
    ],
)
def test_operators_of_others_are_known_by_their_words(operators, name, kind):
    namespace, _, operator = name.partition(".")
    target = getattr(getattr(torch.ops, namespace), operator).default
    graph = torch.fx.Graph()
    graph.output(graph.call_function(target, (graph.placeholder("x"),)))
    found = find_foreign.find_foreign(graph)  # without fake values
    assert [layer.code for layer in found] == ([] if kind is None else [f"foreign.{kind}"])


# ------------------------------------------------------------------------------------------------------ the pass's own


class Layer(torch.nn.Module):
    def forward(self, x):
        return generic(x, *routed(x))


def test_what_the_pass_emitted_is_not_told():
    lowered = lower(Layer(), X)
    assert lowered.report.fully_lowered and "npu.npu_grouped_matmul" in lowered.ops_after
    again = MoeLowering(Deployment(), strict=True)
    again(lowered.gm)
    assert again.reports[-1].fully_lowered and again.reports[-1].blocks == ()
    for node in lowered.gm.graph.nodes:
        node.meta.pop("custom", None)
    assert find_foreign.find_foreign(lowered.gm.graph)  # the marks are what tells them apart


def test_a_failed_search_is_not_success(monkeypatch):
    monkeypatch.setattr("moe_lowering.passes.run.foreign.find_foreign", lambda graph: 1 / 0)
    report = lower(NO_MOE["dense MLP"][0], X).report
    assert not report.fully_lowered and report.foreign[0].code == "foreign.not_looked"


# ------------------------------------------------------------------------------------------------- graphs without values


def test_a_graph_without_fake_values_is_told():
    gm = make_fx(FOREIGN["grouped"][1])(X)
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    lowering = MoeLowering(Deployment())
    lowering(gm)
    assert [layer.code for layer in lowering.reports[0].foreign] == ["foreign.grouped_mm"]


def test_generic_operators_that_were_not_traced_are_told():
    gm = symbolic_trace(lambda x: torch.ops.moe_lowering.route(x, None, 2))
    lowering = MoeLowering(Deployment())
    lowering(gm)
    assert [layer.code for layer in lowering.reports[0].foreign] == ["foreign.not_traced"]


def test_codes_are_documented():
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    assert all(f"`{code}`" in text for code in (*find_foreign.FORMS, "foreign.not_looked"))
    assert {code for code, _, _ in FOREIGN.values()} < set(find_foreign.FORMS)
