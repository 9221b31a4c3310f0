"""A transformers model as it is, on the simulated device: experts and routers are raised and captured, with only our options."""

import copy

import pytest
import torch

from moe_lowering import Deployment, MoeLowering, npugraph_ex_options, simulator

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def model():
    simulator.enable_device()
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # it imports torch_npu

    torch.manual_seed(5)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).to(torch.bfloat16).eval()


def test_a_plain_model_is_raised_and_captured(model):
    torch._dynamo.reset()
    lowering = MoeLowering(Deployment(soc="A3"), strict=True)
    on_device = copy.deepcopy(model).to("npu")
    compiled = torch.compile(
        on_device,
        backend="npugraph_ex",
        options=npugraph_ex_options(lowering.deployment, lowering=lowering),
        fullgraph=True,
    )
    before = simulator.device.counts()
    with torch.inference_mode():
        for step in range(3):  # one capture, and replays with other routings
            ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))
            expected = model(ids, use_cache=False).logits
            torch.testing.assert_close(
                compiled(ids.to("npu"), use_cache=False).logits.cpu(), expected, rtol=0.05, atol=0.02
            )
    done = simulator.device.counts() - before
    assert done.captured == 1 and done.replayed == 3
    (report,) = lowering.reports
    assert [(block.comm, block.raised_from) for block in report.blocks] == [("allgather", "grouped_mm")]
    assert [router.became for router in report.routers] == ["npu.npu_moe_gating_top_k"]
    assert report.fully_lowered and not report.not_capturable


def test_raising_that_is_off_leaves_the_model_and_says_so(model):
    """The twin: the same model; torch_npu has no kernel of ``_grouped_mm``, so that it is only traced."""
    from moe_lowering import testing

    lowering = MoeLowering(Deployment(soc="A3"), raise_foreign="off")
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with torch.inference_mode():
        report = testing.lower_graph(
            lambda ids: model(ids, use_cache=False).logits, ids, deployment=lowering.deployment, lowering=lowering
        ).report
    assert [layer.code for layer in report.foreign] == ["foreign.grouped_mm"]
    assert not report.blocks and not report.routers and not report.fully_lowered
