"""The combine step in its two forms: one operator for npugraph_ex, ATen for GE, both against float64."""

import dataclasses

import pytest
import torch
from quantised_numbers import snr
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_lowering import Deployment
from moe_lowering.backends import ge_missing
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.implementations import unpermute
from moe_lowering.vocabulary import MODES

ROWS, TOKENS, TOP_K, HIDDEN = 11, 5, 3, 64


def built(mode, dtype, dynamic=False):
    """The emitted graph over (rows, index, weights), and the operators in it."""
    with FakeTensorMode(shape_env=ShapeEnv()) as fake:
        tensors = inputs(dtype)
        values = [fake.from_tensor(t, static_shapes=not dynamic) for t in tensors]
        graph = Graph()
        nodes = []
        for name, value in zip(("rows", "index", "weights"), values, strict=True):
            nodes.append(graph.placeholder(name))
            nodes[-1].meta["val"] = value
        end = graph.output(None)
        emit = Emitter(graph, fake)
        with emit.at(end, nodes[0]):
            y = unpermute.emit_combine(emit, *nodes, Deployment(mode=mode))
        end.args = (y,)
        graph.lint()
        for node in emit.created:
            assert node.meta["val"] is not None
        return GraphModule({}, graph), [node.target for node in emit.created], y.meta["val"]


def inputs(dtype):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype)
    index = torch.randint(0, ROWS, (TOKENS * TOP_K,), generator=generator).to(torch.int32)
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    return rows, index, weights


def reference(rows, index, weights):
    y = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token in range(TOKENS):
        for j in range(TOP_K):
            y[token] += weights[token, j].double() * rows[int(index[token * TOP_K + j])].double()
    return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_both_forms_compute_the_weighted_sum(mode, dtype, dynamic):
    gm, _, value = built(mode, dtype, dynamic)
    rows, index, weights = inputs(dtype)
    y = gm(rows, index, weights)
    assert y.dtype == dtype == value.dtype and y.shape == (TOKENS, HIDDEN)
    assert snr(y, reference(rows, index, weights)) > (45 if dtype == torch.bfloat16 else 65)


def test_ge_rounds_once_and_the_operator_rounds_the_weights_too():
    """Weights stay float32 in the ATen form; the operator takes them in the dtype of the rows."""
    tensors = inputs(torch.bfloat16)
    exact = reference(*tensors)
    quality = {mode: snr(built(mode, torch.bfloat16)[0](*tensors), exact) for mode in MODES}
    assert quality["ge"] > quality["npugraph_ex"] + 1


def test_only_the_form_for_ge_is_convertible():
    missing = {mode: [t for t in built(mode, torch.bfloat16)[1] if ge_missing.missing_converter(t)] for mode in MODES}
    assert missing == {"npugraph_ex": [torch.ops.npu.npu_moe_token_unpermute.default], "ge": []}


def test_limits_follow_the_form():
    @dataclasses.dataclass
    class Spec:
        dtype = torch.bfloat16
        hidden = 64
        top_k = 2

    assert unpermute.combine_calls(Spec(), Deployment(mode="ge")) == ()
    [call] = unpermute.combine_calls(Spec(), Deployment())
    assert call.operator == "npu_moe_token_unpermute"


def test_mode_is_checked_and_part_of_what_ranks_agree_on():
    with pytest.raises(ValueError, match="mode is 'acl'; accepted: npugraph_ex, ge"):
        Deployment(mode="acl")
    assert Deployment(mode="ge").digest() != Deployment().digest()
