"""What others' models trace to, by torch.compile and torch.export, on one rank and on two, is raised and right."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import raise_rank_jobs
import reference
import torch
from foreign_forms import APART, FLOAT, FORMS, SHARED, Foreign, apart, titan_scatter
from raise_graphs import lower
from rank_pools import Ranks
from torch import Tensor, nn

from moe_lowering import Deployment, MoeLowering
from moe_lowering.backends.aot import lowering_backend
from moe_lowering.projections import join_projections
from moe_lowering.testing import assert_lowered, lower_graph

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import dense_models

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def compile_and_run(model, dynamic=False, **options):
    lowering = MoeLowering(Deployment(), **options)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lowering_backend(lowering), fullgraph=True, dynamic=dynamic)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        return compiled(torch.arange(8).reshape(2, 4), use_cache=False).logits, lowering.reports[-1]


@pytest.mark.parametrize(
    "implementation, dtype, dynamic", [("grouped_mm", torch.bfloat16, True), ("batched_mm", torch.float32, False)]
)
def test_a_model_of_transformers_as_it_is(implementation, dtype, dynamic):
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **COMMON, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, head_dim=16, pad_token_id=0
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval().to(dtype)
    model.set_experts_implementation(implementation)
    expected, _ = compile_and_run(model, dynamic, raise_foreign="off")
    found, report = compile_and_run(model, dynamic, strict=True)
    assert [block.name for block in report.blocks] == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    form = "grouped_mm" if implementation == "grouped_mm" else "gathered_weights"
    assert {(block.comm, block.raised_from) for block in report.blocks} == {("allgather", form)}
    assert report.foreign == () and report.fully_lowered
    reference.assert_near(found, expected.double(), dtype)


@pytest.mark.parametrize("kind", ["bfloat16", "symbolic sizes"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_models_without_experts_raise_nothing(name, kind):
    """A sample of benchmarks/dense_models.py, which makes hundreds of such graphs."""
    found = dense_models.measure(dense_models.Tracer(name).trace(kind))
    assert found["nodes"] > 200 and found["unchanged"]
    assert (found["blocks"], found["routers"], found["foreign"]) == (0, 0, [])


class Titan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        made = LAYER.make()
        for name in (*APART, *SHARED):
            self.register_parameter(name, nn.Parameter(made[name], requires_grad=False))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return titan_scatter(x, weights, ids, w1=self.w1, w2=self.w2, w3=self.w3, shared=self.shared)


LAYER = Foreign("grouped_mm", titan_scatter, APART | SHARED, apart, FLOAT, base="shared")


def test_projections_that_are_joined_once_are_not_joined_in_every_forward():
    made, module = LAYER.make(), Titan()
    args = [made[name] for name in ("x", "weights", "ids")]
    before = module(*args)
    lowered = lower_graph(module, *args, deployment=Deployment())
    assert "aten.cat" in lowered.ops_after and any("join_projections" in n for n in lowered.report.blocks[0].notes)
    assert join_projections(module) == [""] and join_projections(module) == []
    assert torch.equal(module(*args), before) and set(dict(module.named_parameters())) == {"w1_w3", "w2", "shared"}
    lowered = lower_graph(module, *args, deployment=Deployment())
    assert_lowered(lowered, comm="allgather", blocks=1)
    assert "aten.cat" not in lowered.ops_after and not any("every forward" in n for n in lowered.report.blocks[0].notes)


def test_projections_that_cannot_be_joined():
    module = Titan()
    with pytest.raises(ValueError, match="no module of Titan has parameters 'gate' and 'w3'"):
        join_projections(module, gate="gate")
    with pytest.raises(ValueError, match=r"has w1 .* and w2 .*; accepted: two tensors"):
        join_projections(module, up="w2")
    assert set(dict(module.named_parameters())) == {"w1", "w2", "w3", "shared"}


def test_an_exported_program_is_raised():
    """``ExportedProgram.graph_module`` after functionalisation, and what ``module()`` runs."""
    made = LAYER.make()
    args = tuple(made[name] for name in ("x", "weights", "ids"))
    program = torch.export.export(Titan(), args).run_decompositions({})
    (block,) = lower(program.graph_module, strict=True).blocks
    assert block.comm == "allgather" and block.raised_from == "grouped_mm"
    reference.assert_near(program.module()(*args), LAYER.reference(made), FLOAT)


@pytest.fixture(scope="module")
def pool():
    with Ranks(
        int(os.environ.get("MOE_LOWERING_RANKS", "2")), setup=raise_rank_jobs.setup, collective_timeout=60
    ) as ranks:
        yield ranks


@pytest.mark.parametrize("comm", ["allgather", "mc2"])
def test_experts_on_two_ranks(pool, comm):
    """Weights of one rank, ids of all experts: the layer is spread over the ranks of the deployment."""
    for rank, (blocks, unlowered, y) in enumerate(pool.run(raise_rank_jobs.lower_and_run, comm)):
        assert [block[:2] for block in blocks] == [(comm, "gathered_weights")], (blocks, unlowered)
        made = raise_rank_jobs.tensors(rank, torch.bfloat16)
        weights, ids = raise_rank_jobs.routed(made["x"], made["router"])
        expected = reference.moe(made["x"], weights, ids, made["w13"].transpose(1, 2), made["w2"].transpose(1, 2))
        reference.assert_near(y, expected, torch.bfloat16)


def test_the_forms_name_themselves():
    from moe_lowering.passes.raise_foreign.find_foreign_blocks import FORMS as TABLE

    assert {layer.form for layer in FORMS.values()} <= TABLE.keys()
