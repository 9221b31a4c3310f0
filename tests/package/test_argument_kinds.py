"""Every argument of the functions that models are built from, with values of kinds that it does not take: one error of
ours each, which names the argument and what is accepted. The arguments come from the signatures."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import moe_lowering.integrations.transformers as integration
from moe_lowering import Deployment, MoE, custom_ops, moe_experts, testing
from moe_lowering import quantisation as q
from moe_lowering.experts import log2phy_from_expert_maps
from moe_lowering.functional import check_expert_map, route

H, INNER, E, K, T = 16, 16, 4, 2, 3
IDS = torch.tensor([[0, 1], [2, 3], [1, 0]])
EXPERTS: dict[str, Any] = {
    "x": torch.ones(T, H),
    "weights": torch.ones(T, K),
    "ids": IDS,
    "w13": torch.ones(E, H, 2 * INNER),
    "w2": torch.ones(E, INNER, H),
}
INTEGERS = ("num_experts", "top_k", "hidden_size", "intermediate_size", "num_groups", "topk_groups", "group_size")
LAYER = MoE(H, INNER, E, K)

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "moe_experts": (moe_experts, EXPERTS),
    "route": (route, {"logits": torch.ones(T, E), "top_k": K}),
    "MoE": (MoE, {"hidden_size": H, "intermediate_size": INNER, "num_experts": E, "top_k": K}),
    "MoE.forward": (LAYER.forward, {"x": torch.ones(T, H)}),
    "check_expert_map": (check_expert_map, {"expert_map": torch.arange(E), "num_experts": E}),
    "log2phy_from_expert_maps": (log2phy_from_expert_maps, {"expert_maps": [torch.arange(E)]}),
    "quantise_weight": (q.quantise_weight, {"w": torch.ones(4, 8).half(), "format": "w4a16", "group_size": 2}),
    "quantise_rows": (q.quantise_rows, {"rows": torch.ones(T, H)}),
    "pack_int4": (q.pack_int4, {"values": torch.ones(8, dtype=torch.int8)}),
    "unpack_int4": (q.unpack_int4, {"packed": torch.ones(1, dtype=torch.int32)}),
    "scale_bits": (q.scale_bits, {"scale": torch.ones(8)}),
    "dequantise": (q.dequantise, {"quantised": q.quantise_weight(torch.ones(4, 8), "w8a8")}),
    "token_mask": (integration.token_mask, {"mask": torch.ones(T, dtype=torch.bool)}),
    "capabilities": (integration.capabilities, {"model": LAYER}),
}
# What no argument takes, and what torch itself would take for a number, a flag or a size.
NOTHING_TAKES = {
    "text": "x",
    "NaN": float("nan"),
    "infinity": float("inf"),
    "list": [1],
    "object": object(),
    "class": dict,
    "function": len,
    "complex": torch.ones(E, T, H, dtype=torch.complex64),
}


def arguments() -> list[tuple[str, str]]:
    return [(call, name) for call, (function, _) in CALLS.items() for name in inspect.signature(function).parameters]


def wrong_for(function: Callable[..., Any], name: str) -> dict[str, Any]:
    """By what it is: values that the argument does not take."""
    parameter = inspect.signature(function).parameters[name]
    wrong = dict(NOTHING_TAKES)
    kind = str(parameter.annotation)
    if "None" not in kind:
        wrong["None"] = None
    if "bool" in kind or name in INTEGERS:
        wrong |= {"fraction": 1.5, "a tensor": torch.tensor(1)}
    if "float" in kind or name in INTEGERS:
        wrong |= {"flag": True, "a tensor": torch.tensor(1)}
    return wrong


@pytest.mark.parametrize(("call", "name"), arguments())
def test_a_wrong_kind_is_an_error_of_ours(call, name):
    function, valid = CALLS[call]
    for kind, value in wrong_for(function, name).items():
        with pytest.raises((ValueError, TypeError)) as caught:
            function(**{**valid, name: value})
        message = str(caught.value)
        assert name in message and "accepted" in message, f"{call}({name}={kind}): {message}"


@pytest.mark.parametrize("call", CALLS)
def test_the_valid_call_is_valid(call):
    function, valid = CALLS[call]
    function(**valid)


# --- numbers that are none, and ids that are cut ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("name", "activation"), [("limit", "swiglu_clamp"), ("alpha", "swiglu_oai"), ("scale", "")])
def test_numbers_that_are_not_finite(name, activation, value):
    """The operators refuse them too: a layer's attribute may change after it was made."""
    if name == "scale":
        with pytest.raises(ValueError, match=rf"route: scale is {value}; accepted: a finite"):
            route(torch.ones(T, E), K, scale=value)
        return
    given = {"activation": activation, "limit": 7.0, name: value}
    with pytest.raises(ValueError, match=rf"{name} is {value}.*; accepted: .*finite"):
        moe_experts(**EXPERTS, **given)
    moe_experts(**EXPERTS, **{**given, name: 7.0})  # the twin


