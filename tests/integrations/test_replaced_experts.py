"""Experts of transformers that get its interface in place: against the untouched module's own loop, on small random models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moe_lowering import Deployment
from moe_lowering.families.listing import model_type
from moe_lowering.families.small_models import TINY, build, randomise
from moe_lowering.integrations.experts_interface import Interface
from moe_lowering.integrations.replaced_experts import replace_experts
from moe_lowering.integrations.replacements import REPLACED
from moe_lowering.integrations.transformers import capabilities, register
from moe_lowering.layers.expert_modules import is_experts_module
from moe_lowering.layers.sharding import shard_experts
from moe_lowering.model_configs.read import read_text_config
from moe_lowering.model_configs.small import shrink

FAMILIES = {
    "step3p7": "Step3p7Experts",
    "llama4": "Llama4TextMoe",
    "longcat_flash": "LongcatFlashExperts",
    "dbrx": "DbrxExperts",
    "switch_transformers": "SwitchTransformersSparseMLP",
    "jetmoe": "JetMoeMoE",
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
TOKENS, LARGE = 24, 3.0


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def made(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, str]:
    """The untouched model, one with the same weights that was replaced, and the name of a replaced module."""
    own = build(shrink(read_text_config(model_type(family)), TINY, 1), dtype, None)
    randomise(own)
    model = copy.deepcopy(own)
    found = replace_experts(model)
    assert type(own.get_submodule(found[0])).__name__ == FAMILIES[family]
    assert replace_experts(model) == [], "a second time changes nothing"
    return own, model, found[0]


def inputs(family: str, module: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Of the module: hidden states, and ids and weights where it is told of them."""
    generator = torch.Generator().manual_seed(3)
    x = (LARGE * torch.randn(2, TOKENS // 2, TINY.hidden, generator=generator)).to(dtype)
    if family in ("llama4", "switch_transformers", "jetmoe"):
        return (x,)
    experts = getattr(module, "total_experts", TINY.experts)  # longcat_flash: with those that return their token
    ids = torch.rand(TOKENS, experts, generator=generator).topk(TINY.top_k).indices
    weights = torch.rand(TOKENS, TINY.top_k, generator=generator).to(dtype)
    return (x if family == "dbrx" else x.flatten(0, 1)), ids, weights


def difference(actual, expected) -> float:
    a, b = ((each[0] if isinstance(each, tuple) else each).double() for each in (actual, expected))
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def test_every_replaced_class_is_tried():
    assert set(FAMILIES.values()) == set(REPLACED)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replaced_module_computes_what_it_did(family: str, dtype: torch.dtype):
    own, model, name = made(family, dtype)
    old, new = own.get_submodule(name), model.get_submodule(name)
    arguments = inputs(family, old, dtype)
    expected = old(*arguments)
    assert difference(new(*arguments), expected) < TOLERANCE[dtype]
    assert isinstance(new, type(old)), "code that asks for the class still finds it"
    # the twin: another order of the experts is seen
    (experts,) = [module for module in new.modules() if is_experts_module(module)]
    experts.down_proj.copy_(experts.down_proj.flip(0))
    assert difference(new(*arguments), expected) > TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replaced_module_is_one_graph_in_bfloat16(family: str):
    """switch_transformers' router casts its classifier in its first forward, which no graph can."""
    _, model, name = made(family, torch.bfloat16)
    module = model.get_submodule(name)
    arguments = inputs(family, module, torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(module, backend="eager", fullgraph=True)(*arguments)
        assert difference(compiled, module(*arguments)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dicts_keep_the_keys_and_what_is_loaded_is_computed(family: str):
    own, model, name = made(family)
    old, new = own.state_dict(), model.state_dict()
    assert [*old] == [*new] if family != "dbrx" else set(old) == set(new)
    for key, tensor in old.items():
        assert torch.equal(tensor[: len(new[key])] if tensor.dim() else tensor, new[key]), key
    other = build(shrink(read_text_config(model_type(family)), TINY, 1), torch.float32, None)
    randomise(other, seed=1)
    assert not model.load_state_dict(other.state_dict(), strict=True).missing_keys
    arguments = inputs(family, own.get_submodule(name), torch.float32)
    expected = other.get_submodule(name)(*arguments)
    assert difference(model.get_submodule(name)(*arguments), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", ["dbrx", "switch_transformers"])
def test_what_does_not_fit_is_not_loaded(family: str):
    _, model, name = made(family)
    state = model.state_dict()
    key = next(key for key in state if key.startswith(name) and key.endswith(("w1", "wi.weight")))
    kept = state[key].clone()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({other: value for other, value in state.items() if other != key})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state, f"{name}.nothing": kept})
    with pytest.raises(RuntimeError, match="accepted:"):
        model.load_state_dict({**state, key: kept[:1]})
    assert torch.equal(model.state_dict()[key], kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_capabilities_find_them(family: str):
    own, model, _ = made(family)
    assert any(supported for _, supported, _ in capabilities(model))
    left = [reason for _, supported, reason in capabilities(model) if not supported]
    assert bool(left) == (family == "jetmoe") and all("of_attention" in reason for reason in left)
    assert all(reason.startswith("[experts.") for _, _, reason in capabilities(own))


@pytest.mark.parametrize("family", ["dbrx", "step3p7", "longcat_flash"])
def test_they_are_cut_for_ranks(family: str):
    _, model, _ = made(family)
    (experts,) = [module for module in model.modules() if is_experts_module(module)]
    whole = experts.down_proj if experts.is_transposed else experts.down_proj.transpose(1, 2)
    shard_experts(model, Deployment(ep_size=2, ep_rank=1, ep_group="0", max_tokens=64))
    assert torch.equal(experts.down_proj, whole[4:]) and experts.is_transposed


def test_other_code_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(REPLACED["DbrxExperts"].code, "DbrxExpertGLU", "0" * 16)
    model = build(shrink(read_text_config("dbrx"), TINY, 1), torch.float32, None)
    assert replace_experts(model) == []


def test_a_routing_that_the_replacement_has_not_is_refused_before_anything_is_changed():
    config = shrink(read_text_config("llama4"), TINY, 1)
    config.num_experts_per_tok = 2
    model = build(config, torch.float32, None)
    with pytest.raises(ValueError, match=r"num_experts_per_tok is 2 .*accepted: 1"):
        replace_experts(model)
    assert not any(isinstance(module, Interface) for module in model.modules())


def test_a_clamp_of_step3p7_is_computed():
    own, model, name = made("step3p7")
    for each in (own, model):
        each.get_submodule(name).limit = 0.5
    arguments = inputs("step3p7", own.get_submodule(name), torch.float32)
    expected = own.get_submodule(name)(*arguments)
    assert difference(model.get_submodule(name)(*arguments), expected) < TOLERANCE[torch.float32]
    own.get_submodule(name).limit = float("inf")
    assert difference(own.get_submodule(name)(*arguments), expected) > 0.1
