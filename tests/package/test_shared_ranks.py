"""Shared-expert ranks without ranks: what Deployment, layers and the generic operators accept, and the decision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared_rank_jobs import decided
from test_layers import experts_modules
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_lowering import (
    Deployment,
    MoE,
    MoeLowering,
    moe_experts,
    quantise_experts,
    shard_experts,
    testing,
)
from moe_lowering.functional import check_expert_map
from moe_lowering.passes.find_blocks import find_blocks
from moe_lowering.passes.legality import refusal

ops = torch.ops.moe_lowering
FOUR = Deployment(ep_size=4, ep_group="g", shared_expert_ranks=2, shared_experts=2)
EXPERTS, H, INNER = 6, 1024, 128


def place(rank: int, **fields: Any) -> Deployment:
    return FOUR.replace(ep_rank=rank, **fields)


# ------------------------------------------------------------------------------------------------------------ deployment


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"shared_expert_ranks": 4}, "shared_expert_ranks is 4; accepted: 0 to ep_size - 1 = 3"),
        ({"shared_expert_ranks": -1}, "shared_expert_ranks is -1; accepted: 0 to"),
        ({"shared_experts": 3}, "shared_experts is 3; accepted: a divisor of shared_expert_ranks, 2"),
        ({"shared_experts": 0}, "shared_experts is 0; accepted: a divisor of"),
        ({"shared_expert_ranks": 0}, "shared_experts is 2; accepted: 1, as there are no shared_expert_ranks"),
        ({"shared_expert_ranks": True}, "shared_expert_ranks is True; accepted: an int"),
    ],
)
def test_deployment_refuses(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FOUR.replace(**fields)


def test_which_rank_holds_what() -> None:
    six = Deployment(ep_size=6, ep_group="g", shared_expert_ranks=4, shared_experts=2)
    ranks = [six.replace(ep_rank=rank) for rank in range(6)]
    assert [rank.on_shared_rank for rank in ranks] == [True] * 4 + [False] * 2
    assert [rank.shared_expert for rank in ranks] == [0, 0, 1, 1, None, None]
    assert [list(range(8))[rank.own_experts(8)] for rank in ranks[3:]] == [[], [0, 1, 2, 3], [4, 5, 6, 7]]


def test_all_ranks_have_one_digest_and_other_shared_ranks_another() -> None:
    assert place(0).digest() == place(3).digest()
    assert place(0).digest() != place(0, shared_experts=1).digest()
    assert place(0, shared_experts=1).digest() != place(0, shared_experts=1, shared_expert_ranks=1).digest()


# ------------------------------------------------------------------------------------------------- layers and moe_experts


def layer(shared: int = 2, **options: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(32, 16, EXPERTS, 2, shared_experts=shared, **options)


@pytest.mark.parametrize("quantised", ["never", "before", "after"])
def test_shared_ranks_keep_a_shared_expert_and_the_others_routed_ones(quantised: str) -> None:
    whole = layer()
    reference = quantise_experts(layer(), "w8a8") if quantised != "never" else whole
    for rank in range(4):
        mine = layer()
        if quantised == "before":
            quantise_experts(mine, "w8a8")
        shard_experts(mine, place(rank))
        if quantised == "after":
            quantise_experts(mine, "w8a8")
        assert not [name for name, _ in mine.named_parameters() if name.startswith("shared_")]
        names = ["w13", "w2", *(["w13_scale", "w2_scale"] if quantised != "never" else [])]
        for name in names:
            own = (
                getattr(reference, f"shared_{name}")[rank : rank + 1]
                if rank < 2
                else getattr(reference, name).chunk(2)[rank - 2]
            )
            assert torch.equal(getattr(mine, name), own) and getattr(mine, name).is_contiguous()
        assert shard_experts(mine, place(rank)) is mine  # again: nothing changes
        assert mine.w13.shape[0] == (1 if rank < 2 else 3)


def test_biases_go_with_their_experts() -> None:
    own, whole = layer(expert_bias=True), layer(expert_bias=True)
    for module in (own, whole):
        for name in ("w13_bias", "w2_bias", "shared_w13_bias", "shared_w2_bias"):
            torch.manual_seed(len(name))
            nn.init.normal_(getattr(module, name))
    shard_experts(own, place(1))
    assert torch.equal(own.w13_bias, whole.shared_w13_bias[1:])  # type: ignore[index, arg-type]
    assert torch.equal(own.w2_bias, whole.shared_w2_bias[1:])  # type: ignore[index, arg-type]


def test_a_layer_can_be_made_for_its_rank() -> None:
    assert [layer(deployment=place(rank)).w13.shape[0] for rank in range(4)] == [1, 1, 3, 3]


def test_layers_refuse() -> None:
    message = "MoE: shared_experts is 2 and no deployment is given"
    with pytest.raises(ValueError, match=message):
        layer()(torch.zeros(1, 32))
    with pytest.raises(
        ValueError, match="shared_experts is 2; accepted: 0, as the deployment has 0 shared-expert ranks"
    ):
        shard_experts(layer(), Deployment(ep_size=2, ep_rank=0, ep_group="g"))
    with pytest.raises(ValueError, match="shared_experts is 1; accepted: 2"):
        layer(1, deployment=place(0))
    with pytest.raises(
        ValueError, match=r"shared_experts is 0; accepted: 2.*modules of transformers hold no shared experts"
    ):
        shard_experts(experts_modules()[0], place(0))
    odd = MoE(32, 16, 7, 2, shared_experts=2)
    with pytest.raises(ValueError, match="num_experts is 7; accepted: a multiple of ep_size - shared_expert_ranks, 2"):
        shard_experts(odd, place(3))


def test_moe_experts_refuses() -> None:
    x, weights, ids = torch.zeros(3, 32), torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.int32)
    w13, w2 = torch.zeros(1, 32, 32), torch.zeros(1, 16, 32)
    for rank in range(4):  # all of them, or some would wait for the others
        with pytest.raises(ValueError, match="num_experts is None with 2 shared-expert ranks"):
            moe_experts(x, weights, ids, w13, w2, deployment=place(rank))
    with pytest.raises(ValueError, match="apply_router_weight_on_input is True with 2 shared-expert ranks"):
        moe_experts(x, weights, ids, w13, w2, num_experts=6, deployment=place(0), apply_router_weight_on_input=True)


def test_expert_map_begins_after_the_shared_ranks() -> None:
    maps = [[-1] * 6, [-1] * 6, [0, 1, 2, -1, -1, -1], [-1, -1, -1, 0, 1, 2]]
    for rank, right in enumerate(maps):
        check_expert_map(torch.tensor(right), 6, place(rank))
    with pytest.raises(ValueError, match="has 0 for expert 0 on EP rank 0; accepted: -1"):
        check_expert_map(torch.tensor(maps[2]), 6, place(0))


# ------------------------------------------------------------------------------------------------- the generic operators


def fake_dispatch(tokens: Any, told: bool, **changes: Any) -> tuple[torch.Tensor, ...]:
    sizes = {
        "num_experts": 6,
        "ep_group": "g",
        "ep_size": 4,
        "tp_group": "",
        "tp_size": 1,
        "max_tokens": 0,
        "max_rows": 0,
    }
    shared = {"shared_expert_ranks": 2, "shared_experts": 1, "on_shared_rank": told}
    ids = torch.zeros(tokens, 4, dtype=torch.int32)
    return ops.dispatch(torch.zeros(tokens, 8), None, ids, None, **sizes | shared | changes)


@pytest.mark.parametrize(
    ("changes", "shared", "routed"),
    [
        ({}, 10, 60),  # ep * T / 2 ranks for it; ep * T * min(k, 3)
        ({"shared_experts": 2}, 20, 60),
        ({"shared_expert_ranks": 3}, 10, 80),  # rank 0 of three serves ranks 0 and 3; min(k, 6) is 4
        ({"max_tokens": 7}, 14, 84),
        ({"max_rows": 12}, 10, 12),
        ({"max_rows": 9}, 9, 9),
    ],
)
def test_rows_of_both_kinds_of_rank(changes: dict[str, Any], shared: int, routed: int) -> None:
    with FakeTensorMode():
        for told, rows in ((True, shared), (False, routed)):
            out = fake_dispatch(5, told, **changes)
            assert [tuple(t.shape) for t in out] == [
                (rows, 8), (0,), (1 if told else 6 // (4 - changes.get("shared_expert_ranks", 2)),), (rows, 3),
            ]  # fmt: skip


def test_rows_of_symbolic_tokens() -> None:
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        tokens = env.create_unbacked_symint()
        torch._check(tokens >= 2)
        rows = fake_dispatch(tokens, True)[0].shape[0]
        assert rows.node.expr == (2 * tokens).node.expr
    assert not env.guards


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"shared_expert_ranks": 4}, "dispatch: shared_expert_ranks is 4; accepted: 0 to ep_size - 1 = 3"),
        ({"shared_experts": 3}, "dispatch: shared_experts is 3; accepted: a divisor of shared_expert_ranks, 2"),
        ({"num_experts": 7}, "dispatch: num_experts is 7; accepted: a multiple of ep_size - shared_expert_ranks, 2"),
        ({"shared_expert_ranks": 0, "num_experts": 8}, "on_shared_rank is True with shared_expert_ranks 0"),
        ({"shared_expert_ranks": 0, "shared_experts": 2, "num_experts": 8}, "accepted: 1, as there are no"),
    ],
)
def test_dispatch_refuses(changes: dict[str, Any], text: str) -> None:
    for mode in (FakeTensorMode(), torch.device("cpu")):
        with mode, pytest.raises(ValueError, match=text):
            fake_dispatch(5, True, **changes)


# ---------------------------------------------------------------------------------------------------------- the decision


def lowered(
    rank: int, comm: str = "auto", experts: int = 12, width: int = INNER, dynamic: bool = False, **fields: Any
) -> Any:
    given = {"ep_size": 4, "ep_rank": rank, "shared_expert_ranks": 2, "shared_experts": 2, **fields}
    with testing.fake_deployment(**given) as deployment, testing.fake_tensors():
        model = MoE(
            H, width, experts, 3, deployment=deployment, dtype=torch.bfloat16,
            shared_experts=deployment.shared_experts if deployment.shared_expert_ranks else 0,
        )  # fmt: skip
        x = torch.empty(8, H, dtype=torch.bfloat16)
        return testing.lower_graph(model, x, deployment=deployment, comm=comm, dynamic=dynamic)


MC2_OPS = ["npu.npu_moe_distribute_dispatch_v2", "npu.npu_grouped_matmul", "npu.npu_moe_distribute_combine_v2"]


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_lowered_to_mc2_with_the_sizes_at_both_ends(rank: int) -> None:
    result = lowered(rank)
    testing.assert_lowered(result, comm="mc2", ops=MC2_OPS)
    ends = [node for node in result.gm.graph.nodes if "moe_distribute" in str(node.target)]
    assert len(ends) == 2
    for node in ends:
        assert (node.kwargs["shared_expert_num"], node.kwargs["shared_expert_rank_num"]) == (2, 2)
        assert node.kwargs.get("expert_shard_type", 0) == 0
        assert rank in node.args


def test_without_shared_ranks_nothing_is_named() -> None:
    result = lowered(0, "mc2", shared_expert_ranks=0, shared_experts=1)
    testing.assert_lowered(result, comm="mc2", ops=MC2_OPS)
    assert not any("shared" in name for node in result.gm.graph.nodes for name in node.kwargs)


@pytest.mark.parametrize(("comm", "code"), [
    ("allgather", "allgather.shared_expert_ranks"), ("alltoall", "alltoall.shared_expert_ranks"),
    ("fused_mc2", "fused.shared_expert_ranks"),
])  # fmt: skip
def test_other_implementations_refuse(comm: str, code: str) -> None:
    for rank in (0, 3):
        result = lowered(rank, comm)
        testing.assert_refused(result, comm=comm, code=code)
        assert result.report.blocks[0].comm is None
    without = lowered(0, comm, shared_expert_ranks=0, shared_experts=1)
    assert without.report.blocks[0].comm == comm


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"soc": "A2"}, "mc2.shared_expert_ranks"),
        ({"mc2_hierarchy": True, "ep_size": 16, "experts": 28}, "mc2.shared_expert_ranks"),
        ({"ep_size": 16, "shared_expert_ranks": 10, "shared_experts": 5, "experts": 30}, "mc2.shared_experts"),
        ({"hccl_buffer_mb": 1}, "mc2.buffer"),
    ],
)
def test_mc2_refuses_on_every_kind_of_rank(fields: dict[str, Any], code: str) -> None:
    for rank in (0, fields.get("ep_size", 4) - 1):
        result = lowered(rank, "mc2", **fields)
        testing.assert_refused(result, comm="mc2", code=code)
        assert result.report.blocks[0].comm is None


INVARIANT: list[dict[str, Any]] = [
    {}, {"dynamic": True}, {"dynamic": True, "max_tokens": 64}, {"max_tokens": 64, "equal_tokens": False},
    {"max_tokens": 600, "equal_tokens": False}, {"soc": "A2"}, {"soc": "A5"}, {"width": 100}, {"hccl_buffer_mb": 2},
    {"hccl_buffer_mb": 4}, {"experts": 1024}, {"experts": 2048}, {"shared_experts": 1}, {"max_rows": 5},
]  # fmt: skip


@pytest.mark.parametrize("fields", INVARIANT, ids=str)
def test_both_kinds_of_rank_decide_alike(fields: dict[str, Any]) -> None:
    """Verdicts of all implementations with their values, the choice, and for which T."""

    def seen(rank: int) -> Any:
        block = lowered(rank, **fields).report.blocks[0]
        return block.comm, block.reason, block.notes, {n: (v.form, v.violations) for n, v in block.verdicts.items()}

    assert seen(0) == seen(1) == seen(3)


def test_a_rank_that_is_judged_by_its_own_experts_would_refuse_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a shared-expert rank holds one expert and is told the counts of several; the others see no fault."""
    from moe_lowering.passes.operands import ExpertOperands

    def refusals() -> list[set[str]]:
        results = [lowered(rank, experts=60) for rank in (0, 3)]
        return [{v.code for v in result.report.blocks[0].verdicts["mc2"].violations} for result in results]

    assert refusals() == [set(), set()]
    monkeypatch.setattr(ExpertOperands, "of_routed_rank", lambda tensors, experts: tensors)
    assert refusals() == [{"gmm.group_list_length"}, set()]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"shared_expert_ranks": 1, "shared_experts": 1}, "deployment.shared_expert_ranks"),
        ({"shared_experts": 1}, "deployment.shared_experts"),
    ],
)
def test_a_block_of_another_deployment(changes: dict[str, Any], code: str) -> None:
    with (
        testing.fake_deployment(ep_size=4, shared_expert_ranks=2, shared_experts=2) as deployment,
        testing.fake_tensors(),
    ):
        model = MoE(H, INNER, 12, 3, deployment=deployment, dtype=torch.bfloat16, shared_experts=2)
        x = torch.empty(8, H, dtype=torch.bfloat16)
        result = testing.lower_graph(model, x, deployment=deployment.replace(**changes))
    testing.assert_refused(result, code=code)
    assert result.report.blocks[0].comm is None


def test_a_graph_built_for_the_other_kind_of_rank_refuses_to_run() -> None:
    """The others have decided for MC2 and will communicate: the decision is theirs, and this graph must not run."""
    with (
        testing.fake_deployment(ep_size=4, shared_expert_ranks=2, shared_experts=2) as deployment,
        testing.fake_tensors(),
    ):
        model = MoE(H, INNER, 12, 3, deployment=deployment, dtype=torch.bfloat16, shared_experts=2)
        x = torch.empty(8, H, dtype=torch.bfloat16)
        lowering = MoeLowering(deployment.replace(ep_rank=2))
        result = testing.lower_graph(model, x, deployment=deployment, lowering=lowering)
        assert decided(lowering)[0][2]["mc2"] == []
        (block,), _, _ = find_blocks(result.gm.graph)
        assert refusal(block.spec, deployment) is None
    assert result.report.blocks[0].comm is None
    assert "built for a shared-expert rank, EP rank 2 is a rank with routed experts" in result.report.blocks[0].reason
    (check,) = result.gm.graph.find_nodes(op="call_function", target=ops.assert_tokens.default)
    assert check.args[1:] == (0, -1)
