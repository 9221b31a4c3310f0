"""Clamped SwiGLU is one operator on the rows that are valid, where the SoC has it, and ATen operators elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_lowering import MoE, testing
from moe_lowering.passes.implementations.activation import _CLIPPED, activation_operator
from moe_lowering.vocabulary import ACTIVATIONS, SOCS

NPU, aten = torch.ops.npu, torch.ops.aten


def lowered(activation, soc="A3", **options):
    with testing.fake_deployment(ep_size=2, soc=soc) as where, testing.fake_tensors():
        options = {"limit": 7.0, **options}
        model = MoE(128, 64, 4, 2, activation=activation, deployment=where, dtype=torch.float16, **options)
        x = torch.empty(8, 128, dtype=torch.float16)
        return testing.lower_graph(model, x, deployment=where, comm="allgather", strict=True).gm.graph


def calls(graph, target):
    return graph.find_nodes(op="call_function", target=target)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", _CLIPPED)
def test_one_operator_that_is_told_which_rows_are_valid(activation, interleaved):
    graph = lowered(activation, interleaved=interleaved)
    (node,) = calls(graph, NPU.npu_clipped_swiglu.default)
    first, second = calls(graph, NPU.npu_grouped_matmul.default)
    assert node.kwargs["group_index"] is first.kwargs["group_list"] is second.kwargs["group_list"]
    assert node.kwargs["interleaved"] is interleaved and node.kwargs["limit"] == 7.0
    assert not calls(graph, aten.clamp.default) and not calls(graph, aten.silu.default)


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("activation", _CLIPPED)
def test_the_soc_must_have_the_operator(activation, soc):
    spec = SimpleNamespace(activation=activation, interleaved=False)
    assert activation_operator(spec, soc) == ("npu_clipped_swiglu" if SOCS[soc].clips_swiglu else None)


@pytest.mark.parametrize("activation", _CLIPPED)
def test_a_soc_without_the_operator_composes_it(activation):
    graph = lowered(activation, "A5")
    assert not calls(graph, NPU.npu_clipped_swiglu.default) and len(calls(graph, aten.clamp.default)) == 2


def test_what_it_does_not_compute_is_left_to_others():
    """The clamp after SiLU is another function, and so is one without an alpha of the block's."""
    graph = lowered("swiglu_clamp_after")
    assert not calls(graph, NPU.npu_clipped_swiglu.default) and len(calls(graph, aten.clamp.default)) == 2
    assert {name for name in ACTIVATIONS if ACTIVATIONS[name].clamped} > set(_CLIPPED)


def test_clipped_words_are_the_reference_s():
    """What the numbers of ``_CLIPPED`` mean, written out in float64."""
    torch.manual_seed(0)
    x = torch.randn(6, 16, dtype=torch.float64) * 3
    gate, up = x[:, :8].clamp(max=1.5), x[:, 8:].clamp(-1.5, 1.5)
    expected = {
        "swiglu_clamp": gate * torch.sigmoid(gate) * up,
        "swiglu_oai": gate * torch.sigmoid(1.3 * gate) * (up + 1),
    }
    assert expected.keys() == _CLIPPED.keys()
    for name, (alpha, bias) in _CLIPPED.items():
        y = NPU.npu_clipped_swiglu(
            x.float(), alpha=1.3 if alpha is None else alpha, limit=1.5, bias=bias, interleaved=False
        )
        assert (y.double() - expected[name]).abs().max() < 1e-5
