"""The dtype of routing weights that ``explain`` takes a model type to have: that of transformers' code and of the graph."""

from __future__ import annotations

import importlib
import inspect
import json

import pytest
import torch

from moe_lowering import Deployment, MoE, MoeLowering, cli
from moe_lowering.backends.aot import lowering_backend
from moe_lowering.cli.commands import parse
from moe_lowering.cli.explain.command import run_explain
from moe_lowering.explanation import BlockDescription, ExplainError, describe, explain
from moe_lowering.explanation.configs import describe_config
from moe_lowering.explanation.routing_weights import statements
from moe_lowering.explanation.spec import block_spec
from moe_lowering.families import listing
from moe_lowering.families.small_models import TINY, build, randomise, result
from moe_lowering.integrations import transformers as integration
from moe_lowering.model_configs.read import read_text_config
from moe_lowering.model_configs.small import shrink
from moe_lowering.passes import decision

# Whose dtype depends on how a model was loaded or configured, and whose experts are not lowered.
NOT_KNOWN = {"hunyuan_v1_moe", "switch_transformers", "jetmoe", "nllb-moe"}
SIZES = {"hidden": 1024, "intermediate": 512, "experts": 16, "top_k": 4}
GIVEN = torch.arange(16).view(2, 8) + 3


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()


def small(family: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """As ``moe-lowering models`` makes it, with one layer; its experts by transformers' interface are ours."""
    model = build(shrink(read_text_config(listing.model_type(family)), TINY, 1), dtype)
    randomise(model)
    return model


@pytest.mark.parametrize("family", listing.families())
def test_a_family_gives_the_routing_weights_that_are_written_down(family: str, monkeypatch: pytest.MonkeyPatch):
    """Its small model is run, and what its experts are given is looked at; the statement stands in its code."""
    config = read_text_config(listing.model_type(family))
    known = statements().get(config.model_type)
    assert (known is None) == (config.model_type in NOT_KNOWN)
    if known is None:
        return
    code = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    assert known[1] in inspect.getsource(code)
    given = []
    monkeypatch.setattr(integration, "moe_experts", recorder(given))
    with torch.no_grad():
        result(small(family), GIVEN)
    assert set(given) == {describe_config(config, dtype=torch.bfloat16, **SIZES).routing_dtype}


def recorder(given: list[torch.dtype]):
    experts = integration.moe_experts

    def record(x, weights, *more, **options):
        given.append(weights.dtype)
        return experts(x, weights, *more, **options)

    return record


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_what_is_described_is_what_the_pass_finds(family: str, monkeypatch: pytest.MonkeyPatch):
    """Every field of the record that a decision is made from, of one family of each kind."""
    found = []
    judge = decision.judge
    monkeypatch.setattr(
        decision, "judge", lambda spec, *more, **named: (found.append(spec), judge(spec, *more, **named))[1]
    )
    model = small(family)
    with torch.no_grad():
        result(torch.compile(model, backend=lowering_backend(MoeLowering(Deployment())), fullgraph=True), GIVEN)
    described = block_spec(describe(model), Deployment(), GIVEN.numel())
    differ = {
        name: (getattr(found[0], name), getattr(described, name))
        for name in (
            "hidden",
            "top_k",
            "dtype",
            "routing_dtype",
            "activation",
            "quantisation",
            "intermediate",
            "experts",
        )
        if getattr(found[0], name) != getattr(described, name)
    }
    assert not differ


@pytest.mark.parametrize(
    ("tokens", "choices"),
    [(41, ("allgather", "allgather")), (44, ("allgather", "fused_mc2")), (48, ("fused_mc2", "fused_mc2"))],
)
def test_near_a_boundary_the_dtype_decides(tokens: int, choices: tuple[str, str]):
    """Qwen3-30B gives 16 bits, of which the fused operator wants a cast; the twin gives float32."""
    explanation = run_explain(parse(["explain", "qwen3_30b", "--ep", "8", "--tokens", str(tokens)])).explanation
    block = explanation.block
    assert block.routing_weights == "activations" and block.routing_dtype == torch.bfloat16
    twin = BlockDescription(**{name: getattr(block, name) for name in SIZES}, routing_weights="float32")
    assert (
        explanation.answer.choice,
        explain(twin, explanation.question.deployment, tokens=tokens).answer.choice,
    ) == choices


@pytest.mark.parametrize(("model", "choices"), [("qwen3_30b", ["allgather"]), ("deepseek_v2_lite", ["fused_mc2"])])
def test_near_a_boundary_lower_chooses_the_same(model: str, choices: list[str], capfd: pytest.CaptureFixture[str]):
    """At 44 tokens a family of 16 bits, whose choice is another one in float32, and one of float32."""
    given = [model, "--ep", "8", "--tokens", "44"]
    capfd.readouterr()
    assert cli.main(["lower", *given, "--fake", "--layers", "1", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    lowered = [block["comm"] for block in found["blocks"]]
    assert found["model"] == model, "as explain names it"
    assert lowered == choices == [run_explain(parse(["explain", *given])).explanation.answer.choice]


def test_what_is_not_known_is_assumed_and_said():
    """The twins: a type that is known, our own layer, and float32, in which everything is float32."""

    def assumed(model, **options) -> bool:
        explanation = explain(describe(model, **options), Deployment())
        return any("routing weights are float32" in text for text in explanation.assumptions)

    assert assumed(None, **SIZES) and assumed("hunyuan_v1_moe") and assumed(BlockDescription(**SIZES))
    assert (
        not assumed("qwen3_moe")
        and not assumed("moe")
        and not assumed(MoE(64, 32, 4, 2, dtype=torch.bfloat16, device="meta"))
    )
    assert not assumed(None, **SIZES, dtype=torch.float32)
    assert describe("qwen3_moe", dtype=torch.float32).routing_dtype == torch.float32
    with pytest.raises(ExplainError, match="routing_weights is 'bfloat16'; accepted: float32, activations, or None"):
        BlockDescription(**SIZES, routing_weights="bfloat16")
