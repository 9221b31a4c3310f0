"""Lowered graphs on one rank: numbers against the dense float64 reference, through the plain backend and npugraph_ex."""

import pytest
import reference
import torch

from moe_lowering import (
    Deployment,
    LoweringError,
    MoE,
    MoeLowering,
    lowering_backend,
    moe_experts,
    npugraph_ex_options,
    route,
)
from moe_lowering.vocabulary import ACTIVATIONS as VOCABULARY

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 48, 6, 2


class Experts(torch.nn.Module):
    """``moe_experts`` with its own weights, given routing."""

    def __init__(self, dtype=torch.float32, bias=False, as_list=False, experts=EXPERTS, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape):
            data = torch.randn(*shape, generator=generator) / shape[-2] ** 0.5
            return torch.nn.Parameter(data.to(dtype), requires_grad=False)

        width = VOCABULARY[options.get("activation", "swiglu")].parts * INTERMEDIATE
        self.w13, self.w2 = parameter(experts, HIDDEN, width), parameter(experts, INTERMEDIATE, HIDDEN)
        self.w13_bias = parameter(experts, width) if bias else None
        self.w2_bias = parameter(experts, HIDDEN) if bias else None
        self.as_list, self.options = as_list, options

    def tensors(self):
        form = (lambda t: None if t is None else list(t.unbind())) if self.as_list else (lambda t: t)
        return tuple(form(t) for t in (self.w13, self.w2, self.w13_bias, self.w2_bias))

    def forward(self, x, weights, ids, mask=None):
        w13, w2, w13_bias, w2_bias = self.tensors()
        return moe_experts(x, weights, ids, w13, w2, w13_bias=w13_bias, w2_bias=w2_bias, mask=mask, **self.options)

    def expected(self, x, weights, ids, mask=None):
        return reference.moe(
            x, weights, ids, self.w13, self.w2, w13_bias=self.w13_bias, w2_bias=self.w2_bias, mask=mask, **self.options
        )


def routed(*lead, dtype=torch.float32, experts=EXPERTS, top_k=TOP_K, skew=False):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(*lead, experts, generator=generator)
    if skew:
        logits[..., 0] += 5  # nearly everything to expert 0, and nothing to the last
        logits[..., -1] -= 50
    weights, ids = route(logits, top_k)
    return torch.randn(*lead, HIDDEN, generator=generator).to(dtype), weights, ids


def compile_plain(module, lowering, **options):
    torch._dynamo.reset()
    return torch.compile(module, backend=lowering_backend(lowering), fullgraph=True, **options)


def compile_npugraph(module, lowering, **options):
    torch._dynamo.reset()
    backend_options = npugraph_ex_options(lowering.deployment, lowering=lowering, force_eager=True)
    return torch.compile(module, backend="npugraph_ex", fullgraph=True, options=backend_options, **options)


def run(module, *args, compiler=compile_plain, **options):
    lowering = MoeLowering(Deployment(), "allgather", strict=True)
    with torch.no_grad():
        y = compiler(module, lowering, **options)(*args)
    assert lowering.reports[-1].blocks, "no block was lowered"
    return y


ACTIVATIONS = [
    {"activation": "swiglu"},
    {"activation": "swiglu", "interleaved": True},
    {"activation": "swiglu_clamp", "limit": 0.7},
    {"activation": "swiglu_clamp", "limit": 0.7, "interleaved": True},
    {"activation": "swiglu_oai", "limit": 0.7, "alpha": 1.5},
    {"activation": "swiglu_oai", "limit": 0.7, "alpha": 1.5, "interleaved": True},
    {"activation": "gelu"},
    {"activation": "gelu_tanh"},
    {"activation": "swiglu_softcap", "limit": 0.7, "alpha": 0.9},
    {"activation": "swiglu_clamp_after", "limit": 0.3},
    {"activation": "relu"},
    {"activation": "relu2"},
    {"activation": "silu"},
    {"activation": "gelu_ungated"},
    {"activation": "gelu_tanh_ungated"},
]


