"""The bytes in ``explain``'s ``memory`` against a calculation of its own: sizes of what lives at once, written out."""

from __future__ import annotations

import dataclasses

import pytest

import moe_lowering
from moe_lowering.explanation.description import BlockDescription
from moe_lowering.explanation.memory import TOO_SMALL, Memory
from moe_lowering.explanation.text import render
from moe_lowering.number_words import gigabytes

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K, RANKS, LAYERS = 128, 7168, 2048, 256, 8, 16, 58
LOCAL = EXPERTS // RANKS
ROWS = RANKS * TOKENS * TOP_K  # every token of every rank may come here with all of its choices
BF16, INT8, F32, I32, I64 = 2, 1, 4, 4, 8
MATRICES = LOCAL * (HIDDEN * 2 * INNER + INNER * HIDDEN)
ROW_INDEX = ROWS * I32
WEIGHTS = RANKS * TOKENS * TOP_K * BF16
COUNTS = LOCAL * I64
# What MC2's dispatch gives beside rows, scales and counts: 128 numbers a row, and counts of each rank for each expert
RETURN = ROWS * 128 * I32 + RANKS * LOCAL * I32

EXPERTS_BYTES = {
    "none": MATRICES * BF16,
    "w8a8": MATRICES * INT8 + LOCAL * 2 * INNER * F32 + LOCAL * HIDDEN * BF16,
    "w4a16": MATRICES // 2 + 2 * LOCAL * (2 * INNER + HIDDEN) * BF16,  # scales and offsets
}
# The first matmul's rows beside its result; with int8 rows the second one's, with a scale each, beside its result
FLOAT_ROWS = ROWS * (HIDDEN + 2 * INNER) * BF16
INT8_ROWS = ROWS * (INNER * INT8 + F32 + HIDDEN * BF16)
BUFFERS = {
    ("allgather", "none"): FLOAT_ROWS + ROW_INDEX + WEIGHTS + COUNTS,
    ("allgather", "w8a8"): INT8_ROWS + ROW_INDEX + WEIGHTS + COUNTS,
    ("mc2", "none"): FLOAT_ROWS + RETURN + COUNTS,
    ("mc2", "w8a8"): INT8_ROWS + RETURN + COUNTS,
}
LAYER = BlockDescription(hidden=HIDDEN, intermediate=INNER, experts=EXPERTS, top_k=TOP_K, layers=LAYERS)


def deployment(**fields):
    return moe_lowering.Deployment(
        **{
            "soc": "A3", "ep_size": RANKS, "ep_rank": 0, "ep_group": "ep", "mc2_group": "mc2", "hccl_buffer_mb": 4096,
            "weight_format": "nz", **fields,
        }
    )  # fmt: skip


def memory_of(comm="auto", quantisation="none", layer=LAYER, **fields):
    layer = dataclasses.replace(layer, quantisation=quantisation)
    explained = moe_lowering.explain(layer, deployment(**fields), tokens=TOKENS, comm=comm)
    return explained.to_json()["memory"], " ".join(render(explained).split())


@pytest.mark.parametrize("quantisation", EXPERTS_BYTES)
def test_bytes_of_experts(quantisation):
    memory, _ = memory_of("mc2", quantisation)
    assert memory["experts"] == EXPERTS_BYTES[quantisation]
    assert memory["layers"] == LAYERS


@pytest.mark.parametrize(("comm", "quantisation"), BUFFERS)
def test_bytes_of_buffers(comm, quantisation):
    memory, _ = memory_of(comm, quantisation)
    assert memory["buffers"] == BUFFERS[comm, quantisation]
    window = 2 * 4096 * 2**20  # to send and to receive
    assert memory["window"] == window and memory["communicators"] == 1
    assert memory["needed"] == LAYERS * EXPERTS_BYTES[quantisation] + BUFFERS[comm, quantisation] + window


# dispatch_ffn_combine's workspace, by the sizes of what it holds for each row that may come: both matmuls' input in int8 (16 bits
# without quantisation, int8 in W4A8), their results in 16 bits, twice as many lines in W4A8, two scales. 16 MiB of its own.
# From 0.21 on W8A8's results share their memory, which is as wide as H.
RESULT, SCALES_OF_A_ROW = 2, 2 * F32
PER_ROW = {
    ("none", "0.23.0"): HIDDEN * BF16 + 2 * INNER * RESULT + INNER * BF16 + HIDDEN * RESULT + SCALES_OF_A_ROW,
    ("w8a8", "0.23.0"): HIDDEN * INT8 + HIDDEN * RESULT + SCALES_OF_A_ROW,
    ("w8a8", "0.19.0"): HIDDEN * INT8 + 2 * INNER * RESULT + INNER * INT8 + HIDDEN * RESULT + SCALES_OF_A_ROW,
    # room for twice the rows
    ("w4a8", "0.23.0"): 2 * (HIDDEN * INT8 + INNER * INT8 + 2 * HIDDEN * RESULT + SCALES_OF_A_ROW),
}


@pytest.mark.parametrize(("quantisation", "version"), PER_ROW)
def test_bytes_of_the_fused_operators_workspace(quantisation, version):
    """Of the proven bound on rows, or of the bound that is declared; two layers need no more of it than one."""
    fused = {"providers": (("vllm_ascend", version),)}
    memory, text = memory_of("fused_mc2", quantisation, **fused)
    assert memory["workspace"] == 16 * 2**20 + ROWS * PER_ROW[quantisation, version]
    parts = [memory[each] for each in ("buffers", "workspace", "window")]
    assert memory["needed"] == sum(parts) + LAYERS * memory["experts"]
    assert f" {parts[1] / 1e9:.1f} GB workspace, " in text and f"workspace of {parts[1] / 1e6:,.1f} MB" in text
    declared, _ = memory_of("fused_mc2", quantisation, max_output_size=4 * ROWS, **fused)
    times = 2 if quantisation == "w4a8" else 4
    assert declared["workspace"] - 16 * 2**20 == times * (memory["workspace"] - 16 * 2**20)


