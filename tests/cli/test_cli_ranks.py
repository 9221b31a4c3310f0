"""``moe-lowering lower`` on several ranks, from the command line: every implementation, quantised experts, both fused modes.

The smallest models that the operators take: what is compared is the same as for large ones. On two cores 15 s a command.
"""

from __future__ import annotations

import json

import pytest
import torch

from moe_lowering import cli
from moe_lowering.cli.lower import compare
from moe_lowering.passes.implementations import IMPLEMENTATIONS

SMALLEST = ("--layers", "1", "--tokens", "4")
OPERATORS = {
    "allgather": "npu.npu_moe_init_routing_v2",
    "alltoall": "_c10d_functional.all_to_all_single",
    "mc2": "npu.npu_moe_distribute_dispatch_v2",
    "fused_mc2": "moe_lowering.dispatch_ffn_combine",
}


def lower(capfd: pytest.CaptureFixture[str], given: str) -> dict:
    """The JSON object of a command that must succeed."""
    torch._dynamo.reset()
    capfd.readouterr()
    code = cli.main(["lower", *given.split(), *SMALLEST, "--json"])
    printed = capfd.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


@pytest.mark.parametrize("comm", IMPLEMENTATIONS)
def test_every_implementation_on_four_ranks(comm: str, capfd: pytest.CaptureFixture[str]):
    found = lower(capfd, f"qwen3_moe --ep 4 --comm {comm}")
    (block,) = found["blocks"]
    assert block["comm"] == comm and OPERATORS[comm] in block["ops_after"]
    assert 0 < found["max_rel_error"] < compare.TOLERANCE["bfloat16"]


@pytest.mark.parametrize(
    ("given", "operator"),
    [
        ("allgather", "npu.npu_dynamic_quant"),
        ("alltoall", "npu.npu_dynamic_quant"),
        ("mc2", "npu.npu_moe_distribute_dispatch_v2"),
        ("fused_mc2 --fused-mode 1", "moe_lowering.dispatch_ffn_combine"),
        ("fused_mc2 --fused-mode 2", "moe_lowering.dispatch_gmm_combine_decode"),
    ],
)
def test_int8_experts_and_both_fused_modes_on_two_ranks(given: str, operator: str, capfd: pytest.CaptureFixture[str]):
    found = lower(capfd, f"moe --ep 2 --quant w8a8 --comm {given}")
    (block,) = found["blocks"]
    assert block["comm"] == given.split()[0] and operator in block["ops_after"]
    assert found["snr_db"] >= compare.SNR_FLOOR["w8a8"]