def test_log2phy_is_not_cut():
    log2phy = torch.tensor([2**32, 1, 2, 3])
    with pytest.raises(ValueError, match=f"log2phy has {2**32}, which is no int32"):
        moe_experts(**EXPERTS, log2phy=log2phy)
    assert moe_experts(**EXPERTS, log2phy=log2phy % 2**32).shape == (T, H)


def test_routing_weights_are_floats():
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"weights is {dtype}; accepted: float32"):
            moe_experts(**{**EXPERTS, "weights": torch.ones(T, K, dtype=dtype)})


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_ids_of_either_kind(mode):
    """What is compared with real ids is not compared with those of a trace."""
    for ids in (IDS, IDS.int()):
        values = list({**EXPERTS, "ids": ids}.values())
        graph = make_fx(lambda *given: moe_experts(*given), tracing_mode=mode)(*values)
        assert torch.ops.moe_lowering.combine.default in [node.target for node in graph.graph.nodes]


# --- layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (H + 1,), (T, 1), (0,)])
def test_tokens_of_another_width(shape):
    with pytest.raises(ValueError, match=rf"MoE: x has shape .*; accepted: \[\.\.\., {H}\]"):
        LAYER(torch.ones(shape))


def test_a_dtype_that_no_operator_takes():
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(TypeError, match=f"MoE: dtype is {dtype}; accepted: torch.float32"):
            MoE(H, INNER, E, K, dtype=dtype)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with pytest.raises(TypeError, match=r"MoE: dtype is None, torch's default dtype torch\.float64; accepted: "):
            MoE(H, INNER, E, K)
        assert MoE(H, INNER, E, K, dtype=torch.float32).w13.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("form", q.FORMATS)
def test_weights_that_are_not_finite_have_no_integers(form):
    """A NaN would become some number; the model stays as it was, the layers before the wrong one, too."""
    model = nn.Sequential(*(MoE(H, INNER, E, K, dtype=torch.bfloat16) for _ in range(2)))
    whole = model[1].w2.data[0, 0, 0].clone()
    for wrong in (float("nan"), float("inf")):
        model[1].w2.data[0, 0, 0] = wrong
        with pytest.raises(ValueError, match="quantise_experts: 1: w2: quantise_weight: w has NaN or infinity"):
            q.quantise_experts(model, form)
        assert {module.w13.dtype for module in model} == {torch.bfloat16}
    model[1].w2.data[0, 0, 0] = whole
    assert q.quantise_experts(model, form)[1].moe_lowering_quantisation == form


@pytest.mark.parametrize("field", ["weight", "scale", "offset"])
def test_quantised_tensors_that_do_not_belong_together(field):
    made = q.quantise_weight(torch.ones(4, 8).half(), "w4a16", group_size=2)
    for wrong in (3, torch.tensor(1.0), torch.ones(3, 3), torch.ones(4, 8, dtype=torch.bool)):
        with pytest.raises(TypeError, match=rf"dequantise: quantised\.{field} is .*; accepted: "):
            q.dequantise(dataclasses.replace(made, **{field: wrong}))
    assert torch.allclose(q.dequantise(made), torch.ones(4, 8), atol=1e-3)