@pytest.mark.parametrize("options", ACTIVATIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_activations_and_biases(options, dtype, bias):
    module = Experts(dtype, bias, **options)
    args = routed(11, dtype=dtype)
    reference.assert_near(run(module, *args), module.expected(*args), dtype)


@pytest.mark.parametrize("as_list", [False, True], ids=["stacked", "list"])
@pytest.mark.parametrize("lead", [(0,), (1,), (13,), (2, 5), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("skew", [False, True], ids=["even", "skewed"])
def test_shapes(as_list, lead, skew):
    module = Experts(as_list=as_list, bias=True)
    args = routed(*lead, skew=skew)
    reference.assert_near(run(module, *args), module.expected(*args), torch.float32)


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0], ids=["none", "some", "all"])
def test_masked_tokens_get_zero_rows_and_load_no_expert(keep):
    module = Experts()
    x, weights, ids = routed(17)
    mask = torch.rand(17, generator=torch.Generator().manual_seed(2)) < keep
    x[~mask] = float("nan")  # what a masked token holds must not reach anything
    y = run(module, x, weights, ids, mask)
    assert (y[~mask] == 0).all()
    reference.assert_near(y, module.expected(x, weights, ids, mask), torch.float32)


@pytest.mark.parametrize("compiler", [compile_plain, compile_npugraph])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dynamic_sizes_share_one_graph(compiler, dtype):
    module = Experts(dtype)
    lowering = MoeLowering(Deployment(), "allgather", strict=True)
    compiled = compiler(module, lowering, dynamic=True)
    for tokens in (7, 32, 19):
        args = routed(tokens, dtype=dtype)
        with torch.no_grad():
            reference.assert_near(compiled(*args), module.expected(*args), dtype)
    assert len(lowering.reports) == 1


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("routing", [
    {},
    {"renormalize": False, "scale": 1.5},
    {"scoring": "sigmoid", "selection_bias": True, "num_groups": 2, "topk_groups": 1, "scale": 2.5},
    {"scoring": "sigmoid", "renormalize": False},
    {"scoring": "sqrtsoftplus", "num_groups": 2, "topk_groups": 1, "group_score": "max", "renormalize": False, "scale": 3.0},
    {"scoring": "softmax", "num_groups": 3, "topk_groups": 2},
], ids=lambda r: r.get("scoring", "softmax") + str(len(r)))  # fmt: skip
def test_whole_layer_through_npugraph_ex(routing, dynamic):
    layer = MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, **routing)
    generator = torch.Generator().manual_seed(3)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data = (torch.randn(tensor.shape, generator=generator) / 8).to(tensor.dtype)
    x = torch.randn(9, HIDDEN, generator=generator)
    options = {
        "renormalize": True,
        "scale": 1.0,
        "num_groups": 1,
        "topk_groups": 1,
        "group_score": "top2_sum",
        **routing,
    }
    options.pop("selection_bias", None)
    scoring = options.pop("scoring", "softmax")
    weights, ids = reference.route(
        x @ layer.gate.weight.T, layer.selection_bias, TOP_K, scoring, options["renormalize"], options["num_groups"],
        options["topk_groups"], options["group_score"], options["scale"],
    )  # fmt: skip
    expected = reference.moe(x, weights, ids, layer.w13, layer.w2)
    y = run(layer, x, compiler=compile_npugraph, dynamic=dynamic)
    reference.assert_near(y, expected, torch.float32)


def test_routing_goes_to_the_gating_operator_where_it_is_legal_and_to_aten_where_not():
    from moe_lowering import testing

    def lowered(**routing):
        layer = MoE(HIDDEN, INTERMEDIATE, 32, TOP_K, **routing)
        return testing.lower_graph(layer, torch.randn(4, HIDDEN), deployment=Deployment())

    assert "npu.npu_moe_gating_top_k" in lowered().ops_after
    assert "npu.npu_moe_gating_top_k" in lowered(scoring="sigmoid").ops_after
    for refused in ({"scoring": "sigmoid", "renormalize": False}, {"scoring": "sqrtsoftplus"},
                    {"num_groups": 16, "topk_groups": 2}):  # fmt: skip
        operators = lowered(**refused).ops_after
        assert "npu.npu_moe_gating_top_k" not in operators
        assert "aten.sort" in operators


def test_counts_for_load_balancing_survive():
    """Counts that something else reads are the lowered graph's counts."""
    ops = torch.ops.moe_lowering
    module = Experts()
    x, weights, ids = routed(10)

    def with_counts(x, weights, ids):
        rows, scale, counts, handle = ops.dispatch(x, None, ids, None, EXPERTS, "", 1, "", 1, 0, 0)
        y = ops.grouped_mlp(rows, scale, counts, [module.w13], [module.w2], [], [], "swiglu", 0.0, 1.702, False)
        return ops.combine(y, weights, ids, handle, None, EXPERTS, "", 1, "", 1, 0), counts

    lowering = MoeLowering(Deployment(), "allgather", strict=True)
    with torch.no_grad():
        y, counts = compile_plain(with_counts, lowering)(x, weights, ids)
    assert counts.tolist() == torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()
    reference.assert_near(y, module.expected(x, weights, ids), torch.float32)


