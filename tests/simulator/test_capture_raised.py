"""Models that nobody wrote for this package, raised, lowered and captured on the simulated device with only our options.

In processes of their own: what npugraph_ex keeps of one captured model is not to meet that of another test's.
"""

import capture_raised_jobs as jobs
import pytest
import torch
from reference import relative_error

from moe_lowering import Deployment, MoeLowering, simulator, testing
from moe_lowering.simulator.device import Counts
from moe_lowering.testing import Ranks

CHAINS = {
    "bfloat16, fused": ({}, "fused_mc2", "moe_lowering::dispatch_ffn_combine"),
    "W8A8 with smooth scales": ({"quantisation": "w8a8", "smooth": "both"}, "allgather", "npu::npu_moe_init_routing_v2"),
    "W8A8, already": ({"quantisation": "w8a8", "smooth": "both"}, "mc2", "npu::npu_moe_distribute_dispatch_v2"),
}  # fmt: skip
ONCE = Counts(begun=2, empty=1, captured=1, replayed=3)  # npugraph_ex makes an empty capture for its pool


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2, setup=simulator.enable_device, collective_timeout=120) as pool:
        yield pool


@pytest.mark.parametrize("case", CHAINS)
def test_a_hand_written_chain_is_raised_and_captured(ranks, case):
    layer, comm, operator = CHAINS[case]
    for found, written, counts, operators, (blocks, _, whole) in ranks.run(jobs.capture_chain, layer, comm):
        assert [(chosen, raised) for chosen, raised, _ in blocks] == [(comm, "mc2_v2")] and whole
        assert counts == ONCE and operator in operators
        assert ("npu::npu_moe_distribute_dispatch_v2" in operators) == (comm == "mc2")
        for result, reference in found:
            assert relative_error(result, reference) < 4e-2
        assert relative_error(found[-1][0], written) < 4e-2
        assert not torch.equal(found[0][0], found[1][0])


def test_a_plain_model_is_raised_and_captured(ranks):
    (pairs, counts, (blocks, routers, whole)), _ = ranks.run(jobs.capture_model)
    assert counts.captured == 1 and counts.replayed == 3
    assert [(chosen, raised) for chosen, raised, _ in blocks] == [("allgather", "grouped_mm")]
    assert routers == ["npu.npu_moe_gating_top_k"] and whole
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_raising_that_is_off_leaves_the_model_and_says_so():
    """The twin: the same model; torch_npu has no kernel of ``_grouped_mm``, so that it is only traced."""
    simulator.enable()
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # it imports torch_npu

    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**jobs.MODEL)).to(torch.bfloat16).eval()
    lowering = MoeLowering(Deployment(soc="A3"), raise_foreign="off")
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with torch.inference_mode():
        report = testing.lower_graph(
            lambda ids: model(ids, use_cache=False).logits, ids, deployment=lowering.deployment, lowering=lowering
        ).report
    assert [layer.code for layer in report.foreign] == ["foreign.grouped_mm"]
    assert not report.blocks and not report.routers and not report.fully_lowered


def test_outputs_in_reference_cycles_do_not_break_the_next_capture(ranks):
    assert ranks.run(jobs.outputs_in_cycles) == [[True] * 7] * 2