def test_a_token_mask_of_another_size():
    """Where transformers' experts are computed; the twin is a mask with one element for each token, of any shape."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    integration.register()
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=INNER, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = integration.NAME
    module = Qwen3MoeExperts(config)
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    x, weights = torch.ones(T, H), torch.ones(T, K)
    with torch.no_grad():
        with integration.token_mask(torch.ones(T + 1, dtype=torch.bool)), pytest.raises(ValueError) as caught:
            module(x, IDS, weights)
        assert f"token_mask: mask has shape [{T + 1}]" in str(caught.value)
        with integration.token_mask(torch.tensor([[True], [False], [True]])):
            assert module(x, IDS, weights).abs().sum(-1).bool().tolist() == [True, False, True]


# --- operators ----------------------------------------------------------------------------------------------------------


def operator_arguments() -> list[tuple[str, str]]:
    """Tensors of an operator that must be there, where another tensor may make torch call it without."""
    found = []
    for name in custom_ops.__all__:
        schema = getattr(torch.ops.moe_lowering, name).default._schema
        tensors = [each for each in schema.arguments if "Tensor" in str(each.type)]
        required = [each.name for each in tensors if str(each.type) == "Tensor"]
        found += [(name, argument) for argument in required if len(tensors) > 1]
    return found


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("operator", "argument"), operator_arguments())
def test_no_tensor_is_an_error_of_the_operator(operator, argument, device):
    call = getattr(torch.ops.moe_lowering, operator).default
    tensor = torch.ones(1, device=device)
    values = {"Tensor": tensor, "Optional[Tensor]": tensor, "List[Tensor]": [tensor], "int": 1, "float": 1.0, "str": ""}
    values |= {"bool": False, "Optional[List[Tensor]]": None, "Optional[int]": None}
    given = {each.name: values[str(each.type)] for each in call._schema.arguments if not each.has_default_value()}
    given[argument] = None
    with pytest.raises(ValueError, match=f"{operator}: {argument} is None; accepted: a tensor"):
        call(**given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ep_size": 0}, "ep_size is 0; accepted: an int, 1 or more"),
        ({"ep_size": "16"}, "ep_size is '16'; accepted: an int, 1 or more"),
        ({"ep_size": 4, "ep_rank": 4}, "ep_rank is 4; accepted: an int from 0 to 3"),
        ({"ep_size": 4, "tp_size": 3}, "tp_size is 3; accepted: a divisor of ep_size, 4"),
        ({"ep_size": 4, "soc": "A4"}, "Deployment: soc is 'A4'; accepted: A2, A3, A5, 310P"),
    ],
)
def test_fake_deployments_of_sizes_that_cannot_be(fields: dict[str, Any], message: str):
    """Before a group is made, and none is left: the next one, which can be, is made."""
    with pytest.raises(ValueError, match=re.escape(message)), testing.fake_deployment(**fields):
        pass
    with testing.fake_deployment(ep_size=4, tp_size=2) as deployment:
        assert (deployment.ep_size, deployment.tp_size) == (4, 2)


@pytest.mark.parametrize(("name", "error", "message"), [
    ("ep", TypeError, "fake_deployment: ep is no field of Deployment (did you mean ep_size, ep_rank?); accepted: soc, ep_size,"),
    ("xyz", TypeError, "fake_deployment: xyz is no field of Deployment; accepted: soc,"),
    ("mc2_group", ValueError, "fake_deployment: mc2_group cannot be given; groups are made here"),
])  # fmt: skip
def test_fake_deployments_take_fields_alone(name: str, error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)), testing.fake_deployment(**{"ep_size": 4, name: 2}):
        pass
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("mesh", [None, "cpu", 4])
def test_what_is_no_mesh_is_named(mesh):
    with pytest.raises(TypeError, match=r"^Deployment\.from_mesh: device_mesh is .*; accepted: a DeviceMesh"):
        Deployment.from_mesh(mesh)


class Mesh:
    """As much of a DeviceMesh as names need; it is sliced by what was asked for."""

    mesh_dim_names = ("dp", "tp")

    def __getitem__(self, names):
        raise KeyError(names)


@pytest.mark.parametrize("ep", [None, 0, (), ("dp", 1), [], b"dp"])
def test_a_dimension_of_a_mesh_is_a_name_or_several(ep):
    with pytest.raises(
        ValueError, match=r"from_mesh: ep is .*; accepted: of the mesh's dimensions .*one name or several"
    ):
        Deployment.from_mesh(Mesh(), ep=ep, tp=None)
    with pytest.raises(
        ValueError, match=r"dimensions \['dp', 'tp'\] \(\('dp', 'tp'\)\)"
    ):  # the twin: a list is a tuple
        Deployment.from_mesh(Mesh(), ep=["dp", "tp"], tp=None)