def test_a_user_pre_pass_runs_first_and_both_run():
    seen = []

    def users(gm, example_inputs, config):
        seen.append([str(n.target) for n in gm.graph.nodes if n.op == "call_function"])

    lowering = MoeLowering(Deployment(), "allgather", strict=True)
    options = npugraph_ex_options(
        lowering.deployment, lowering=lowering, force_eager=True, post_grad_custom_pre_pass=users
    )
    module, args = Experts(), routed(5)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend="npugraph_ex", fullgraph=True, options=options)(*args)
    assert any("moe_lowering.dispatch" in name for name in seen[0])
    assert lowering.reports[0].fully_lowered


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="post_grad_custom_pre_pass is 3; accepted: a callable"):
        npugraph_ex_options(Deployment(), post_grad_custom_pre_pass=3)
    with pytest.raises(ValueError, match="give either lowering, or comm, strict, policy and overlap"):
        npugraph_ex_options(Deployment(), lowering=MoeLowering(Deployment()), comm="mc2")


def test_a_declared_bound_is_enforced_in_the_graph():
    """Compile caches and frameworks drop dynamo's guards: the graph itself refuses to run outside its range."""
    module = Experts()
    lowering = MoeLowering(Deployment(max_tokens=16), "allgather", strict=True)
    compiled = compile_plain(module, lowering, dynamic=True)
    with torch.no_grad():
        compiled(*routed(16))
        with pytest.raises(RuntimeError, match="17"):
            compiled(*routed(17))


def shifted_difference(a):
    """What transformers computes on position ids to find packed sequences."""
    return a[:, 1:] - a[:, :-1]


def test_npugraph_ex_computes_overlapping_slices_right_with_our_options():
    """Its own inplace_pass makes ``sub_`` of it, on overlapping memory; the options leave that pass off."""
    a = torch.arange(40.0).reshape(1, 40) ** 2
    expected = shifted_difference(a)
    for on in (False, True):
        torch._dynamo.reset()
        asked = {"inplace_pass": True} if on else {}
        options = npugraph_ex_options(Deployment(), force_eager=True, **asked)
        assert options["inplace_pass"] is on
        actual = torch.compile(shifted_difference, backend="npugraph_ex", options=options)(a.clone())
        assert on or torch.equal(actual, expected)


def test_public_names_are_all_there():
    import moe_lowering

    assert all(getattr(moe_lowering, name) is not None for name in moe_lowering.__all__)
    assert set(moe_lowering._HOME) == set(moe_lowering.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        moe_lowering.Nothing  # noqa: B018


REPEAT = "\nTraceback (most recent call last):\n"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (f"left: a{REPEAT}  File x\nLoweringError: left: a\nERR03005", "left: a\nERR03005"),  # as npugraph_ex makes it
        (f"left: a{REPEAT}  File x\nValueError: b", f"left: a{REPEAT}  File x\nValueError: b"),
        (f"{REPEAT}x", f"{REPEAT}x"),
        ("left: a", "left: a"),
    ],
)
def test_an_error_says_its_text_once(message, text):
    assert str(LoweringError(message)) == text and str(LoweringError()) == ""


@pytest.mark.parametrize(
    ("comm", "soc", "rules"),
    [
        ("mc2", "A2", ["not mc2: [mc2.ep_size] mc2: ep_size is 1; accepted: at least 2 ("]),
        ("auto", "310P", ["not allgather: [allgather.soc] ", "not mc2: [mc2.soc] ", "not fused_mc2: [fused.ep_size] "]),
        ("auto", "A3", ["not allgather, alltoall, mc2, fused_mc2: [deployment.max_tokens] deployment: T is 3, "]),
    ],
    ids=["asked for", "none is legal", "of all"],
)
def test_strict_mode_says_each_broken_rule_once_with_what_to_do(comm, soc, rules):
    module = torch.nn.Sequential(*[MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K) for _ in range(2)])
    lowering = MoeLowering(Deployment(soc=soc, max_tokens=2 if soc == "A3" else 0), comm, strict=True)
    with pytest.raises(Exception, match=r"moe_lowering \(strict\): left unlowered") as raised, torch.no_grad():
        compile_plain(module, lowering)(torch.randn(3, HIDDEN))
    text = str(raised.value)
    assert all(text.count(rule) == 1 for rule in rules), text
    assert ("not allgather" in text) == (comm == "auto")
