"""Experts modules of transformers that are no SwiGLU between two matmuls, against the module's own loop."""

from __future__ import annotations

import functools
import warnings

import pytest
import reference
import torch
from torch import nn

from moe_lowering import Deployment
from moe_lowering.experts import list_experts
from moe_lowering.explanation.modules import describe_modules
from moe_lowering.families.listing import model_type
from moe_lowering.families.small_models import TINY, build, randomise
from moe_lowering.integrations.transformers import form_of, register, token_mask
from moe_lowering.layers.expert_modules import is_experts_module
from moe_lowering.layers.sharding import shard_experts
from moe_lowering.model_configs.read import read_text_config
from moe_lowering.model_configs.small import shrink
from moe_lowering.quantisation import quantise_experts

ACTIVATIONS = {"nemotron_h": "relu2", "muse_spark": "swiglu", "inkling2": "swiglu_softcap"}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def made(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A model, and its experts module with weights that are large enough for caps to act."""
    model = build(shrink(read_text_config(model_type(family)), TINY, 1), dtype)
    randomise(model)
    module = next(each for each in model.modules() if is_experts_module(each))
    first = module.gate_up_proj if module.has_gate else module.up_proj
    first.mul_(8)
    return model, module


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(TOKENS, TINY.hidden, generator=generator).to(dtype)
    ids = torch.rand(TOKENS, TINY.experts, generator=generator).topk(TINY.top_k).indices
    return x, ids, torch.rand(TOKENS, TINY.top_k, generator=generator)


def computed(module: nn.Module, implementation: str, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
    module.config._experts_implementation = implementation
    return module(*arguments)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ACTIVATIONS)
def test_it_is_recognised_and_agrees_with_the_models_own_loop(family: str, dtype: torch.dtype):
    _, module = made(family, dtype)
    assert form_of(module).activation == ACTIVATIONS[family]
    arguments = inputs(dtype)
    expected = computed(module, "eager", arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reference.relative_error(computed(module, "moe_lowering", arguments), expected) < TOLERANCE[dtype]


def without_square(module: nn.Module) -> None:
    module.act_fn = nn.ReLU()


def without_norm(module: nn.Module) -> None:
    module.has_post_expert_norm = False


def other_cap(module: nn.Module) -> None:
    module.act_fn.up_softcap.softcap = 0.5


TWINS = {"nemotron_h": without_square, "muse_spark": without_norm, "inkling2": other_cap}


@pytest.mark.parametrize("family", TWINS)
def test_the_same_with_one_thing_changed_is_seen(family: str):
    _, module = made(family)
    arguments = inputs(torch.float32)
    expected = computed(module, "eager", arguments)
    TWINS[family](module)
    assert reference.relative_error(computed(module, "moe_lowering", arguments), expected) > TOLERANCE[torch.bfloat16]


def other_forward(module: nn.Module, attribute: str) -> None:
    """A class of the same name, with another forward."""
    owner = functools.reduce(getattr, attribute.split("."), module)
    made = type(type(owner).__name__, (type(owner),), {"forward": lambda self, *x: x[0]})
    owner.__class__ = made


@pytest.mark.parametrize(
    ("family", "attribute"), [("inkling2", "act_fn"), ("inkling2", "act_fn.up_softcap"), ("nemotron_h", "act_fn")]
)
def test_other_code_is_not_recognised(family: str, attribute: str):
    _, module = made(family)
    other_forward(module, attribute)
    assert "activation is" in form_of(module).unrecognised or "not known" in form_of(module).unrecognised


def test_masked_tokens_of_a_module_that_normalises_give_zero():
    _, module = made("muse_spark")
    x, ids, weights = inputs(torch.float32)
    expected = computed(module, "eager", (x, ids, weights))
    mask = torch.arange(TOKENS) % 3 > 0
    x[~mask] = float("nan")
    with token_mask(mask):
        y = computed(module, "moe_lowering", (x, ids, weights))
    assert not y[~mask].any() and reference.relative_error(y[mask], expected[mask]) < TOLERANCE[torch.float32]


def test_experts_without_a_gate_are_cut_listed_and_described():
    model, module = made("nemotron_h")
    block = describe_modules(model)
    assert (block.activation, block.intermediate, block.hidden) == ("relu2", TINY.intermediate, TINY.hidden)
    whole = module.up_proj.transpose(1, 2)
    shard_experts(model, Deployment(ep_size=2, ep_rank=1, ep_group="0", max_tokens=64))
    assert torch.equal(module.up_proj, whole[4:]) and module.down_proj.shape == (4, TINY.intermediate, TINY.hidden)
    list_experts(model)
    assert [tuple(each.shape) for each in module.up_proj] == [(TINY.hidden, TINY.intermediate)] * 4


def test_experts_without_a_gate_are_quantised():
    model, module = made("nemotron_h", torch.bfloat16)
    arguments = inputs(torch.bfloat16)
    expected = computed(module, "eager", arguments)
    quantise_experts(model, "w8a8")
    assert module.up_proj.dtype == torch.int8
    assert reference.relative_error(computed(module, "moe_lowering", arguments), expected) < 0.05