def test_a_workspace_that_is_not_known_is_said_and_not_counted():
    layer = dataclasses.replace(LAYER, experts=64, hidden=4096, intermediate=1536)
    decode = {"fused_mode": 2, "providers": (("vllm_ascend", "0.23.0"),)}
    memory, text = memory_of("fused_mc2", "w8a8", layer, **decode)
    assert memory["workspace"] is None
    assert memory["needed"] == memory["buffers"] + memory["window"] + LAYERS * memory["experts"]
    assert "buffers, a workspace of unknown size, " in text and "its workspace is not known" in text
    assert memory_of("mc2")[0]["workspace"] == 0 and "workspace" not in memory_of("mc2", "w8a8")[1]


def test_a_bias_and_a_tp_group_are_counted():
    plain, _ = memory_of("mc2")
    biased, _ = memory_of("allgather", layer=dataclasses.replace(LAYER, has_bias=True))
    assert biased["experts"] - plain["experts"] == LOCAL * (2 * INNER + HIDDEN) * BF16
    shared, _ = memory_of("allgather", tp_size=2, tp_group="tp", tp_rank=0)
    assert shared["communicators"] == 2 and shared["window"] == 2 * plain["window"]


def test_what_cannot_fit_is_said_with_its_numbers_and_what_fits_is_not():
    """82 GB of experts on a die of 64 GiB; in int8 they fit."""
    memory, text = memory_of("mc2")
    assert memory["capacity"] == 64 * 2**30 and not memory["fits"]
    assert " note it does not fit a rank's memory, see memory " in text and text.index(" note it does") < text.index(
        "choice"
    )
    assert f"[{TOO_SMALL}] 90.7 GB = 81.7 GB experts of 58 MoE layers, 0.4 GB buffers, 8.6 GB HCCL windows" in text
    assert "8.6 GB HCCL windows (1 communicator, twice HCCL_BUFFSIZE each); the SoC has 68.7 GB" in text
    memory, text = memory_of("mc2", "w8a8")
    assert (
        memory["fits"] and TOO_SMALL not in text and "does not fit" not in text and "49.8 GB = 40.9 GB experts" in text
    )
    assert text.count("(MoE layers only: attention, embeddings, KV cache and other communicators come on top)") == 1
    memory, text = memory_of("mc2", layer=dataclasses.replace(LAYER, layers=None))
    assert memory["fits"] and memory["needed"] == sum(memory[each] for each in ("experts", "buffers", "window"))


@pytest.mark.parametrize(("capacity", "fits"), [(100, True), (99, False), (None, True)])
def test_it_fits_up_to_the_last_byte(capacity, fits):
    memory = Memory(experts=20, layers=4, buffers=10, workspace=3, window=7, communicators=1, capacity=capacity)
    assert (memory.needed, memory.fits) == (100, fits)
    assert (TOO_SMALL in str(memory)) is not fits


def test_a_little_memory_is_not_none():
    assert [gigabytes(size) for size in (0, 1, 49_999_999, 50_000_000)] == [
        "0.0 GB", "less than 0.1 GB", "less than 0.1 GB", "0.1 GB",
    ]  # fmt: skip


MB = 2**20
RANKS_AND_BITS = "more ranks, or experts of fewer bits"


@pytest.mark.parametrize(("sizes", "communicators", "advice"), [
    ((82, 1, 0), 0, RANKS_AND_BITS),  # no window at all
    ((82, 1, 30), 1, RANKS_AND_BITS),  # the experts alone are too much
    ((300, 1, 0), 0, "more ranks"),  # in 4 bits too
    ((50, 1, 20), 1, f"{RANKS_AND_BITS}, or HCCL_BUFFSIZE of at most 8 MB"),
    ((30, 2, 40), 2, f"{RANKS_AND_BITS}, or HCCL_BUFFSIZE of at most 9 MB"),
    ((50, 2, 20), 2, RANKS_AND_BITS),  # 4 MB are fewer than the choice's rules accept
    ((50, 10, 20), 1, RANKS_AND_BITS),  # 8 MB are fewer than the choice's rules accept
    ((40, 20, 20), 1, f"{RANKS_AND_BITS}, or fewer tokens"),
    ((10, 60, 20), 1, "fewer tokens"),
    ((60, 60, 60), 1, "no one thing is enough: more ranks, and fewer tokens or a smaller HCCL_BUFFSIZE"),
])  # fmt: skip
def test_advice_names_what_can_be_enough(sizes, communicators, advice):
    """68 MB of memory, of which all but one thing must leave room for it."""
    experts, buffers, window = (size * MB for size in sizes)
    least = 8 if sizes[1] < 10 else 9
    memory = Memory(experts, 1, MB, buffers - MB, window, communicators, 68 * MB, least_buffer_mb=least)
    assert str(memory).endswith(f": it cannot fit ({advice})")


def test_the_least_buffer_of_the_choice_bounds_the_advice():
    """Of what experts and buffers leave, MC2's window needs 960 MB; AllGather's none."""
    layer = dataclasses.replace(LAYER, layers=48)  # 67.6 GB of experts
    assert "HCCL_BUFFSIZE of at most" not in memory_of("mc2", layer=layer)[1]
    assert "HCCL_BUFFSIZE of at most" in memory_of("allgather", layer=dataclasses.replace(LAYER, layers=46))[1]
    assert "HCCL_BUFFSIZE of at most" in memory_of("mc2", layer=dataclasses.replace(LAYER, layers=46))[1]
