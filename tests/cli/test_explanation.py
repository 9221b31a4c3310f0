"""``moe_lowering.explain``: what it takes as a model, records, errors; verdicts and choices: test_explain.py."""

from __future__ import annotations

import dataclasses
import json
import pickle
from types import SimpleNamespace

import pytest
import torch

import moe_lowering
from moe_lowering import BlockDescription, Deployment, MoE, explain, quantise_experts, shard_experts
from moe_lowering.cli.commands import parse, run
from moe_lowering.explanation import ExplainError, MissingSizesError, describe
from moe_lowering.layers.expert_modules import is_experts_module
from moe_lowering.vocabulary import EXPERT_FORMATS

DEPLOYMENT = Deployment(
    soc="A3", ep_size=4, ep_rank=1, ep_group="ep", mc2_group="mc2", hccl_buffer_mb=1024, weight_format="nz",
    providers=(("vllm_ascend", "0.23.0"),), installed=(),
)  # fmt: skip
SIZES = {"hidden": 1024, "intermediate": 512, "experts": 16, "top_k": 4}
BLOCK = BlockDescription(**SIZES)
CONFIG = {
    "model_type": "brand_new", "hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 16,
    "num_experts_per_tok": 4, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip


def layer(hidden: int = 1024, **options) -> MoE:
    return MoE(hidden, 512, 16, 4, dtype=torch.bfloat16, device="meta", **options)


def meaning(block: BlockDescription) -> BlockDescription:
    """Without where it comes from, and what is known of our own layer alone: the dtype of its routing weights."""
    return dataclasses.replace(block, model=None, assumptions=(), routing_weights=None)


@pytest.mark.parametrize("given", ["values", "path", "module", "sharded module", "model of two layers", "description"])
def test_one_block_however_it_is_given(given, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    model = {
        "values": lambda: CONFIG,
        "path": lambda: path,
        "module": layer,
        "sharded module": lambda: shard_experts(layer(), DEPLOYMENT),
        "model of two layers": lambda: torch.nn.Sequential(layer(), layer()),
        "description": lambda: BLOCK,
    }[given]()
    found = explain(model, DEPLOYMENT, tokens=400)
    assert meaning(found.block) == BLOCK
    expected = explain(BLOCK, DEPLOYMENT, tokens=400)
    assert found.answer.choice == expected.answer.choice == "fused_mc2"
    assert found.answer.judgement.verdicts == expected.answer.judgement.verdicts
    assert explain(model, DEPLOYMENT, tokens=128, quantisation="w8a8").block.quantisation == "w8a8"


@pytest.mark.parametrize("format", [name for name, form in EXPERT_FORMATS.items() if form.quantised])
def test_a_quantised_module_says_so_itself(format):
    module = quantise_experts(MoE(64, 64, 2, 1, dtype=torch.bfloat16), format)
    expected = BlockDescription(hidden=64, intermediate=64, experts=2, top_k=1, quantisation=format)
    assert meaning(describe(module)) == expected


def test_layers_that_differ_are_refused_by_name():
    with pytest.raises(
        ExplainError, match="Sequential has MoE layers that differ, such as '0' and '1'; accepted: one of these"
    ):
        explain(torch.nn.Sequential(layer(), layer(2048)), DEPLOYMENT)
    with pytest.raises(ExplainError, match="Linear has no MoE layer; accepted: a model with MoE layers"):
        explain(torch.nn.Linear(2, 2, device="meta"), DEPLOYMENT)


def test_what_a_module_computes_is_read_from_it():
    block = describe(layer(activation="swiglu_oai", limit=5.0, interleaved=True, expert_bias=True))
    assert (block.activation, block.limit, block.alpha, block.interleaved, block.has_bias) == (
        "swiglu_oai", 5.0, 1.702, True, True,
    )  # fmt: skip
    codes = {v.code for v in explain(block, DEPLOYMENT).answer.judgement.verdicts["fused_mc2"].violations}
    assert {"fused.activation", "fused.gate_order", "fused.bias"} <= codes


def test_a_model_of_transformers_says_it_as_its_config_does():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(num_hidden_layers=2, dtype="bfloat16")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    of_config, of_model = meaning(describe(config)), meaning(describe(model))
    assert of_model == dataclasses.replace(of_config, weights_contiguous=False)
    for ranks, stored in ((1, False), (4, True)):  # shard_experts lays them out, and on one rank nobody does
        answer = explain(of_model, DEPLOYMENT.replace(ep_size=ranks, ep_rank=0)).answer
        assert answer.spec.weights_contiguous == stored
        assert explain(of_config, DEPLOYMENT.replace(ep_size=ranks, ep_rank=0)).answer.spec.weights_contiguous


def test_experts_alone_do_not_say_how_many_a_token_has():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=32, vocab_size=8)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    experts = next(module for module in model.modules() if is_experts_module(module))
    assert meaning(describe(model)).top_k == 2
    experts.config = None
    with pytest.raises(
        ExplainError, match="does not say how many experts a token has; accepted: the model that it is a part"
    ):
        describe(experts)
    experts.config = SimpleNamespace(num_experts_per_tok="two")
    with pytest.raises(ExplainError, match="model: num_experts_per_tok is 'two'; accepted: an integer"):
        describe(experts)


def test_the_command_says_what_the_library_says():
    given = "explain --hidden 1024 --intermediate 512 --experts 16 --topk 4 --ep 4 --tokens 128 --sweep tokens=1..2048"
    printed = json.loads(run(parse([*given.split(), "--provider", "vllm_ascend=0.23.0"]), print).to_json())
    found = json.loads(json.dumps(explain(BLOCK, DEPLOYMENT, tokens=128, sweep=(1, 2048)).to_json()))
    for field in ("block", "choice", "reason", "sizes", "verdicts", "sweep", "policy"):
        assert printed[field] == found[field], field


def test_unequal_tokens_are_judged_at_the_declared_bound():
    deployment = DEPLOYMENT.replace(equal_tokens=False, max_tokens=600)
    answer = explain(BLOCK, deployment).answer
    assert answer.tokens == 600 and not answer.judgement.verdicts["mc2"].legal
    assert explain(BLOCK, deployment.replace(max_tokens=512)).answer.judgement.verdicts["mc2"].legal
    with pytest.raises(ExplainError, match="tokens is 3, and T is not equal on the ranks"):
        explain(BLOCK, deployment, tokens=3)


def test_shared_expert_ranks_hold_no_routed_experts():
    """The rank with routed experts is judged, whichever rank asks, also one that is not known."""
    deployment = DEPLOYMENT.replace(ep_size=6, shared_expert_ranks=2, ep_rank=None)
    found = [explain(BLOCK, deployment.replace(ep_rank=rank)).answer for rank in (None, 0, 5)]
    assert {answer.spec.local_experts for answer in found} == {4}
    assert found[0].judgement.verdicts == found[1].judgement.verdicts == found[2].judgement.verdicts
    with pytest.raises(ExplainError, match="deployment: has 3 ranks with routed experts; accepted: a divisor"):
        explain(BLOCK, DEPLOYMENT.replace(ep_size=5, shared_expert_ranks=2))


def test_assumptions_are_those_of_this_question():
    known, unknown = (explain(BLOCK, DEPLOYMENT.replace(cann=cann)).assumptions for cann in ("9.1.0", ""))
    assert set(unknown) - set(known) == {"the CANN version is not known: rules for any version apply"}


WRONG = [
    ({"model": "qwen4_moe"}, "explain: model is 'qwen4_moe' (did you mean"),
    ({"model": 3}, "explain: model is 3; accepted: a torch.nn.Module, a config of transformers"),
    ({"model": {**CONFIG, "hidden_size": "wide"}}, "explain: model: hidden_size is 'wide'; accepted: an integer"),
    (
        {"model": {**CONFIG, "swiglu_alpha": "much"}},
        "explain: model: swiglu_alpha is 'much'; accepted: a finite number",
    ),
    ({"model": {**CONFIG, "hidden_act": "tanh"}}, "explain: model: the activation of brand_new is tanh, which"),
    (
        {"model": {"hidden_size": 8}},
        "explain: model: the config of an unnamed model does not say all sizes: intermediate,",
    ),
    ({"model": None}, "explain: model: no model is given: hidden, intermediate, experts, top_k missing"),
    ({"deployment": "A3"}, "explain: deployment is 'A3'; accepted: a moe_lowering.Deployment"),
    (
        {"deployment": DEPLOYMENT.replace(ep_size=3)},
        "explain: deployment: has 3 ranks with routed experts; accepted: a divisor",
    ),
    ({"tokens": -1}, "explain: tokens is -1; accepted: an integer from 0"),
    ({"tokens": True}, "explain: tokens is True; accepted: an integer from 0"),
    ({"comm": "nccl"}, "explain: comm is 'nccl'; accepted: auto, allgather"),
    ({"policy": "fastest"}, "explain: policy is 'fastest'; accepted: auto, fixed"),
    ({"policy": "fixed"}, "explain: comm is 'auto' with policy 'fixed'; accepted: allgather"),
    ({"quantisation": "fp8"}, "explain: quantisation is 'fp8'; accepted: none, w8a8"),
    ({"sweep": (9, 1)}, "explain: sweep is (9, 1); accepted: (low, high) with 0 <= low"),
    ({"sweep": 7}, "explain: sweep is 7; accepted: (low, high)"),
]


@pytest.mark.parametrize(("given", "says"), WRONG, ids=[says[:40] for _, says in WRONG])
def test_a_wrong_argument_is_named_with_its_value(given, says):
    right = {"model": BLOCK, "deployment": DEPLOYMENT}
    explain(**right)
    with pytest.raises(ExplainError) as caught:
        explain(**{**right, **given})
    assert str(caught.value).startswith(says) and "; accepted: " in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (type(caught.value), str(caught.value))


@pytest.mark.parametrize(("field", "value"), [
    *((name, value) for name in SIZES for value in (0, -1, 2**31, 1.5, True, "8")), ("top_k", 17), ("dtype", torch.int8),
    ("dtype", "bfloat16"), ("activation", "reglu"), ("quantisation", "w8"), ("limit", -1.0), ("limit", float("nan")),
    ("alpha", "1"), ("interleaved", 1), ("has_bias", None),
])  # fmt: skip
def test_a_description_refuses_what_no_block_has(field, value):
    with pytest.raises(ExplainError, match=f"explain: {field} is .*; accepted: ") as caught:
        BlockDescription(**{**SIZES, field: value})
    assert caught.value.argument == field


def test_biases_are_for_experts_that_are_not_quantised():
    BlockDescription(**SIZES, has_bias=True)
    with pytest.raises(
        ExplainError, match="quantisation is w8a8, and the experts of the block have biases; accepted: none"
    ):
        BlockDescription(**SIZES, has_bias=True, quantisation="w8a8")


def test_missing_sizes_are_named_for_who_asks():
    with pytest.raises(MissingSizesError) as caught:
        describe(None, hidden=8, top_k=1)
    assert (caught.value.model, caught.value.sizes) == (None, ("intermediate", "experts"))
    assert meaning(describe(None, **SIZES)) == BLOCK
    with pytest.raises(TypeError, match="describe: experts_per_token are no sizes; accepted: hidden, intermediate"):
        describe(None, experts_per_token=4)


def test_it_is_public():
    assert {"explain", "BlockDescription"} <= set(moe_lowering.__all__)
