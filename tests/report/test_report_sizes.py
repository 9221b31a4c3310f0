"""The sizes that the report shows of a lowered block, against numbers worked out by hand from the operators' documentation.

H = 1024, 8 experts, top 2. The window of MC2 on A3 (op-plugin's documentation of dispatch_v2, hidden 1024 in 16 bits):
2 * (E_local * M * ep * align(2048 + 64, 512) + (k + 1) * M * 2048) bytes.
"""

from __future__ import annotations

import json

import pytest
import torch

from moe_lowering import MoE, MoeLowering, testing
from moe_lowering.limits import TokenRange
from moe_lowering.passes import decision
from moe_lowering.report import BlockReport
from moe_lowering.report.text import render, render_sizes
from moe_lowering.report.width import WIDTH

DTYPE = torch.bfloat16
VIOLATION_KEYS = {
    "code", "operator", "quantity", "value", "limit", "accepted", "source", "sources", "message", "advice",
}  # fmt: skip


class Stack(torch.nn.Module):
    def __init__(self, deployment, layers=1):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            MoE(1024, 128, 8, 2, dtype=DTYPE, deployment=deployment) for _ in range(layers)
        )

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def lower(comm="auto", shape=(60, 1024), dynamic=False, layers=1, **fields):
    """The report of a lowered stack, and its first block."""
    with testing.fake_deployment(**{"ep_size": 2, **fields}) as deployment:
        x = torch.zeros(*shape, dtype=DTYPE)
        lowered = testing.lower_graph(Stack(deployment, layers), x, deployment=deployment, comm=comm, dynamic=dynamic)
    return lowered.report, lowered.report.blocks[0]


def sizes(*given, **more):
    block = lower(*given, **more)[1]
    assert block.comm is not None, block.reason
    return block.sizes


def test_static_sizes_of_mc2():
    found = sizes("mc2")
    assert (found.tokens.value, found.low, found.high, found.bound) == (60, 60, 60, 60)
    assert (found.capacity.value, found.received.value) == (60, 2 * 60 * 2)
    (window,) = found.windows
    assert window.code == "mc2.buffer"
    assert window.needed.value == window.needed.most == 2 * (4 * 60 * 2 * 2560 + 3 * 60 * 2048)
    assert (window.accepted, found.buffer_bytes) == (1024 * 2**20, 1024 * 2**20)
    assert window.needed_mb == 4  # 3,194,880 bytes
    assert found.exchanged is None and found.max_output_size is None
    assert found.range == "T = 60"


def test_the_shown_buffer_is_enough_and_one_less_is_refused():
    enough = sizes("mc2").windows[0].needed_mb
    assert lower("mc2", hccl_buffer_mb=enough)[1].comm == "mc2"
    refused = lower("mc2", hccl_buffer_mb=enough - 1)[1]
    assert refused.comm is None and refused.sizes is None
    assert "mc2.buffer" in {v.code for v in refused.verdicts["mc2"].violations}


def test_a_tp_rank_takes_a_share_that_is_rounded_up():
    found = sizes("mc2", shape=(61, 1024), ep_size=4, tp_size=2)
    assert (found.capacity.value, found.received.value) == (31, 4 * 31 * 2)


@pytest.mark.parametrize(("asked", "expected"), [(0, 2 * 60 * 2), (1000, 1000)])
def test_max_output_size_is_the_proven_bound_or_what_the_deployment_says(asked, expected):
    found = sizes("fused_mc2", max_output_size=asked)
    assert found.max_output_size == expected
    windows = {window.code: window for window in found.windows}
    assert windows["fused.window"].needed.value == 2 * 60 * 2 * 1024
    assert windows["fused.window"].accepted == 1024 * 2**20 // 3


def test_an_operator_that_is_not_told_a_bound_shows_none():
    assert sizes("fused_mc2", fused_mode=1).max_output_size
    assert sizes("mc2").max_output_size is None


@pytest.mark.parametrize(
    ("max_rows", "lines", "received"), [(0, 60, 240), (120, 60, 240), (119, 119, 119), (70, 70, 70)]
)
def test_buffers_of_alltoall_are_capped_by_max_rows(max_rows, lines, received):
    """60 tokens, 2 experts of each on a rank: from 120 rows on there is one line for each token instead of each row."""
    found = sizes("alltoall", max_rows=max_rows)
    assert (found.exchanged.value, found.received.value) == (lines, received)
    assert f"receives up to {received} rows; {lines} rows to each rank" in " ".join(
        "\n".join(render_sizes(found)).split()
    )
    assert found.windows == ()


