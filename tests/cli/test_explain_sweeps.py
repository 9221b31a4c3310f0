"""``moe-lowering explain --sweep``: the pieces of a range of tokens, and what sets each boundary."""

import re

from test_explain import BLOCK, ROOMY, answer


def pieces(capfd, given):
    return [(p["from"], p["to"], p["choice"], p["boundary"]) for p in answer(capfd, given)[1]["sweep"]]


def test_a_sweep_across_the_capacity_of_a3(capfd):
    below, above = pieces(capfd, f"{BLOCK} --ep 16 {ROOMY} --sweep tokens=64..8192")
    assert below == (64, 512, "fused_mc2", ["fused.tokens"])
    assert above == (513, 8192, "allgather", [])


def test_a_sweep_across_the_buffer(capfd):
    """280 MB hold 293,601,280 / 7,860,224 = 37 tokens."""
    given = f"{BLOCK} --ep 16 --provider none --buffer-mb 280"
    found = pieces(capfd, f"{given} --sweep tokens=1..8192")
    assert found == [
        (1, 31, "allgather", ["cost"]),
        (32, 37, "mc2", ["mc2.buffer"]),
        (38, 8192, "allgather", []),
    ]
    assert pieces(capfd, f"{given} --sweep tokens=30..8192")[1] == (32, 37, "mc2", ["mc2.buffer"])
    first = answer(capfd, f"{given} --sweep tokens=1..100")[1]["sweep"][0]["because"]
    assert re.fullmatch(
        r"at 31 tokens allgather \(\d+ us\) and mc2 \(\d+ us\) are a tie; "
        r"at 32 mc2 \(\d+ us\) is cheaper than allgather \(\d+ us\)",
        first[0],
    )
    because = answer(capfd, f"{given} --sweep tokens=32..100")[1]["sweep"][0]["because"]
    assert because == ["at 38 it needs 285 MB of HCCL window, HCCL_BUFFSIZE is 280 MB (7860224*T bytes)"]
    # 114688 bytes a token in a third of the buffer: as many would fit into the whole of it
    fused = "--hidden 7168 --intermediate 2048 --experts 64 --topk 8 --ep 16 --buffer-mb 100 --sweep tokens=1..1024"
    ends = {p["to"]: p["because"] for p in answer(capfd, fused)[1]["sweep"] if p["boundary"] == ["fused.window"]}
    assert ends == {304: ["at 305 it needs 101 MB of HCCL window, HCCL_BUFFSIZE is 100 MB"]}
    assert 304 * 114688 <= 100 * 2**20 // 3 < 305 * 114688


def test_short_pieces_between_powers_of_two_are_found(capfd):
    """From 5 the search looks at 6, 8, 12, 20, 36, ...: none of them is in 32 to 35."""
    given = f"{BLOCK} --ep 16 --provider none --buffer-mb 265 --sweep tokens=5..8192"  # 35 tokens
    assert (32, 35, "mc2", ["mc2.buffer"]) in pieces(capfd, given)


def test_a_sweep_where_a_limit_begins_to_hold(capfd):
    """T = 0 is never legal for MC2; the rule that stops to be broken is named."""
    (zero, rest) = pieces(
        capfd, f"{BLOCK} --ep 16 {ROOMY} --policy vllm_ascend_main --provider none --sweep tokens=0..9"
    )
    assert zero == (0, 0, "allgather", ["mc2.tokens"])
    assert rest == (1, 9, "mc2", [])


def test_a_sweep_of_a_policys_own_boundary(capfd):
    """0.13's capacity is the declared bound; A2's MC2 up to it, legal beyond, but not selected. Then the cost decides."""
    given = f"{BLOCK} --soc A2 --ep 16 {ROOMY} --policy vllm_ascend_0_13 --sweep tokens=1..300"
    assert pieces(capfd, given)[0] == (1, 256, "mc2", ["mc2.tokens"])


def test_beyond_the_declared_bound_nothing_is_legal(capfd):
    given = f"{BLOCK} --ep 16 {ROOMY} --max-tokens 64 --sweep tokens=32..100"
    assert pieces(capfd, given) == [(32, 64, "fused_mc2", ["deployment.max_tokens"]), (65, 100, None, [])]


def test_a_sweep_of_the_declared_bound(capfd):
    given = f"{BLOCK} --ep 16 {ROOMY} --unequal-tokens --max-tokens 64 --sweep tokens=64..1024"
    assert [p[:3] for p in pieces(capfd, given)] == [(64, 512, "fused_mc2"), (513, 1024, "allgather")]


def test_a_sweep_of_one_choice_is_one_piece(capfd):
    assert pieces(capfd, f"{BLOCK} --sweep tokens=7..7") == [(7, 7, "allgather", [])]


def test_a_sweep_with_comm_ends_where_that_one_is_illegal(capfd):
    found = pieces(capfd, f"{BLOCK} --ep 16 {ROOMY} --comm mc2 --sweep tokens=1..1000")
    assert found == [(1, 512, "mc2", ["mc2.tokens"]), (513, 1000, None, [])]
