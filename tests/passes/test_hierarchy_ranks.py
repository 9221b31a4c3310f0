"""MC2 through the pass where it takes the routing weights or two levels: A2, A5, and ``Deployment.mc2_hierarchy``.

Numbers of real ranks against a dense float64 reference; what is emitted; and what is refused, each with a legal twin.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import reference
import torch
from hierarchy_jobs import HIDDEN, Case, expert, inputs, on_ranks
from rank_pools import run_on_ranks
from torch import Tensor

from moe_lowering import Deployment, MoE, testing
from moe_lowering.limits import check_call
from moe_lowering.matrix.reference import FLOORS, signal_to_noise

DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"

# --------------------------------------------------------------------------------------------------------------- numbers

SIXTEEN = [
    Case("A3", hierarchy=True),
    Case("A3", hierarchy=True, quantisation="w8a8"),
    Case("A3", hierarchy=True, mask="prefix"),
    Case("A2", hierarchy=True),
    Case("A2", hierarchy=True, quantisation="w8a8"),
]
TWO = [
    Case("A2"),
    Case("A2", quantisation="w8a8"),
    Case("A2", mask="prefix"),
    Case("A5"),
    Case("A5", quantisation="w8a8"),
    Case("A5", mask="free"),
    Case("A5", mask="prefix"),
]


@pytest.fixture(scope="module")
def sixteen() -> list[list[Any]]:
    return run_on_ranks(16, on_ranks, SIXTEEN, timeout=300)


@pytest.fixture(scope="module")
def two() -> list[list[Any]]:
    return run_on_ranks(2, on_ranks, TWO, timeout=120)


def expected(case: Case, rank: int, ranks: int) -> Tensor:
    """y [T, H] in float64 from all experts, dequantised; zero for masked tokens."""
    x, weights, ids, mask = inputs(case, rank, ranks)
    return reference.moe(x, weights, ids, *dequantised(case, ranks), mask=mask)


@functools.cache
def dequantised(case: Case, ranks: int) -> list[list[Tensor]]:
    """w13 and w2 of all experts in float64."""
    experts = [expert(case, number) for number in range(ranks * case.experts_per_rank)]
    one = torch.ones(())
    return [[e[name].double() * e.get(f"{name}_scale", one).double() for e in experts] for name in ("w13", "w2")]


def check(results: list[list[Any]], number: int, case: Case) -> None:
    """Every rank's worst token is above the floor of its weights' format: see matrix/reference.py for where it comes from."""
    for rank, answers in enumerate(results):
        y = answers[number]
        assert isinstance(y, Tensor), f"refused: {y}"
        assert (y.dtype, y.shape) == (torch.bfloat16, (case.tokens, HIDDEN))
        found = signal_to_noise(y, expected(case, rank, len(results)))
        assert found >= FLOORS[case.quantisation], f"rank {rank}: {found:.1f} dB"


@pytest.mark.parametrize(("number", "case"), list(enumerate(SIXTEEN)), ids=map(str, SIXTEEN))
def test_two_levels_on_sixteen_ranks(sixteen: list[list[Any]], number: int, case: Case) -> None:
    check(sixteen, number, case)


@pytest.mark.parametrize(("number", "case"), list(enumerate(TWO)), ids=map(str, TWO))
def test_a2_and_a5_on_two_ranks(two: list[list[Any]], number: int, case: Case) -> None:
    check(two, number, case)


def test_the_floor_notices_another_rank(two: list[list[Any]]) -> None:
    """The twin of the numbers: results of rank 0 are not those of rank 1, nor those of other weights."""
    assert signal_to_noise(two[0][0], expected(TWO[0], 1, 2)) < 3
    assert signal_to_noise(two[0][1], expected(TWO[0], 0, 2)) < FLOORS["none"]


# ---------------------------------------------------------------------------------------------------------------- emitted


def lower(
    comm: str = "mc2", tokens: int = 8, experts: int = 48, hidden: int = 1024, mask: bool = False, **fields: Any
) -> tuple[testing.Lowered, Deployment]:
    fields = {"ep_size": 16, **fields}
    with testing.fake_deployment(**fields) as where, testing.fake_tensors():
        model = MoE(hidden, 64, experts, 3, deployment=where, dtype=torch.bfloat16)
        x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
        masks = [torch.ones(tokens, dtype=torch.bool)] if mask else []
        return testing.lower_graph(model, x, *masks, deployment=where, comm=comm), where


def arguments(lowered: testing.Lowered, name: str) -> dict[str, Any]:
    """Keyword arguments of the one call of an operator; of tensors their shapes."""
    (node,) = (n for n in lowered.gm.graph.nodes if getattr(n.target, "_opname", "") == name)
    return {k: v.meta["val"].shape if isinstance(v, torch.fx.Node) else v for k, v in node.kwargs.items()}


TWO_LEVELS = {"comm_alg": "hierarchy"}
A3_TWO_LEVELS = {"comm_alg": "hierarchy", "tp_world_size": 1}  # and no group_tp: op-plugin 04f78679
ROWS = (8 * 16 * 3,)  # tokens * ranks * min(K, E_local)
EMITTED = [
    ("A3", "npugraph_ex", False, {}, False),
    ("A3", "ge", False, {}, False),
    ("A3", "npugraph_ex", True, A3_TWO_LEVELS, True),
    ("A3", "ge", True, A3_TWO_LEVELS, True),
    ("A2", "npugraph_ex", False, {}, True),
    ("A2", "ge", False, {"group_tp": "mc2_group"}, True),
    ("A2", "npugraph_ex", True, TWO_LEVELS, True),
    ("A2", "ge", True, {"group_tp": "mc2_group", **TWO_LEVELS}, True),
    ("A5", "npugraph_ex", False, {}, False),
    ("A5", "ge", False, {}, False),
]


@pytest.mark.parametrize(("soc", "mode", "hierarchy", "both", "weights"), EMITTED)
def test_keyword_arguments(soc: str, mode: str, hierarchy: bool, both: dict[str, Any], weights: bool) -> None:
    """Both ends get the same attributes, and nothing else than these."""
    lowered, where = lower(soc=soc, mode=mode, mc2_hierarchy=hierarchy)
    testing.assert_lowered(lowered, comm="mc2", ops=[f"npu.{DISPATCH}", f"npu.{COMBINE}"])
    both = {"global_bs": 0, **{k: where.mc2_group if v == "mc2_group" else v for k, v in both.items()}}
    own = {"quant_mode": 0, "expert_token_nums_type": 1}
    assert arguments(lowered, DISPATCH) == {**both, **own, **({"expert_scales": (8, 3)} if weights else {})}
    assert arguments(lowered, COMBINE) == {**both, **({"expand_scales": ROWS} if weights else {})}


def test_global_bs_of_one_level() -> None:
    """The twin: T that differs between ranks has a global_bs, on A3 in one level only (see the refusals)."""
    lowered, _ = lower(soc="A3", equal_tokens=False, max_tokens=8)
    assert [arguments(lowered, name)["global_bs"] for name in (DISPATCH, COMBINE)] == [8 * 16] * 2


# ---------------------------------------------------------------------------------------------------------------- refused

A3, A2 = {"soc": "A3", "mc2_hierarchy": True}, {"soc": "A2", "mc2_hierarchy": True}
UNEQUAL = {"equal_tokens": False, "max_tokens": 8}
REFUSED = [
    # code, what breaks it, a legal twin
    ("mc2.ep_size_per_node", {**A3, "ep_size": 24}, {**A3, "ep_size": 16}),
    ("mc2.ep_size_per_node", {**A3, "ep_size": 8}, {**A3, "ep_size": 48}),
    ("mc2.ep_size", {**A2, "ep_size": 8}, {**A2, "ep_size": 16}),
    ("mc2.tokens", {**A3, "tokens": 257}, {**A3, "tokens": 256}),
    ("mc2.tokens", {**A2, "tokens": 257}, {**A2, "tokens": 256}),
    ("mc2.global_bs_hierarchy", {**A3, **UNEQUAL}, {**A3, "max_tokens": 8}),
    ("mc2.global_bs_hierarchy", {**A2, **UNEQUAL}, {**A2, "max_tokens": 8}),
    ("mc2.global_bs_hierarchy", {**A3, **UNEQUAL}, {**A3, **UNEQUAL, "mc2_hierarchy": False}),
    ("mc2.mask", {**A3, "mask": True}, {**A3, "mask": True, "mask_is_prefix": True}),
    ("mc2.mask", {**A3, "mask": True}, {**A3, "mask": True, "mc2_hierarchy": False}),
    ("mc2.mask_hierarchy", {**A2, "mask": True, "mask_is_prefix": True}, A2),
    ("mc2.hidden", {**A3, "hidden": 7200}, {**A3, "hidden": 7168}),
    ("mc2.local_experts_hierarchy", {**A3, "experts": 400}, {**A3, "experts": 384}),
    ("mc2.local_experts_hierarchy", {**A2, "experts": 400}, {**A2, "experts": 384}),
    ("mc2.comm_alg", {"soc": "A5", "mc2_hierarchy": True}, {"soc": "A5"}),
    ("fused.hierarchy", {**A3, "comm": "fused_mc2"}, {"soc": "A3", "comm": "fused_mc2"}),
    ("mc2.buffer", {**A3, "hccl_buffer_mb": 404}, {**A3, "hccl_buffer_mb": 405}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "broken", "legal"), REFUSED, ids=[code for code, _, _ in REFUSED])
def test_refused(code: str, broken: dict[str, Any], legal: dict[str, Any]) -> None:
    comm = broken.get("comm", "mc2")
    testing.assert_refused(lower(**broken)[0], code=code, comm=comm)
    testing.assert_lowered(lower(**legal)[0], comm=comm)


@pytest.mark.parametrize(("soc", "mode", "group_tp", "code"), [
    ("A3", "npugraph_ex", "mc2", None),
    ("A3", "npugraph_ex", "", None),
    ("A5", "npugraph_ex", "mc2", None),
    ("A5", "npugraph_ex", "", None),
    ("A2", "npugraph_ex", "", None),
    ("A2", "ge", "", "mc2.group_tp_graph"),
    ("A2", "ge", "mc2", None),
])  # fmt: skip
def test_the_tp_group_of_a_call(soc: str, mode: str, group_tp: str, code: str | None) -> None:
    """A call written by hand: A3 and A5 do not look at it, A2 wants the EP group's name in graph mode."""
    x, ids = torch.empty(8, 1024, dtype=torch.bfloat16), torch.empty(8, 3, dtype=torch.int32)
    given = {"group_tp": group_tp, **({"expert_scales": torch.empty(8, 3)} if soc == "A2" else {})}
    operator = torch.ops.npu.npu_moe_distribute_dispatch_v2.default
    extra = {"buffer_bytes": 2**30, "mode": mode}
    found = check_call(operator, (x, ids, "mc2", 16, 0, 48), given, soc=soc, extra=extra, versions={"cann": "9.1.0"})
    assert [violation.code for violation in found] == ([code] if code else [])
