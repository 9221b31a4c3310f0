"""Models are refused where they are built: each wrong argument is one error that names it, its value, what is accepted."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import moe_lowering
from moe_lowering import Deployment, MoE, check_agreement, moe_experts, testing
from moe_lowering.custom_ops.route import GROUP_SCORES, SCORINGS
from moe_lowering.experts import list_experts, log2phy_from_expert_maps
from moe_lowering.functional import check_expert_map, route
from moe_lowering.layers.expert_modules import EXPERTS_IMPLEMENTATION
from moe_lowering.layers.sharding import shard_experts
from moe_lowering.quantisation import FORMATS, quantise_experts
from moe_lowering.vocabulary import ACTIVATIONS

H, INNER, E, K, T = 64, 64, 4, 2, 3


def layer(**changes):
    return MoE(**{"hidden_size": H, "intermediate_size": INNER, "num_experts": E, "top_k": K, **changes})


def experts(**changes):
    """One call of ``moe_experts``, with some arguments changed."""
    generator = torch.Generator().manual_seed(0)
    given = {
        "x": torch.randn(T, H, generator=generator),
        "weights": torch.ones(T, K) / K,
        "ids": torch.tensor([[0, 1], [2, 3], [1, 0]]),
        "w13": torch.randn(E, H, 2 * INNER, generator=generator),
        "w2": torch.randn(E, INNER, H, generator=generator),
        **changes,
    }
    return moe_experts(**given)


def maps(*rows):
    return [torch.tensor(row) for row in rows]


REFUSED = {
    "top_k above E": (lambda: layer(top_k=E + 1), f"MoE: top_k is {E + 1}; accepted: an int from 1 to {E}"),
    "no top_k": (lambda: layer(top_k=0), "MoE: top_k is 0"),
    "top_k of text": (lambda: layer(top_k="2"), "MoE: top_k is '2'"),
    "a flag for E": (lambda: layer(num_experts=True), "MoE: num_experts is True"),
    "no hidden size": (lambda: layer(hidden_size=0), "MoE: hidden_size is 0; accepted: an int, 1 or more"),
    "a negative size": (lambda: layer(intermediate_size=-5), "MoE: intermediate_size is -5"),
    "a fraction of a size": (lambda: layer(hidden_size=64.0), r"MoE: hidden_size is 64\.0"),
    "activation": (lambda: layer(activation="reglu"), f"activation is 'reglu'; accepted: {', '.join(ACTIVATIONS)}"),
    "no activation": (lambda: layer(activation=None), "activation"),
    "scoring": (lambda: layer(scoring="tanh"), f"scoring is 'tanh'; accepted: {', '.join(SCORINGS)}"),
    "group score": (lambda: layer(group_score="mean"), f"group_score is 'mean'; accepted: {', '.join(GROUP_SCORES)}"),
    "groups of nothing": (lambda: layer(num_groups=None), "MoE: num_groups is None; accepted: an int, 1 or more"),
    "a fraction of groups": (lambda: layer(topk_groups=1.0), r"MoE: topk_groups is 1\.0"),
    "a word for renormalize": (lambda: layer(renormalize="no"), "MoE: renormalize is 'no'; accepted: True or False"),
    "a word for interleaved": (lambda: layer(interleaved="no"), "MoE: interleaved is 'no'; accepted: True or False"),
    "a word for selection_bias": (lambda: layer(selection_bias="no"), "MoE: selection_bias is 'no'"),
    "a word for expert_bias": (lambda: layer(expert_bias="no"), "MoE: expert_bias is 'no'"),
    "a number for an expert map": (lambda: experts(expert_map=3), "moe_experts: expert_map is 3; accepted: an int32"),
    "a list for log2phy": (
        lambda: experts(log2phy=[0, 1, 2, 3]),
        r"moe_experts: log2phy is \[0, 1, 2, 3\]; accepted: an",
    ),
    "a word for a group of lines": (
        lambda: quantise_experts(layer(dtype=torch.bfloat16), "w4a16", group_size="x"),
        "quantise_experts: group_size is 'x'; accepted: an int, 1 or more",
    ),
    "a flag for a group of lines": (
        lambda: quantise_experts(layer(dtype=torch.bfloat16), "w4a16", group_size=True),
        "quantise_experts: group_size is True",
    ),
    "groups": (lambda: layer(num_groups=3), "num_groups is 3"),
    "groups kept": (lambda: layer(num_groups=2, topk_groups=3), "topk_groups is 3"),
    "a limit without a clamp": (lambda: layer(activation="gelu", limit=7.0), r"limit is 7\.0"),
    "NaN as a limit": (
        lambda: layer(activation="swiglu_clamp", limit=float("nan")),
        "MoE: limit is nan; accepted: a finite",
    ),
    "scale of text": (lambda: layer(scale="1"), "MoE: scale is '1'"),
    "shared experts": (lambda: layer(shared_experts=-1), "MoE: shared_experts is -1"),
    "deployment": (lambda: layer(deployment="A3"), "MoE: deployment is 'A3'; accepted: a moe_lowering.Deployment"),
    "ids past int32": (
        lambda: experts(ids=torch.tensor([[0, 1], [2**32, 3], [1, 0]])),
        f"ids has {2**32}, which is no int32; accepted: 0 to",
    ),
    "ids below int32": (lambda: experts(ids=torch.tensor([[0, 1], [2, -(2**32)], [1, 0]])), f"ids has {-(2**32)}"),
    "float ids": (lambda: experts(ids=torch.rand(T, K)), "ids is torch.float32; accepted: int32, int64"),
    "flags as ids": (lambda: experts(ids=torch.ones(T, K, dtype=torch.bool)), "ids is torch.bool"),
    "no x": (lambda: experts(x=None), "moe_experts: x is None; accepted: a tensor"),
    "x of numbers": (lambda: experts(x=[1.0]), r"moe_experts: x is \[1\.0\]; accepted: a tensor"),
    "a list with a hole": (lambda: experts(w13=[None] * E), r"moe_experts: w13 is \[None, .*accepted: a tensor of all"),
    "experts, deployment": (lambda: experts(deployment={}), "moe_experts: deployment is {}"),
    "shard, model": (lambda: shard_experts(None, Deployment()), "shard_experts: model is None; accepted: a torch.nn"),
    "shard, deployment": (
        lambda: shard_experts(layer(), None),
        "shard_experts: deployment is None; accepted: a moe_low",
    ),
    "shard, a class": (lambda: shard_experts(MoE, Deployment()), "shard_experts: model is <class"),
    "quantise, model": (lambda: quantise_experts("m", "w8a8"), "quantise_experts: model is 'm'"),
    "quantise, format": (lambda: quantise_experts(layer(), None), f"format is None; accepted: {', '.join(FORMATS)}"),
    "list, model": (lambda: list_experts(None), "list_experts: model is None"),
    "maps": (lambda: log2phy_from_expert_maps(None), "expert_maps is None; accepted: one map"),
    "a map of numbers": (lambda: log2phy_from_expert_maps([[0, 1]]), r"expert_maps\[0\] is \[0, 1\]"),
    "-2 in a map": (lambda: log2phy_from_expert_maps(maps([0, -2], [-1, 0])), r"maps\[0\] has -2 for expert 1"),
    "check, no map": (lambda: check_expert_map(None, E), "check_expert_map: expert_map is None"),
    "check, E": (lambda: check_expert_map(torch.arange(E), None), "check_expert_map: num_experts is None"),
    "-2 in one map": (lambda: check_expert_map(torch.tensor([0, 1, -2, 3]), E), "expert_map has -2 for expert 2"),
    "route, logits": (lambda: route(None, K), "route: logits is None"),
    "agreement, deployment": (lambda: check_agreement(None), "check_agreement: deployment is None"),
    "agreement, lowering": (lambda: check_agreement(Deployment(), 3), "check_agreement: lowering is 3"),
    "agreement, NaN": (
        lambda: check_agreement(Deployment(), timeout=float("nan")),
        "timeout is nan; accepted: seconds",
    ),
    "ranks, NaN": (lambda: testing.Ranks(1, collective_timeout=float("nan")), "collective_timeout is nan"),
    "ranks, size": (lambda: testing.Ranks(None), "Ranks: size is None; accepted: an int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_every_word_makes_a_layer(activation, scoring):
    """The twin: what the vocabularies have is accepted when the layer is built, and when it runs."""
    made = layer(activation=activation, scoring=scoring, limit=7.0 if ACTIVATIONS[activation].clamped else None)
    assert made(torch.randn(T, H)).shape == (T, H)


def test_ids_of_both_kinds_are_the_same_experts():
    ids = torch.tensor([[0, 1], [2, 3], [1, 0]])
    assert torch.equal(experts(ids=ids), experts(ids=ids.int()))


def test_maps_with_minus_one_are_placements():
    log2phy, physical = log2phy_from_expert_maps(maps([0, -1], [-1, 0]))
    assert (log2phy.tolist(), physical) == ([0, 1], 2)


# --- transformers' modules that another implementation computes -------------------------------------------------------

CHANGES = {
    "shard_experts": lambda model: shard_experts(model, Deployment()),
    "quantise_experts": lambda model: quantise_experts(model, "w8a8"),
    "list_experts": list_experts,
}


def modules(implementation: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=INNER, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = implementation
    made = nn.ModuleList(Qwen3MoeExperts(config) for _ in range(3))
    for parameter in made.parameters():
        nn.init.normal_(parameter)  # memory that nobody wrote may hold NaN, which is not quantised
    return made


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager", EXPERTS_IMPLEMENTATION])
def test_another_implementation_is_told(change, implementation):
    """Once for all modules; nothing is said where this package computes them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CHANGES[change](modules(implementation))
    told = [str(warning.message) for warning in caught if change in str(warning.message)]
    if implementation == EXPERTS_IMPLEMENTATION:
        assert not told
    else:
        (text,) = told
        assert f"0 and 2 more is computed by the experts implementation {implementation!r}" in text
        assert "call model.set_experts_implementation('moe_lowering')" in text
        assert moe_lowering.__name__ in text
