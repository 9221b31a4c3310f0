"""npugraph_ex with its default options on device "npu": what is captured, how often, and what is replayed.

Every compiled function is compared with the same function without a graph, on new inputs at every call.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from moe_lowering import Deployment, MoE, MoeLowering, npugraph_ex_options, simulator
from moe_lowering.simulator import device
from moe_lowering.simulator.device import CaptureError, Counts


@pytest.fixture(scope="module", autouse=True)
def enabled():
    simulator.enable_device()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compiled(function, dynamic=False, **options):
    return torch.compile(function, backend="npugraph_ex", fullgraph=True, dynamic=dynamic, options=options)


def inputs(step, tokens=6, width=8):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(step)).npu()


def run(function, fast, shapes):
    """Call both with new inputs of each token count; the counters since."""
    before = device.counts()
    with torch.no_grad():
        for step, tokens in enumerate(shapes):
            x = inputs(step, tokens)
            found, expected = fast(x.clone()), function(x)
            torch.testing.assert_close(found.cpu(), expected.cpu())
    return device.counts() - before


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).to("npu")


def test_a_model_is_captured_once_and_replayed():
    model = mlp()
    counts = run(model, compiled(model), [6] * 20)
    assert counts == Counts(begun=2, empty=1, captured=1, replayed=20)
    tape = device.tapes()[-1]
    assert tape.operators == ["aten::addmm", "aten::relu_", "aten::addmm"]  # relu_: inplace_pass is on
    assert tape.replays == 20 and tape.pool_bytes() > 0


def test_without_inplace_pass_nothing_is_written_over():
    model = mlp()
    run(model, compiled(model, inplace_pass=False), [6] * 3)
    assert device.tapes()[-1].operators == ["aten::addmm", "aten::relu", "aten::addmm"]


def test_force_eager_captures_nothing():
    model = mlp()
    assert run(model, compiled(model, force_eager=True), [6] * 3) == Counts(0, 0, 0, 0)


@pytest.mark.parametrize("options", [{}, {"reuse_graph_pool_in_same_fx": False}, {"clone_output": True}])
def test_several_token_counts_are_several_graphs_of_one_compile(options):
    model = mlp()
    counts = run(model, compiled(model, dynamic=True, **options), [6, 6, 9, 9, 6, 12, 9, 6])
    assert counts == Counts(begun=4, empty=1, captured=3, replayed=8)
    pools = [tape.pool for tape in device.tapes()[-3:]]
    assert len(set(pools)) == 1  # the graphs of one compile share a pool


def test_pool_reuse_saves_memory():
    """With reuse the graphs of a compile lie on the same memory, without it next to each other."""

    def wide(x):
        return x.repeat(1, 1 << 15)  # 16 MiB for 16 tokens

    def bytes_of(**options):
        torch._dynamo.reset()
        run(wide, compiled(wide, dynamic=True, **options), [16, 17, 18, 19])
        return device.tapes()[-1].pool_bytes()

    assert bytes_of() < bytes_of(reuse_graph_pool_in_same_fx=False)


def test_capture_limit_falls_back_to_eager():
    model = mlp()
    fast = compiled(model, dynamic=True, capture_limit=2)
    assert run(model, fast, [6, 9, 6]) == Counts(begun=3, empty=1, captured=2, replayed=3)
    assert run(model, fast, [12, 6, 9]) == Counts(0, 0, 0, 0)  # the third key: no graphs any more
    assert run(model, compiled(model, dynamic=True, capture_limit=3), [6, 9, 12]).captured == 3


def test_outputs_are_overwritten_unless_cloned():
    model = mlp()
    for cloned in (False, True):
        torch._dynamo.reset()
        fast = compiled(model, clone_output=cloned)
        with torch.no_grad():
            first = fast(inputs(0))
            kept = first.clone()
            fast(inputs(1))
        assert torch.equal(first, kept) == cloned


def test_clone_input():
    """With it new inputs are copied to the graph's own; without it inputs at other addresses are copied to the first."""

    def function(x):
        return x * 2 + 1

    for cloned in (True, False):
        torch._dynamo.reset()
        fast = compiled(function, clone_input=cloned)
        x = inputs(0)
        with torch.no_grad():
            fast(x)
            x.fill_(5.0)
            assert fast(x).unique().tolist() == [11.0]
        assert run(function, fast, [6] * 3).captured == 0
        assert (x.unique().tolist() == [5.0]) == cloned  # without clone_input the graph reads, and keeps, the first x


@pytest.mark.parametrize(("frozen", "recaptures"), [(False, 1), (True, 0)])
def test_frozen_parameter(frozen, recaptures):
    """A parameter that moves: a new capture, or, when it was promised not to move, stale weights."""
    model = mlp()
    fast = compiled(model, frozen_parameter=frozen)
    assert run(model, fast, [6] * 2).captured == 1
    moved = copy.deepcopy(model[0].weight.data) * 2
    old, model[0].weight.data = model[0].weight.data, moved
    before = device.counts()
    with torch.no_grad():
        x = inputs(3)
        right = torch.allclose(fast(x), model(x))
    assert (device.counts() - before).captured == recaptures
    assert right == (not frozen)
    del old