def test_symbolic_sizes_are_expressions_in_the_users_names():
    block = lower("mc2", shape=(2, 30, 1024), dynamic=True)[1]
    found, tokens = block.sizes, "hidden.shape[0]*hidden.shape[1]"
    assert (str(found.tokens), found.low, found.high) == (tokens, 4, 512)
    assert (str(found.capacity), found.capacity.most) == (tokens, 512)
    assert (str(found.received), found.received.most) == (f"4*{tokens}", 4 * 512)
    assert str(found.windows[0].needed) == f"53248*{tokens}"  # 3,194,880 / 60
    assert found.windows[0].needed.most == 53248 * 512
    assert (found.range, block.enforced) == ("4 <= T <= 512", TokenRange(4, 512))
    assert block.to_json()["enforced"] == {"low": 4, "high": 512}
    assert block.to_json()["sizes"]["received"] == {"value": f"4*{tokens}", "most": 4 * 512}


def test_a_range_without_end_has_no_bound():
    found = sizes("allgather", shape=(2, 30, 1024), dynamic=True)
    assert (found.high, found.bound, found.received.most) == (None, None, None)
    assert found.range == "T >= 4"


def test_where_token_counts_differ_the_declared_bound_counts():
    found = sizes("mc2", equal_tokens=False, max_tokens=100)
    assert (str(found.tokens), found.low, found.high, found.bound) == ("T", 1, 100, 100)
    assert (found.capacity.value, found.received.value) == (100, 2 * 100 * 2)


def test_sizes_are_made_once_for_equal_blocks(monkeypatch):
    calls = []
    real = decision.block_sizes
    monkeypatch.setattr(decision, "block_sizes", lambda *given: calls.append(given) or real(*given))
    report, _ = lower("mc2", layers=3, shape=(2, 30, 1024), dynamic=True)
    assert len(report.blocks) == 3 and len(calls) == 1
    assert len({block.sizes for block in report.blocks}) == 1


# -------------------------------------------------------------------------------------------------------- text and JSON


def test_text_says_what_is_enforced_and_not_the_declared_bound():
    guarded = render(lower("mc2", shape=(2, 30, 1024), dynamic=True)[0])
    assert "assert_tokens: refuses to run outside of 4 <= T <= 512" in guarded
    declared = render(lower("allgather", shape=(2, 30, 1024), dynamic=True, max_tokens=300)[0])
    assert "refuses to run outside of 4 <= T <= 300" in declared
    static = render(lower("mc2")[0])
    assert "refuses to run" not in static


def test_text_shows_sizes_and_fits():
    text = render(lower("fused_mc2", shape=(2, 30, 1024), dynamic=True, layers=2)[0])
    flat = " ".join(text.split())
    assert max(map(len, text.splitlines())) <= WIDTH
    assert flat.count("T = hidden.shape[0]*hidden.shape[1]") == 1 and "capacity" not in flat, "one TP rank has all of T"
    assert "max_output_size 2048" in flat and "[fused.window] HCCL_BUFFSIZE of" in flat
    assert " MB would do for 4096*hidden.shape[0]*hidden.shape[1] (at most" in flat


def test_json_of_a_block_is_complete():
    found = json.loads(json.dumps(lower("auto", shape=(600, 1024))[1].to_json()))
    assert found["sizes"]["range"] == "T = 600"
    assert found["sizes"]["capacity"] == {"value": 600, "most": 600}
    for violation in found["verdicts"]["mc2"]["violations"]:
        assert violation.keys() - {"buffer"} == VIOLATION_KEYS
        assert all(violation[key] for key in VIOLATION_KEYS - {"advice", "sources"})
    first = found["verdicts"]["mc2"]["violations"][0]
    assert (first["code"], first["quantity"], first["value"]) == ("mc2.tokens", "tokens", 600)
    assert (first["limit"], first["accepted"]) == ({"min": 1, "max": 512}, "1 to 512")
    assert BlockReport("a", None, "", (), (), {}).to_json()["sizes"] is None


def test_a_further_equal_block_costs_no_sizes():
    """Reports of equal blocks share the record: nothing is made anew."""
    with testing.fake_deployment(ep_size=2) as deployment:
        lowering = MoeLowering(deployment, "mc2")
        x = torch.zeros(60, 1024, dtype=DTYPE)
        report = testing.lower_graph(Stack(deployment, 3), x, deployment=deployment, lowering=lowering).report
    assert all(block.sizes is report.blocks[0].sizes for block in report.blocks)
