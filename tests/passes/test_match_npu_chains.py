"""Chains of torch_npu operators are found, and what differs from one in one thing is not: by its code.

What they compute is compared in test_raise_npu_chains.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path
from typing import Any

import npu_chain_layers as chains
import npu_chain_variants as variants
import pytest
import torch
from npu_chain_twins import CLIPPED, NORM_TWINS, TWINS

import moe_lowering
from moe_lowering import MoeLowering, simulator, testing
from moe_lowering.deployment import Deployment
from moe_lowering.passes.agreement_check import settings_record
from moe_lowering.passes.emission.emitter import is_emitted
from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.raise_foreign.match_mc2_chain import DISPATCH, match_mc2
from moe_lowering.passes.raise_foreign.npu_chain import foreign_block
from moe_lowering.passes.raise_foreign.records import NotThisForm

MC2 = {
    "bfloat16": {},
    "W8A8": {"quantisation": "w8a8"},
    "W4A16": {"quantisation": "w4a16"},
    "W4A8": {"quantisation": "w4a8"},
    "W4A8, SwiGLU and quantisation in one": {"quantisation": "w4a8", "joined": {}},
    "GEGLU": {"activation": "gelu_tanh"},
    "GEGLU, W4A16": {"activation": "gelu_tanh", "quantisation": "w4a16"},
    "clamps before silu": {"activation": "swiglu_clamp"},
    "shared expert as an argument": {"shared": "argument"},
    "W8A8, smooth": {"quantisation": "w8a8", "smooth": "both"},
    "W4A8, clipped": CLIPPED,
}


ROUTED = {
    "unpermute": {},
    "finalize": {"back": "finalize"},
    "finalize, shared expert": {"back": "finalize", "shared": True},
    "prefix sums": {"kind": 0},
    "pairs": {"kind": 2, "back": "finalize"},
    "W8A8": {"quantisation": "w8a8", "back": "finalize"},
    "W8A8, pairs": {"quantisation": "w8a8", "back": "finalize", "kind": 2},
    "W4A16": {"quantisation": "w4a16"},
    "GEGLU": {"activation": "gelu_tanh"},
}


npu = chains.npu


torch.library.define("custom::clip_quant", "(Tensor x) -> Tensor")


torch.library.register_fake("custom::clip_quant", torch.empty_like)


torch.library.define("custom::npu_dequant_swiglu_clamp_quant", "(Tensor x) -> Tensor")


torch.library.register_fake("custom::npu_dequant_swiglu_clamp_quant", torch.empty_like)


@pytest.fixture(scope="module")
def pair():
    simulator.enable("A3")
    with testing.fake_deployment(ep_size=2) as deployment:
        yield deployment


@pytest.fixture
def waits_of_ge(pair):
    """``air.wait_tensor``, which torchair registers when it is asked for."""
    from moe_lowering.testing import ge

    assert ge
    importlib.import_module("torchair.scope._wait_tensor")


@contextlib.contextmanager
def alone():
    simulator.enable("A3")
    yield Deployment(soc="A3", installed=())


def graph_of(layer: torch.nn.Module, deployment: Deployment, *more: Any, dynamic: bool = False) -> torch.fx.Graph:
    lowering = MoeLowering(deployment, raise_foreign="off")
    inputs = (*chains.inputs(0), *more)
    for tensor in inputs[1:3]:
        torch._dynamo.mark_static(tensor, 1)  # k, as a router's topk has it
    return testing.lower_graph(layer, *inputs, deployment=deployment, lowering=lowering, dynamic=dynamic).gm.graph


def anchor(graph: torch.fx.Graph, name: str) -> torch.fx.Node:
    (node,) = graph.find_nodes(op="call_function", target=getattr(torch.ops.npu, name).default)
    return node


def mc2_layer(
    deployment: Deployment, quantisation: str = "none", activation: str = "swiglu", **more: Any
) -> chains.Mc2:
    group = more.pop("group", deployment.ep_communicator)
    return chains.Mc2(group, quantisation, activation, 0, deployment.ep_size, **more)


def routed_layer(quantisation: str = "none", activation: str = "swiglu", **more: Any) -> chains.Routed:
    return chains.Routed(quantisation, activation, **more)


@pytest.mark.parametrize("case", [*MC2, "bfloat16, dynamic", "W8A8, dynamic", "bfloat16, mc2_group"])
def test_an_mc2_chain_is_found(pair, case):
    case, _, how = case.partition(", ") if case not in MC2 else (case, "", "")
    group = pair.mc2_group if how == "mc2_group" else pair.ep_communicator
    layer = mc2_layer(pair, group=group, **MC2[case])
    chain = match_mc2(anchor(graph_of(layer, pair, dynamic=how == "dynamic"), DISPATCH), pair)
    given = chain.experts.given
    assert (given["quantisation"], given["activation"]) == (layer.quantisation, layer.activation)
    assert given["limit"] == (0.5 if layer.activation == "swiglu_clamp" else 0.0)
    assert len(given["w13"]) == len(given["w2"]) == 1 and given["w13"][0].meta["val"].shape[0] == chains.EXPERTS // 2
    assert (chain.added != ()) == (case == "shared expert as an argument")
    smooth = [getattr(node, "name", None) for node in (chain.x_smooth, chain.experts.h_smooth)]
    assert (smooth == [None, None]) == (case != "W8A8, smooth")
    assert (chain.experts.h_clip is None) == ("clipped" not in case)
    outside = {user for node in chain.interior for user in node.users} - {*chain.interior}
    assert outside <= {*chain.combine.users}


@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_of_an_mc2_chain_is_left(pair, twin):
    code, changes = TWINS[twin]
    mask = (torch.ones(6, dtype=torch.bool),) if "mask" in twin else ()
    graph = graph_of(mc2_layer(pair, **changes), pair, *mask)
    with pytest.raises(NotThisForm) as left:
        foreign_block(match_mc2(anchor(graph, DISPATCH), pair), graph)
    assert left.value.record.code == code, left.value


@pytest.mark.parametrize("twin", NORM_TWINS)
def test_a_twin_of_a_combine_with_a_norm_is_left(pair, twin):
    code, changes = NORM_TWINS[twin]
    graph = graph_of(variants.Normed(pair.ep_communicator, "none", "swiglu", 0, pair.ep_size, **changes), pair)
    with pytest.raises(NotThisForm) as left:
        foreign_block(match_mc2(anchor(graph, DISPATCH), pair), graph)
    assert left.value.record.code == code, left.value


def test_clamps_after_silu_are_an_activation_of_their_own(pair):
    graph = graph_of(mc2_layer(pair, activation="swiglu_clamp_after"), pair)
    node = anchor(graph, DISPATCH)
    given = match_mc2(node, pair).experts.given
    assert (given["activation"], given["limit"]) == ("swiglu_clamp_after", 0.5)


def test_smooth_scales_of_one_are_dropped_and_others_are_not(pair):
    layer = mc2_layer(pair, quantisation="w8a8", smooth=1.0)
    layer.smooth_scale_2[0, 0] = 1.5
    model = torch.nn.ModuleList([layer, mc2_layer(pair, quantisation="w8a8", smooth=1.0)])
    assert moe_lowering.drop_unit_smooth_scales(model) == ["0.smooth_scale_1", "1.smooth_scale_1", "1.smooth_scale_2"]
    assert layer.smooth_scale_2 is not None and layer.smooth_scale_1 is None
    graph = graph_of(model[1], pair)
    assert foreign_block(match_mc2(anchor(graph, DISPATCH), pair), graph).quantisation == "w8a8"
    with pytest.raises(ValueError, match="has 'smooth' in its name; accepted: a part"):
        moe_lowering.drop_unit_smooth_scales(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"smooth_scale_1 has no data; accepted: a model whose weights are loaded"):
        moe_lowering.drop_unit_smooth_scales(mc2_layer(pair, quantisation="w8a8", smooth=1.0).to("meta"))
    with pytest.raises(ValueError, match="model is 3; accepted: a torch"):
        moe_lowering.drop_unit_smooth_scales(3)
    with pytest.raises(ValueError, match="word is ''; accepted: a part"):
        moe_lowering.drop_unit_smooth_scales(layer, "")


PLACES = {
    "of another rank": ("raise.other_rank", {"ep_rank": 1}),
    "of more ranks": ("raise.other_group", {"ep_size": 4, "ep_group": "x"}),
    "with another bound": ("raise.token_bound", {"max_tokens": 8, "equal_tokens": False}),
    "that knows no communicator": ("raise.other_group", {"ep_communicator": ""}),
    "with two levels": ("raise.literal", {"mc2_hierarchy": True}),
}


def test_a_communicator_is_the_ep_groups_or_mc2s():
    with pytest.raises(ValueError, match="mc2_group is 'a', the EP group itself"):
        Deployment(ep_size=2, ep_group="ep", mc2_group="a", ep_communicator="a", ep_rank=0)
    a, b = (Deployment(ep_size=2, ep_group="ep", ep_communicator=name, ep_rank=0) for name in ("a", "b"))
    assert settings_record(a, None) == settings_record(b, None) != settings_record(a.replace(ep_communicator=""), None)


@pytest.mark.parametrize("place", PLACES)
def test_an_mc2_chain_is_left_by_a_deployment(pair, place):
    code, fields = PLACES[place]
    node = anchor(graph_of(mc2_layer(pair), pair), DISPATCH)
    match_mc2(node, pair)
    with pytest.raises(NotThisForm) as left:
        match_mc2(node, Deployment(**{**pair.all_fields(), **fields}))
    assert left.value.record.code == code, left.value


@pytest.mark.parametrize("quantisation", chains.FORMATS)
@pytest.mark.parametrize("comm", ["allgather", "fused_mc2"])
def test_who_only_waits_for_a_chain_waits_for_its_ends(pair, waits_of_ge, comm, quantisation):
    where = pair.replace(mode="ge")
    layer = chains.Waiting(pair.ep_communicator, quantisation, "swiglu", 0, 2)
    lowered = testing.lower_graph(layer, *chains.inputs(0), deployment=where, comm=comm)
    (block,) = lowered.report.blocks
    waits = lowered.gm.graph.find_nodes(op="call_function", target=torch.ops.air.wait_tensor.default)
    if block.comm is None:
        assert lowered.ops_before == lowered.ops_after and len(waits) == 5
        return
    assert any("[raise.order] 3 operations waited" in note for note in block.notes)
    (add,) = next(iter(lowered.gm.graph.find_nodes(op="output"))).all_input_nodes
    y, ids = add.args[0].args[0], [*lowered.gm.graph.find_nodes(op="placeholder")]
    x = waits[0]
    assert [node.args[1] in (x, y) for node in waits[1:]] == [True] * 3 and waits[-1].args[1] is y
    assert all(node.args[1] < node for node in waits) and x.args[1] in ids


def test_a_value_that_is_waited_for_is_still_read_once(pair, waits_of_ge):
    layer = chains.Waiting(pair.ep_communicator, "none", "swiglu", 0, 2, awaited=lambda out: out + 1)
    graph = graph_of(layer, pair)
    with pytest.raises(NotThisForm, match=r"raise\.single_use"):
        match_mc2(anchor(graph, DISPATCH), pair)


@pytest.mark.parametrize("masked", ["where", "mul"])
def test_exchanges_of_a_chain_of_gathered_tokens_go_with_it(pair, masked):
    layer = variants.Gathered(pair.ep_group, "none", "swiglu", 0, 2, masked=masked)
    lowered = testing.lower_graph(layer, *chains.inputs(0), deployment=pair, comm="mc2")
    assert [(block.comm, block.raised_from) for block in lowered.report.blocks] == [("mc2", "gathered_v2")]
    assert not [name for name in lowered.ops_after if name.startswith("_c10d")]
    assert sum(name.endswith("all_gather_into_tensor") for name in lowered.ops_before) == 3


def test_weights_that_a_chain_rounds_behind_its_mask_are_rounded(pair):
    """To bfloat16; MC2 takes float32. The twin rounds them before they are sent, which is a cast of the model's own."""
    for sent, behind, casts in ((torch.Tensor.float, torch.Tensor.bfloat16, 2), (torch.Tensor.bfloat16, None, 1)):
        changes = {} if behind is None else {"weights": behind}
        layer = variants.Gathered(pair.ep_group, "none", "swiglu", 0, 2, sent=sent, **changes)
        graph = testing.lower_graph(layer, *chains.inputs(0), deployment=pair, comm="mc2").gm.graph
        scales = argument(anchor(graph, "npu_moe_distribute_combine_v2"), "expert_scales")
        assert [each.meta["val"].dtype for each in (scales, scales.args[0])] == [torch.float32, torch.bfloat16]
        made = [node for node in (scales, scales.args[0]) if is_emitted(node)]
        assert len(made) == casts


def test_each_code_is_documented():
    top = Path(chains.__file__).parents[2]
    folder, page = top / "moe_lowering" / "passes", top / "docs" / "raising_chains.md"
    names = (
        "chain_walk",
        "match_npu_mlp",
        "match_int8_experts",
        "npu_matmuls",
        "group_lists",
        "masked_weights",
        "normed_combine",
        "match_npu_activation",
        "match_mc2_chain",
        "match_routing_chain",
        "match_gathered_chain",
        "match_first_routing",
        "special_experts",
        "npu_chain",
    )
    files = [folder / "raise_foreign" / f"{name}.py" for name in (*names, "npu_forms", "keep_foreign")]
    text = "".join(file.read_text() for file in (*files, folder / "lower_foreign.py"))
    codes = {*re.findall(r"\braise\.[a-z_]+", text)}
    assert codes == {*re.findall(r"raise\.[a-z_]+", page.read_text())}