def test_mutated_inputs():
    """A buffer that the graph writes to, as a key-value cache: in place, and captured again when it moves."""

    def function(x, cache):
        cache.add_(x)
        return cache * 2

    fast = compiled(function)
    cache, before = torch.zeros(6, 8, device="npu"), device.counts()
    for _ in range(3):
        y = fast(torch.ones(6, 8, device="npu"), cache)
    assert cache.unique().tolist() == [3.0] and y.unique().tolist() == [6.0]
    assert (device.counts() - before).captured == 1
    moved = torch.full((6, 8), 10.0, device="npu")
    fast(torch.ones(6, 8, device="npu"), moved)
    assert moved.unique().tolist() == [11.0] and (device.counts() - before).captured == 2


def test_the_line_of_the_model_is_on_the_tape():
    class Model(nn.Module):
        def forward(self, x):
            return torch.sigmoid(x) + x.cumsum(0)

    model = Model()
    run(model, compiled(model), [6])
    for entry in device.tapes()[-1].entries:
        assert entry.place.file == __file__ and "torch.sigmoid(x) + x.cumsum(0)" in entry.place.text


HOST = {
    "host values": (lambda x: x * torch.arange(8.0).to("npu"), "aten::copy_"),
    "assignment by mask": (lambda x: x.clone().index_put_((x > 0,), x[0, 0]) + 1, "aten::index_put"),
    "random": (lambda x: x + torch.rand_like(x), "aten::rand_like"),
}


@pytest.mark.parametrize("case", HOST)
def test_capture_errors_name_the_operator_and_the_line(case):
    function, operator = HOST[case]
    assert function(inputs(0)).shape == (6, 8)
    with pytest.raises(CaptureError, match=operator) as caught:
        compiled(function)(inputs(0))
    assert caught.value.place.file == __file__ and caught.value.place.line == function.__code__.co_firstlineno
    assert run(torch.sin, compiled(torch.sin), [6]).captured == 1  # the next graph is not harmed


def test_a_lowered_layer():
    torch.manual_seed(0)
    layer = MoE(64, 32, 8, 2).to("npu")
    lowering = MoeLowering(Deployment(), strict=True)
    before = device.counts()
    fast = compiled(layer, post_grad_custom_pre_pass=lowering)
    with torch.no_grad():
        for step in range(20):
            x = inputs(step, 6, 64)
            torch.testing.assert_close(fast(x), layer(x), rtol=1e-4, atol=1e-5)
    assert device.counts() - before == Counts(begun=2, empty=1, captured=1, replayed=20)
    operators = device.tapes()[-1].operators
    assert "npu::npu_grouped_matmul" in operators and not any(o.startswith("moe_lowering::") for o in operators)
    assert [block.comm for report in lowering.reports for block in report.blocks] == ["allgather"]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_qwen3_moe(dynamic):
    """A transformers model moved to the device: captured once per token count, each replay as without a graph."""
    transformers = pytest.importorskip("transformers")
    from moe_lowering.integrations.transformers import register

    register()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    here = transformers.Qwen3MoeForCausalLM(config).eval()
    here.set_experts_implementation("moe_lowering")
    there = copy.deepcopy(here).to("npu")
    deployment = Deployment(max_tokens=64)
    lowering = MoeLowering(deployment, strict=True)
    options = npugraph_ex_options(deployment, lowering=lowering)
    fast = compiled(lambda ids: there(ids, use_cache=False).logits, dynamic, **options)
    before, sizes = device.counts(), [12, 16] if dynamic else [12]
    # Without it dynamo makes attention_scaling an input on the host, which a capture would bake in: see the next test.
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        for step in range(20):
            ids = torch.randint(0, 64, (1, sizes[step % len(sizes)]), generator=torch.Generator().manual_seed(step))
            torch.testing.assert_close(fast(ids.npu()).cpu(), here(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    assert (device.counts() - before).captured == len(sizes)
    assert (device.counts() - before).replayed == 20
    assert sum(o == "npu::npu_moe_init_routing_v2" for o in device.tapes()[-1].operators) == 2


def test_a_float_that_became_an_input_is_refused():
    class Scaled(nn.Module):
        scale = 1.5

        def forward(self, x):
            return x.cos() * self.scale

    model = Scaled()
    with torch._dynamo.config.patch(specialize_float=False), pytest.raises(CaptureError, match="specialize_float"):
        compiled(model, dynamic=True)(inputs(0))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_float=True):
        run(model, compiled(model, dynamic=True), [6, 9])
