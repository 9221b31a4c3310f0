"""The wrappers of fused operators on two real ranks against a dense layer in float64; their rules; torch's own checks.

Functions that begin with ``on_`` run in the ranks' processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fused_layers import FLOORS, STEP_FLOOR, expected, in_steps, lists_of, make_layer, make_tokens
from quantised_numbers import snr
from rank_pools import Ranks
from test_custom_ops_ranks import caught, world
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.xdist_group("custom_ops_ranks")
ops = torch.ops.moe_lowering
FFN, DECODE, MEGA = "dispatch_ffn_combine", "dispatch_gmm_combine_decode", "mega_moe"
COUNTS = {FFN: torch.int32, DECODE: torch.int64, MEGA: torch.int32}
LOCAL = 4  # experts of a rank


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2, collective_timeout=20) as ranks:
        yield ranks


@dataclasses.dataclass(frozen=True)
class Case:
    operator: str
    quantisation: str = "w8a8"
    tokens: tuple[int, int] = (6, 6)
    dtype: torch.dtype = torch.bfloat16
    lists: bool = False
    mask: tuple[tuple[bool, ...], ...] = ()
    limit: float = 0.0
    skew: bool = False
    scale_dtype: torch.dtype = torch.float32
    rows: int = 100  # that a rank may receive

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)[1:]
            if getattr(self, f.name) != f.default
        ]
        return "-".join([self.operator, *changed])


def arguments_of(case: Case, rank: int) -> tuple[dict[str, Any], Any]:
    """The call on one rank, and the layer of all ranks."""
    ranks, experts = 2, 2 * LOCAL
    layer = make_layer(case.quantisation, experts, case.dtype)
    x, weights, ids = make_tokens(rank, case.tokens[rank], experts, case.dtype, case.skew)
    call = lists_of(layer, rank, ranks, case.lists or case.operator == MEGA)
    for name in ("w13_scale", "w2_scale"):
        if case.scale_dtype == torch.int64 and name in call:
            call[name] = [scale.view(torch.int32).long() for scale in call[name]]
    call.update(x=x, ids=ids, weights=weights, group=world(), ep_size=ranks)
    if case.mask:
        call["mask"] = torch.tensor(case.mask[rank], dtype=torch.bool)
    if case.operator == FFN:
        call.update(max_output_size=case.rows, quantisation=case.quantisation, swiglu_limit=case.limit)
    elif case.operator == DECODE:
        most = max(case.tokens)
        call.update(ep_rank=rank, num_experts=experts, global_bs=0 if len(set(case.tokens)) == 1 else most * ranks)
        assert not case.limit
    else:
        call.update(num_experts=experts, max_tokens=8, max_rows=case.rows, quantisation=case.quantisation)
        call["activation_clamp"] = case.limit
    return call, layer


def on_case(rank: int, case: Case) -> dict[str, Any]:
    call, layer = arguments_of(case, rank)
    y, counts = getattr(ops, case.operator)(**call)
    assert y.dtype == case.dtype and y.shape == call["x"].shape
    assert counts.dtype == COUNTS[case.operator]
    x, weights, ids, mask = call["x"], call["weights"], call["ids"], call.get("mask")
    everyone = [make_tokens(r, case.tokens[r], 2 * LOCAL, case.dtype, case.skew)[2] for r in range(2)]
    if case.mask:
        everyone = [i[torch.tensor(m, dtype=torch.bool)] for i, m in zip(everyone, case.mask, strict=True)]
        assert not y[~call["mask"]].any()
    all_counts = torch.bincount(torch.cat(everyone).flatten(), minlength=2 * LOCAL)
    found = {
        "right": snr(y, expected(x, weights, ids, layer, mask, case.limit)),
        "counts": torch.equal(counts.long(), all_counts.chunk(2)[rank]),
        "empty experts": int((counts == 0).sum()),
    }
    rolled = dataclasses.replace(layer, means=tuple(m.roll(1, 0) for m in layer.means))  # type: ignore[arg-type]
    found["other experts"] = snr(y, expected(x, weights, ids, rolled, mask, case.limit))
    if case.quantisation != "none":
        found["in steps"] = snr(y, in_steps(x, weights, ids, layer, mask, case.limit))
    if case.limit:
        found["no limit"] = snr(y, expected(x, weights, ids, layer, mask, 0.0))
    return found


PREFIX = ((True,) * 4 + (False,) * 2, (True,) * 6)
ANY = ((True, False, True, True, False, True), (False,) * 6)
CASES = [
    *(Case(operator, quantisation) for operator in (FFN, MEGA) for quantisation in ("none", "w8a8", "w4a8")),
    *(Case(FFN, quantisation, lists=True) for quantisation in ("w8a8", "w4a8")),
    Case(FFN, scale_dtype=torch.int64, skew=True),
    Case(FFN, tokens=(7, 0), limit=0.5),
    Case(FFN, "w4a8", tokens=(0, 3), mask=((), (True, False, True))),
    Case(FFN, mask=ANY),
    Case(FFN, mask=((False,) * 6, (False,) * 6)),
    Case(MEGA, mask=ANY, limit=0.5, scale_dtype=torch.int64),
    Case(MEGA, "none", limit=0.5, skew=True),
    Case(MEGA, tokens=(0, 0)),
    *(Case(DECODE, q, dtype=dtype) for q in ("none", "w8a8") for dtype in (torch.float16, torch.bfloat16)),
    Case(DECODE, tokens=(6, 0), lists=True),
    Case(DECODE, "none", tokens=(1, 5), lists=True, skew=True),
    Case(DECODE, mask=PREFIX, skew=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_a_dense_layer(two: Ranks, case: Case) -> None:
    for rank, found in enumerate(two.run(on_case, case)):
        floor = FLOORS[case.quantisation]
        assert found["right"] >= floor, found
        assert found.get("in steps", math.inf) >= STEP_FLOOR, found
        assert found["counts"]
        active = case.tokens[rank] and (not case.mask or any(case.mask[rank]))
        if active:  # what the floor must tell apart
            assert found["other experts"] < floor - 20, found
            assert found.get("no limit", -math.inf) < floor - 10, found
        if case.skew:
            assert found["empty experts"] or rank == 0


def on_wrong_scales(rank: int, case: Case) -> float:
    """The twin: scales of another expert."""
    call, layer = arguments_of(case, rank)
    call["w2_scale"] = [scale.roll(1, 0) for scale in call["w2_scale"]]
    y, _ = getattr(ops, case.operator)(**call)
    return snr(y, expected(call["x"], call["weights"], call["ids"], layer, None, 0.0))


@pytest.mark.parametrize("operator", [FFN, DECODE])
def test_the_floor_sees_wrong_scales(two: Ranks, operator: str) -> None:
    assert max(two.run(on_wrong_scales, Case(operator))) < FLOORS["w8a8"] - 10


def on_infinity(rank: int) -> tuple[list[bool], list[bool]]:
    call, _ = arguments_of(Case(FFN), rank)
    call["x"][0, 3] = math.inf
    call["x"][1, 5] = math.nan
    call["x"][2] = 0
    y, _ = ops.dispatch_ffn_combine(**call)
    return y.isfinite().all(1).tolist(), (y == 0).all(1).tolist()


def test_what_is_not_finite_stays_visible(two: Ranks) -> None:
    """int8 has no NaN: the scale of the row carries it. A row of zeros gives zeros."""
    for finite, zero in two.run(on_infinity):
        assert finite == [False, False, True, True, True, True]
        assert zero == [False, False, True, False, False, False]


# ------------------------------------------------------------------------------------------------- errors of all ranks


def on_error(rank: int, case: Case, change: dict[str, Any]) -> tuple[str, str]:
    call, _ = arguments_of(case, rank)
    return caught(lambda: getattr(ops, case.operator)(**{**call, **change}))


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (Case(FFN, rows=2), {}, "accepted: at most max_output_size, 2"),
        (Case(FFN, "w4a8", rows=35), {}, "accepted: at most half of max_output_size, 35"),
        (Case(MEGA, rows=2), {}, "accepted: at most 2 (max_rows is 2)"),
        (Case(MEGA, tokens=(3, 4)), {}, "the operator wants the same T on all ranks, but T is 3 on EP rank 0 and 4"),
        (Case(DECODE, tokens=(3, 4)), {"global_bs": 0}, "global_bs is 0, which says that T is equal on all ranks"),
        (Case(DECODE, tokens=(3, 4)), {"global_bs": 6}, "T is 4 on EP rank 1; accepted: at most max_tokens, 3"),
        (
            Case(DECODE, mask=(ANY[0], (True,) * 6)),
            {},
            "mask is no prefix on EP rank 0; accepted: True for the first n",
        ),
        (Case(DECODE), {"ids": torch.full((6, 3), 8, dtype=torch.int32)}, "ids has 8 for token 5"),
        (Case(MEGA), {"ids": torch.zeros((6, 3), dtype=torch.int32)}, "ids has 0 twice for token 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_raise_on_all_ranks(two: Ranks, case: Case, change: dict[str, Any], message: str) -> None:
    for _, text in two.run(on_error, case, change, timeout=30):
        assert text.startswith(f"{case.operator}: ") and message in text


def test_another_ranks_index_is_refused(two: Ranks) -> None:
    for rank, (kind, text) in enumerate(two.run(on_wrong_rank, timeout=30)):
        assert kind == "ValueError" and f"ep_rank is {1 - rank}; accepted: {rank}, this rank's index" in text


def on_wrong_rank(rank: int) -> tuple[str, str]:
    return on_error(rank, Case(DECODE), {"ep_rank": 1 - rank})


# ----------------------------------------------------------------------------------------------------- torch's own checks


def on_opcheck(rank: int, case: Case) -> None:
    call, _ = arguments_of(case, rank)
    operator = getattr(ops, case.operator).default
    torch.library.opcheck(operator, (), call)
    gradient = {**call, "x": call["x"].requires_grad_()}
    error = caught(lambda: operator(**gradient)[0].sum().backward())
    assert error[0] == "NotImplementedError" and "is for inference" in error[1]


@pytest.mark.parametrize(
    "case", [Case(FFN, "w4a8", mask=ANY, lists=True), Case(DECODE, mask=PREFIX), Case(MEGA, mask=PREFIX)], ids=str
)
def test_opcheck(two: Ranks, case: Case) -> None:
    """All ranks at once: each call of the operator is a collective."""
    two.run(on_opcheck, case)


@pytest.mark.parametrize("operator", [FFN, DECODE, MEGA])
def test_unused_calls_survive_dead_code_elimination(operator: str) -> None:
    for target in (getattr(ops, operator), getattr(ops, operator).default):
        graph = torch.fx.Graph()
        graph.call_function(target, (graph.placeholder("x"),))
        graph.output(())
        graph.eliminate_dead_code()
        assert target in [node.target for node in graph.nodes]


# ------------------------------------------------------------------------------------------------------- static mistakes

INT8 = {"w13": [torch.ones(3, 64, 32, dtype=torch.int8)], "w2": [torch.ones(3, 16, 64, dtype=torch.int8)]}
INT4 = {"w13": [torch.ones(3, 64, 4, dtype=torch.int32)], "w2": [torch.ones(3, 16, 8, dtype=torch.int32)]}
SCALES = {"w13_scale": [torch.ones(3, 32)], "w2_scale": [torch.ones(3, 64)]}
BIASES = {"w13_scale_bias": [torch.ones(3, 32)], "w2_scale_bias": [torch.ones(3, 64)]}
TOKENS: dict[str, Any] = {
    "x": torch.ones(4, 64).bfloat16(), "ids": torch.zeros(4, 2, dtype=torch.int32), "weights": torch.ones(4, 2),
    "group": "g", "ep_size": 2,
}  # fmt: skip


def lists(call: dict[str, Any]) -> dict[str, Any]:
    return {n: list(v[0]) if isinstance(v, list) and len(v) == 1 else v for n, v in call.items()}


GOOD: dict[str, dict[str, Any]] = {
    FFN: {**TOKENS, **INT8, **SCALES, "max_output_size": 8, "quantisation": "w8a8"},
    "w4a8": {**TOKENS, **INT4, **SCALES, **BIASES, "max_output_size": 8, "quantisation": "w4a8"},
    DECODE: {**TOKENS, **INT8, **SCALES, "ep_rank": 0, "num_experts": 6},
    MEGA: {
        **TOKENS, **lists({**INT8, **SCALES}), "num_experts": 6, "max_tokens": 4, "max_rows": 0, "quantisation": "w8a8",
    },
}  # fmt: skip
BF16 = {"w13": [torch.ones(3, 64, 32).bfloat16()], "w2": [torch.ones(3, 16, 64).bfloat16()]}
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    (FFN, {"quantisation": "w4a16"}, "quantisation is 'w4a16'; accepted: 'none', 'w8a8', 'w4a8'"),
    (FFN, {"x": torch.ones(4, 64).half()}, "x is torch.float16 of shape [4, 64]; accepted: bfloat16 [T, hidden]"),
    (FFN, {"w13_scale": None}, "w13_scale is None for quantisation 'w8a8'; accepted: [3, 32]"),
    (FFN, {"w2_scale": []}, "w2_scale is None for quantisation 'w8a8'; accepted: [3, 64]"),
    (FFN, {"w2_scale": [torch.ones(3, 32)]}, "w2_scale has shape [3, 32]; accepted: [3, 64]"),
    (FFN, {"w2_scale": [torch.ones(192)]}, "w2_scale has shape [192]; accepted: one tensor [3, 64], or 3 of [64]"),
    (
        FFN,
        {"w2_scale": [torch.ones(3, 64).half()]},
        "w2_scale is torch.float16; accepted: torch.float32 or torch.int64",
    ),
    (FFN, BIASES, "w13_scale_bias is given for quantisation 'w8a8'; accepted: None"),
    (FFN, BF16, "w13 is torch.bfloat16; accepted: torch.int8"),
    (FFN, {"w13": [INT8["w13"][0][0]], "w2": [INT8["w2"][0][0]]}, "w13 is not one tensor [E, hidden, 2I]"),
    (FFN, {"w13": [INT8["w13"][0][:1]]}, "w13 holds 1 expert; accepted: 2 or more"),
    (FFN, {"w2": list(INT8["w2"][0])}, "w13 and w2 are not both one tensor or both a list of 1"),
    (FFN, {"mask": torch.ones(4)}, "mask is torch.float32 of shape [4]; accepted: bool [T]"),
    (FFN, {"mask": torch.ones(3, dtype=torch.bool)}, "mask is torch.bool of shape [3]; accepted: bool [T]"),
    (FFN, {"swiglu_limit": -1.0}, "swiglu_limit is -1.0; accepted: 0 (no limit) or more"),
    (FFN, {"swiglu_limit": math.nan}, "swiglu_limit is nan; accepted: 0 (no limit) or more"),
    (
        FFN,
        {**BF16, "quantisation": "none", "w13_scale": None, "w2_scale": None, "swiglu_limit": 1.0},
        "swiglu_limit is given for 16-bit weights, whose kernel ignores it; accepted: none",
    ),
    (
        FFN,
        {**BF16, "quantisation": "none", "w13_scale": None, "w2_scale": None, "mask": torch.ones(4, dtype=torch.bool)},
        "mask is given for 16-bit weights, whose kernel ignores it; accepted: none",
    ),
    (FFN, {**BF16, "quantisation": "none"}, "w13_scale is given for quantisation 'none'; accepted: None"),
    ("w4a8", {"w13_scale_bias": None}, "w13_scale_bias is None for quantisation 'w4a8'; accepted: [3, 32]"),
    ("w4a8", INT8, "w13 is torch.int8; accepted: torch.int32"),
    ("w4a8", {"w2": [torch.ones(3, 16, 64, dtype=torch.int32)]}, "w2 has shape [3, 16, 64]; accepted: [3, 16, 8]"),
    (
        "w4a8",
        {"w2_scale_bias": [torch.ones(3, 64).half()]},
        "w2_scale_bias is torch.float16; accepted: torch.float32",
    ),
    (DECODE, {"ep_size": 1}, "ep_size is 1; accepted: 2 to 768"),
    (DECODE, {"group": ""}, "group is ''"),
    (DECODE, {"ep_rank": 2}, "ep_rank is 2; accepted: 0 to 1"),
    (DECODE, {"num_experts": 7}, "num_experts is 7; accepted: a multiple of ep_size, 2"),
    (DECODE, {"num_experts": 8}, "w13 holds 3 experts; accepted: 4, num_experts / ep_size"),
    (DECODE, {"global_bs": 9}, "global_bs is 9; accepted: 0 (T is equal on all ranks) or a multiple of ep_size, 2"),
    (DECODE, {"global_bs": -2}, "global_bs is -2"),
    (DECODE, {"w2_scale": [torch.ones(3, 64).long()]}, "w2_scale is torch.int64; accepted: torch.float32 or"),
    (DECODE, BF16, "w13_scale is given for quantisation 'none'; accepted: None"),
    (DECODE, {"ids": torch.zeros(4, 2)}, "ids is torch.float32 of shape [4, 2]; accepted: int32 [T, k]"),
    (DECODE, {"weights": torch.ones(4, 2).bfloat16()}, "weights is torch.bfloat16 of shape [4, 2]; accepted: float32"),
    (DECODE, {"mask": torch.ones(4, dtype=torch.int8)}, "mask is torch.int8 of shape [4]; accepted: bool [T]"),
    (MEGA, INT8, "w13 is not a list with one [hidden, 2I] for each expert"),
    (MEGA, {"w2": INT8["w2"]}, "w13 and w2 are not both one tensor or both a list of 3"),
    (MEGA, {"max_tokens": 0}, "max_tokens is 0; accepted: 1 or more"),
    (MEGA, {"max_tokens": 3}, "x has 4 tokens; accepted: at most max_tokens, 3"),
    (MEGA, {"max_rows": -1}, "max_rows is -1; accepted: 0 (what max_tokens implies) or more"),
    (MEGA, {"x": torch.ones(4, 64).half()}, "x is torch.float16 of shape [4, 64]; accepted: bfloat16 [T, hidden]"),
    (MEGA, {"activation_clamp": -0.5}, "activation_clamp is -0.5; accepted: 0 (no limit) or more"),
    (MEGA, {"mask": torch.ones(4)}, "mask is torch.float32 of shape [4]; accepted: bool or int8 [T]"),
    (
        MEGA,
        {"ids": torch.zeros(4, 7, dtype=torch.int32), "weights": torch.ones(4, 7)},
        "ids has k = 7; accepted: 1 to 6",
    ),
]


@pytest.mark.parametrize(("base", "change", "message"), MISTAKES)
def test_static_mistakes(base: str, change: dict[str, Any], message: str) -> None:
    """The fake kernel and the CPU kernel say the same, and the fake kernel takes what is right."""
    name = FFN if base == "w4a8" else base
    operator = getattr(ops, name)
    with pytest.raises((ValueError, TypeError)) as on_cpu:
        operator(**{**GOOD[base], **change})
    assert str(on_cpu.value).startswith(f"{name}: {message}")
    with FakeTensorMode(allow_non_fake_inputs=True):
        y, counts = operator(**GOOD[base])
        assert y.shape == (4, 64) and y.dtype == torch.bfloat16
        assert counts.shape == (3,) and counts.dtype == COUNTS[name]
        with pytest.raises(type(on_cpu.value)) as on_fake:
            operator(**{**GOOD[base], **change})
    assert str(on_fake.value) == str(on_cpu.value)
