"""Backend "hccl" for device "npu" on two real processes: collectives, communicators, and both inside captured graphs."""

from pathlib import Path

import capture_jobs
import pytest
import rank_jobs
import reference
import torch
from rank_pools import Ranks

from moe_lowering import simulator
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.simulator.device import Counts


@pytest.fixture(scope="module")
def pair():
    with Ranks(2, setup=simulator.enable_device, collective_timeout=60) as ranks:
        yield ranks


def both(*values):
    return [list(values)] * 2


EXPECTED = {
    "all_gather_into_tensor": both(0, 1, 2, 3, 4, 5, 6, 7),
    "all_gather": [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2,
    "all_gather uneven": [[[0, 1, 2], [[4, 5]]]] * 2,
    "reduce_scatter_tensor": [[4, 6], [8, 10]],
    "all_reduce SUM": both(4, 6, 8, 10),
    "all_reduce MAX": both(4, 5, 6, 7),
    "all_reduce AVG": both(2, 3, 4, 5),
    "all_to_all_single": [[0, 1, 4, 5], [2, 3, 6, 7]],
    "all_to_all_single uneven": [[0, 4], [1, 2, 3, 5, 6, 7]],
    "broadcast": both(4, 5, 6, 7),
    "functional all_gather": both(0, 1, 2, 3, 4, 5, 6, 7),
    "functional reduce_scatter": [[4, 6], [8, 10]],
    "functional all_reduce": both(4, 6, 8, 10),
    "functional all_to_all": [[0, 1, 4, 5], [2, 3, 6, 7]],
}


def test_collectives(pair):
    found = pair.run(capture_jobs.run_collectives)
    for name, expected in EXPECTED.items():
        assert [result[name] for result in found] == expected, name


def test_collectives_are_on_the_tape_and_run_at_each_replay(pair):
    """npugraph_ex turns all_to_all_single into npu_define's operator; its kernel is torch_npu's own."""
    for results, operators in pair.run(capture_jobs.capture_collectives, 4):
        assert len({tuple(captured) for captured, _ in results}) == 4
        assert all(captured == eager for captured, eager in results)
        assert [name for name in operators if name.startswith("c10d::")] == [
            "c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::alltoall_base_", "c10d::allreduce_",
        ]  # fmt: skip


def dense(rank, step):
    layer = rank_jobs.layer(torch.bfloat16)
    x = rank_jobs.tokens_of(10 * step + rank, 6, torch.bfloat16, False)
    with torch.no_grad():
        logits = layer.gate(x).float()
    weights, ids = reference.route(logits, None, rank_jobs.TOP_K, "softmax", True, 1, 1, "max", 1.0)
    return reference.moe(x, weights, ids, layer.w13, layer.w2)


COMMUNICATION = {
    "allgather": ["c10d::_allgather_base_"] * 3 + ["c10d::_reduce_scatter_base_"],
    "mc2": ["npu::npu_moe_distribute_dispatch_v2", "npu::npu_moe_distribute_combine_v2"],
    "fused_mc2": ["moe_lowering::dispatch_ffn_combine"],
}


@pytest.mark.parametrize("comm", COMMUNICATION)
def test_a_lowered_layer_is_captured_with_its_communication(pair, comm):
    for rank, (outputs, counts, operators) in enumerate(pair.run(capture_jobs.capture_lowered, comm, 4)):
        assert counts == Counts(begun=2, empty=1, captured=1, replayed=4)
        for step, y in enumerate(outputs):
            reference.assert_near(y, dense(rank, step), torch.bfloat16)
        marks = ("c10d::", "distribute", "dispatch_ffn")
        assert [name for name in operators if any(mark in name for mark in marks)] == COMMUNICATION[comm]


@pytest.mark.parametrize("comm", IMPLEMENTATIONS)
def test_a_layer_of_tensors_in_pieces(pair, comm):
    """HCCL takes none, and torch 2.10 refuses them (2.13 copies): the lowering makes whole what a collective is to send."""
    for rank, (y, in_pieces) in enumerate(pair.run(capture_jobs.lower_in_pieces, comm)):
        assert in_pieces == []
        reference.assert_near(y, dense(rank, 0), torch.bfloat16)


@pytest.mark.parametrize("compiled", [False, True], ids=["by hand", "compiled"])
@pytest.mark.parametrize("case", capture_jobs.SPLITS)
def test_equal_splits_are_captured_and_unequal_ones_refused(pair, case, compiled):
    """Unequal splits are one routing's numbers on the host: each replay would send all others by them."""
    lines = Path(capture_jobs.__file__).read_text().splitlines()
    for rank, (error, *found) in enumerate(pair.run(capture_jobs.capture_splits, case, compiled)):
        if case in ("equal", "none"):
            own = [2.0 * rank, 2.0 * rank + 1]  # of each rank's four
            assert error == "" and found == [[[v + step + 10 * r for r in (0, 1) for v in own] for step in (0, 1)]]
            continue
        operator, file, line = found
        assert operator == "c10d::alltoall_base_" and "has unequal splits" in error
        assert file == capture_jobs.__file__ and "# planted" in lines[line - 1]
        assert f"{file}:{line}" in error


MISUSE = {
    "mc2 by group name": r"npu_moe_distribute_dispatch_v2: '\d+' is no HCCL communicator",
    "cpu tensor": "No backend type associated with device type cpu",
    "gloo group": "No backend type associated with device type npu",
    "other rank": "get_hccl_comm_name: rankid is",
    "in pieces": r"c10d::_allgather_base_: input has shape \[2, 2\] and strides \[3, 1\]; accepted: contiguous tensors",
    "barrier in capture": "CaptureError: c10d::barrier: waits on the host",
}


@pytest.mark.parametrize("what", MISUSE)
def test_misuse_is_refused(pair, what):
    import re

    for text in pair.run(capture_jobs.misuse, what):
        assert re.search(MISUSE[what], text), text
