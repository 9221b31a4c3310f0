"""vLLM's range of token counts while the pass runs, and dynamo's own afterwards."""

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, statically_known_true
from torch.utils._sympy.value_ranges import ValueRanges

from moe_lowering.integrations.vllm_ranges import ranges_of_vllm


@pytest.fixture
def traced():
    """(graph with one input [T, 4], T, its ShapeEnv, its symbol); dynamo knows that T is 2 to 4096."""
    environment, source = ShapeEnv(), ConstantSource("tokens")
    symbol = environment.create_symbol(8, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    environment.var_to_range[symbol] = ValueRanges(2, 4096)
    tokens = environment.create_symintnode(symbol, hint=8, source=source)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode(shape_env=environment):
        x.meta["val"] = torch.empty(tokens, 4)
    graph.output(x)
    return torch.fx.GraphModule({}, graph), tokens, environment, symbol


def test_inside_the_range_is_that_of_vllm(traced):
    gm, tokens, environment, symbol = traced
    assert statically_known_true(tokens >= 2) and not statically_known_true(tokens <= 512)
    with ranges_of_vllm(gm, 1, 512):
        assert not statically_known_true(tokens >= 2) and statically_known_true(tokens <= 512)
    assert environment.var_to_range[symbol] == ValueRanges(2, 4096)
    assert statically_known_true(tokens >= 2) and not statically_known_true(tokens <= 512)


@pytest.mark.parametrize(
    ("narrowed", "after"),
    [((1, 512), (2, 4096)), ((1, 256), (2, 256)), ((16, 512), (16, 4096)), ((16, 256), (16, 256))],
)
def test_what_another_narrowed_meanwhile_stays(traced, narrowed, after):
    gm, _, environment, symbol = traced
    with ranges_of_vllm(gm, 1, 512):
        environment.var_to_range[symbol] = ValueRanges(*narrowed)
    assert environment.var_to_range[symbol] == ValueRanges(*after)


def test_a_failure_inside_leaves_dynamos_range(traced):
    gm, _, environment, symbol = traced
    with pytest.raises(KeyError), ranges_of_vllm(gm, 1, 512):
        raise KeyError
    assert environment.var_to_range[symbol] == ValueRanges(2, 4096)
