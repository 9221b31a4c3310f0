"""The combine step: one operator for npugraph_ex, ATen for GE, another operator for both; each against float64."""

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


FORMS = {
    "npugraph_ex": {"mode": "npugraph_ex"},
    "ge": {"mode": "ge"},
    "npugraph_ex, finalize_routing": {"mode": "npugraph_ex", "unpermute_operator": "finalize_routing"},
    "ge, finalize_routing": {"mode": "ge", "unpermute_operator": "finalize_routing"},
}


def built(form, dtype, dynamic=False, absent=False):
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
            y = unpermute.emit_combine(emit, *nodes, Deployment(**FORMS[form]), absent)
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
            place = int(index[token * TOP_K + j])
            y[token] += weights[token, j].double() * rows[place].double() if place >= 0 else 0
    return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_all_forms_compute_the_weighted_sum(form, dtype, dynamic):
    gm, _, value = built(form, dtype, dynamic)
    rows, index, weights = inputs(dtype)
    y = gm(rows, index, weights)
    assert y.dtype == dtype == value.dtype and y.shape == (TOKENS, HIDDEN)
    assert snr(y, reference(rows, index, weights)) > (45 if dtype == torch.bfloat16 else 65)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "npugraph_ex"])
def test_no_row_is_read_where_the_index_says_that_there_is_none(form, dynamic):
    """Rows that no index names are NaN, the last among them; a token has no row at all."""
    gm, _, _ = built(form, torch.bfloat16, dynamic, absent=True)
    rows, index, weights = inputs(torch.bfloat16)
    index[::3], index[3:6] = -1, -1
    rows[-1] = rows[0] = torch.nan
    index[(index == 0) | (index == ROWS - 1)] = 1
    exact = reference(rows, index, weights)
    y = gm(rows, index, weights)
    assert not y[1].any() and snr(y, exact) > 45
    with pytest.raises(ValueError, match="sorted_indices"):
        built("npugraph_ex", torch.bfloat16)[0](rows, index, weights)  # the twin, which has no such index


def test_ge_rounds_once_and_the_operators_round_the_weights_too():
    """Weights stay float32 in the ATen form; the operators take them in the dtype of the rows."""
    tensors = inputs(torch.bfloat16)
    exact = reference(*tensors)
    quality = {form: snr(built(form, torch.bfloat16)[0](*tensors), exact) for form in FORMS}
    assert quality["ge"] > quality["npugraph_ex"] + 1
    for mode in MODES:
        assert quality[f"{mode}, finalize_routing"] == quality["npugraph_ex"], "the same arithmetic"


def test_what_has_no_converter_is_not_in_the_forms_for_ge():
    missing = {form: [t for t in built(form, torch.bfloat16)[1] if ge_missing.missing_converter(t)] for form in FORMS}
    assert missing.pop("npugraph_ex") == [torch.ops.npu.npu_moe_token_unpermute.default]
    assert not any(missing.values())


def test_limits_follow_the_form():
    @dataclasses.dataclass
    class Spec:
        dtype = torch.bfloat16
        hidden = 64
        top_k = 2

    calls = {form: unpermute.combine_calls(Spec(), Deployment(**FORMS[form]), lambda t: t) for form in FORMS}
    assert calls.pop("ge") == ()
    operators = {form: call.operator for form, (call,) in calls.items()}
    assert operators.pop("npugraph_ex") == "npu_moe_token_unpermute"
    assert set(operators.values()) == {"npu_moe_finalize_routing"}


def test_mode_is_checked_and_part_of_what_ranks_agree_on():
    with pytest.raises(ValueError, match="mode is 'acl'; accepted: npugraph_ex, ge"):
        Deployment(mode="acl")
    assert Deployment(mode="ge").digest() != Deployment().digest()
