"""The communicating operators on two and four real ranks: against dense references and hand-computed vectors.

Functions that begin with ``on_`` run in the ranks' processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from rank_pools import Ranks
from torch import Tensor

from moe_lowering import Deployment, functional
from moe_lowering.layers import MoE, shard_experts

pytestmark = pytest.mark.xdist_group("custom_ops_ranks")
ops = torch.ops.moe_lowering
EXPERTS, HIDDEN, INNER = 8, 32, 16


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Spawned, and so without torch_npu, which the operators must not need; other ranks of the tests have the simulator's."""
    with Ranks(2, collective_timeout=20, start_method="spawn") as ranks:
        yield ranks
        assert ranks.run(on_imported, "torch_npu") == [False, False]


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4, collective_timeout=20) as ranks:
        yield ranks


def on_imported(rank: int, module: str) -> bool:
    return module in sys.modules


def world() -> str:
    return dist.group.WORLD.group_name  # type: ignore[union-attr]


_TP: dict[int, str] = {}


def tp_group(tp_size: int) -> str:
    """Name of this rank's TP group: consecutive ranks. Groups are made once, on all ranks."""
    if tp_size == 1:
        return ""
    if tp_size not in _TP:
        for first in range(0, dist.get_world_size(), tp_size):
            group = dist.new_group(list(range(first, first + tp_size)))
            if first <= dist.get_rank() < first + tp_size:
                _TP[tp_size] = group.group_name
    return _TP[tp_size]


def place(tp_size: int = 1, **changes: Any) -> Deployment:
    rank, size = dist.get_rank(), dist.get_world_size()
    fields = {"ep_size": size, "ep_rank": rank, "ep_group": world(), "tp_size": tp_size, "tp_rank": rank % tp_size}
    return Deployment(**fields, tp_group=tp_group(tp_size), **changes)


def data(rank: int, tokens: int, dtype: torch.dtype, top_k: int = 2, skew: bool = False) -> tuple[Tensor, ...]:
    """x, weights, ids of a rank and the weights of all experts; equal ``rank`` gives equal tokens."""
    torch.manual_seed(7)
    w13 = (torch.randn(EXPERTS, HIDDEN, 2 * INNER) / 6).to(dtype)
    w2 = (torch.randn(EXPERTS, INNER, HIDDEN) / 4).to(dtype)
    torch.manual_seed(100 + rank)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    bias = torch.tensor([9.0] * top_k + [0.0] * (EXPERTS - top_k)) if skew else None
    weights, ids = functional.route(torch.randn(tokens, EXPERTS), top_k, bias=bias)
    return x, weights, ids, w13, w2


def local(weights: Tensor, deployment: Deployment) -> Tensor:
    return weights.chunk(deployment.ep_size)[deployment.own_rank("ep")]


def caught(function: Callable[[], Any]) -> tuple[str, str]:
    """The error that a function raises, as (type, message): a rank that raised could not be used again."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


# the chain


def on_chain(
    rank: int,
    tokens: list[int],
    dtype: torch.dtype,
    tp_size: int,
    top_k: int,
    skew: bool,
    masked: bool,
    fields: dict[str, Any],
) -> tuple[float, Tensor]:
    deployment = place(tp_size, **fields)
    replica = rank // tp_size
    x, weights, ids, w13, w2 = data(replica, tokens[replica], dtype, top_k, skew)
    mask = torch.arange(tokens[replica]) % 3 != 1 if masked else None
    y = functional.moe_experts(
        x, weights, ids, local(w13, deployment), local(w2, deployment), mask=mask, deployment=deployment
    )
    assert y.dtype == dtype
    expected = reference.moe(x, weights, ids, w13, w2, mask=mask)
    return reference.relative_error(y, expected), y


CHAINS: list[tuple[str, list[int], int, dict[str, Any]]] = [
    ("even", [9, 9, 9, 9], 1, {}),
    ("unequal", [1, 12, 0, 5], 1, {"equal_tokens": False, "max_tokens": 12}),
    ("none", [0, 0, 0, 0], 1, {}),
    ("one", [1, 1, 1, 1], 1, {}),
    ("tp", [7, 7, 7, 7], 2, {}),
    ("tp-unequal", [5, 8, 1, 1], 2, {"equal_tokens": False, "max_tokens": 9}),
    ("tp-one", [1, 1, 1, 1], 2, {}),
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("name", "tokens", "tp_size", "fields"), CHAINS, ids=[chain[0] for chain in CHAINS])
def test_chain(
    size: int, name: str, tokens: list[int], tp_size: int, fields: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    ranks: Ranks = request.getfixturevalue({2: "two", 4: "four"}[size])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for top_k, skew, masked in ((2, False, False), (3, True, False), (1, False, True)):
            results = ranks.run(on_chain, tokens, dtype, tp_size, top_k, skew, masked, fields)
            for rank, (error, y) in enumerate(results):
                assert error <= reference.BOUNDS[dtype], (dtype, top_k, rank)
                assert torch.equal(y, results[rank - rank % tp_size][1])  # the same bits on all ranks of a TP group


def on_swapped_experts(rank: int) -> float:
    deployment = place()
    x, weights, ids, w13, w2 = data(rank, 9, torch.bfloat16)
    wrong = [w.chunk(2)[1 - rank] for w in (w13, w2)]  # a deployment does not take the other's rank
    y = functional.moe_experts(x, weights, ids, *wrong, deployment=deployment)
    return reference.relative_error(y, reference.moe(x, weights, ids, w13, w2))


def test_the_comparison_detects_swapped_owners(two: Ranks) -> None:
    assert min(two.run(on_swapped_experts)) > 10 * reference.BOUNDS[torch.bfloat16]


# dispatch and combine, each alone


def on_dispatch_by_hand(rank: int) -> tuple[Any, ...]:
    x = torch.tensor([[[10.0], [11.0], [12.0]], [[20.0], [21.0], [22.0]]])[rank]
    ids = torch.tensor([[[2, 0], [3, 2], [1, 0]], [[0, 3], [2, 1], [3, 0]]], dtype=torch.int32)[rank]
    mask = torch.tensor([[True, True, False], [True, True, True]])[rank]
    scale = x[:, 0] / 100
    out = ops.dispatch(x, scale, ids, mask, 4, world(), 2, "", 1, 0, 0)
    return tuple(tensor.tolist() for tensor in out)


def test_dispatch_by_hand(two: Ranks) -> None:
    """Rank 0 owns experts 0 and 1, rank 1 owns 2 and 3. Token 2 of rank 0 is masked."""
    first, second = two.run(on_dispatch_by_hand)
    past = [[-1, -1, -1]]
    assert first[0] == [[10.0], [20.0], [22.0], [21.0]] + 8 * [[0.0]]
    assert first[1] == pytest.approx([0.10, 0.20, 0.22, 0.21] + 8 * [0.0])
    assert first[2] == [3, 1]
    assert first[3] == [[0, 0, 1], [1, 0, 0], [1, 2, 1], [1, 1, 1]] + 8 * past
    assert second[0] == [[10.0], [11.0], [21.0], [11.0], [20.0], [22.0]] + 6 * [[0.0]]
    assert second[2] == [3, 3]
    assert second[3] == [[0, 0, 0], [0, 1, 1], [1, 1, 0], [0, 1, 0], [1, 0, 1], [1, 2, 0]] + 6 * past


def on_combine_by_hand(rank: int) -> list[Any]:
    ids = torch.tensor([[[1], [0]], [[1], [1]]], dtype=torch.int32)[rank]
    weights = torch.tensor([[[2.0], [3.0]], [[5.0], [7.0]]])[rank]
    handles = [[[0, 1, 0], [-1, -1, -1]], [[0, 0, 0], [1, 0, 0], [1, 1, 0]]]
    rows = [[[1.0, 2.0], [torch.nan, torch.nan]], [[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]]
    handle = torch.tensor(handles[rank], dtype=torch.int32)
    return ops.combine(torch.tensor(rows[rank]), weights, ids, handle, None, 2, world(), 2, "", 1, 2).tolist()


def test_combine_by_hand(two: Ranks) -> None:
    first, second = two.run(on_combine_by_hand)
    assert first == [[6.0, 8.0], [3.0, 6.0]]
    assert second == [[25.0, 30.0], [49.0, 56.0]]


def on_tp_dispatch(rank: int) -> tuple[Any, ...]:
    x, ids = torch.arange(3.0).unsqueeze(1), torch.tensor([[0], [1], [0]], dtype=torch.int32)
    rows, _, counts, handle = ops.dispatch(x, None, ids, None, 2, world(), 2, tp_group(2), 2, 0, 0)
    return rows.flatten().tolist(), counts.tolist(), handle.tolist()


def test_tp_slices_by_hand(two: Ranks) -> None:
    """T = 3 over 2 ranks: rank 0 sends tokens 0 and 1, rank 1 sends token 2, its token 0."""
    first, second = two.run(on_tp_dispatch)
    assert first == ([0.0, 2.0, 0.0, 0.0], [2], [[0, 0, 0], [1, 0, 0], [-1, -1, -1], [-1, -1, -1]])
    assert second == ([1.0, 0.0, 0.0, 0.0], [1], [[0, 1, 0], [-1, -1, -1], [-1, -1, -1], [-1, -1, -1]])


def on_int8(rank: int) -> tuple[Any, ...]:
    x = torch.full((1, 3), -100 + rank, dtype=torch.int8)
    ids = torch.tensor([[1 - rank]], dtype=torch.int32)
    rows, scale, _, _ = ops.dispatch(x, torch.tensor([0.5 + rank]), ids, None, 2, world(), 2, "", 1, 0, 0)
    return rows.dtype, rows.tolist(), scale.tolist()


def test_int8_rows_travel_with_their_scale(two: Ranks) -> None:
    first, second = two.run(on_int8)
    assert first == (torch.int8, [[-99, -99, -99], [0, 0, 0]], [1.5, 0.0])
    assert second == (torch.int8, [[-100, -100, -100], [0, 0, 0]], [0.5, 0.0])


# mistakes: every rank raises the same, none hangs, and the group can be used afterwards


def on_mistake(rank: int, kind: str) -> tuple[tuple[str, str], float]:
    tokens, max_tokens, max_rows, tp_size = 4, 0, 0, 1
    if kind == "unequal":
        tokens = 4 + rank
    elif kind == "too many":
        tokens, max_tokens = 4 + rank, 4
    elif kind == "rows":
        max_rows = 5
    elif kind == "tp":
        tokens, max_tokens, tp_size = 4 + rank, 8, 2
    ids = torch.tensor([[0, 1]] * tokens, dtype=torch.int32)
    width = 3
    if rank == 1:
        if kind == "range":
            ids[2, 1] = 4
        elif kind == "negative":
            ids[3, 0] = -1
        elif kind == "twice":
            ids[1, 1] = 0
        elif kind == "width":
            width = 4

    def call() -> None:
        x = torch.ones(tokens, width)
        ops.dispatch(x, None, ids, None, 4, world(), 2, tp_group(tp_size), tp_size, max_tokens, max_rows)

    error = caught(call)
    return error, on_chain(rank, [3, 3], torch.float32, 1, 2, False, False, {})[0]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (
            "unequal",
            "ValueError",
            "max_tokens is 0, which says that T is equal on all ranks, but T is 4 on EP rank 0 and 5",
        ),
        ("too many", "ValueError", "T is 5 on EP rank 1; accepted: at most max_tokens, 4"),
        ("rows", "RuntimeError", "EP rank 0 would receive 16 rows; accepted: at most R = 5 (max_rows is 5)"),
        ("tp", "ValueError", "T is 5 on EP rank 1 and 4 on another rank of its TP group"),
        ("range", "ValueError", "ids has 4 for token 2 on EP rank 1; accepted: 0 to 3"),
        ("negative", "ValueError", "ids has -1 for token 3 on EP rank 1; accepted: 0 to 3"),
        ("twice", "ValueError", "ids has 0 twice for token 1 on EP rank 1; accepted: distinct ids"),
        ("width", "ValueError", "EP ranks 0 and 1 were given different k, hidden sizes or dtypes"),
    ],
)
def test_mistakes_raise_on_every_rank(two: Ranks, kind: str, name: str, message: str) -> None:
    for (raised, text), error in two.run(on_mistake, kind, timeout=30):
        assert raised == name and text.startswith(f"dispatch: {message}"), text
        assert error <= reference.BOUNDS[torch.float32]


def on_wrong_handle(rank: int) -> tuple[str, str]:
    ids = torch.tensor([[0], [1]], dtype=torch.int32)
    handle = torch.tensor([[0, 0, 0], [-1, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    rows, weights = torch.ones(3, 2), torch.ones(2, 1)
    return caught(lambda: ops.combine(rows, weights, ids, handle, None, 2, world(), 2, "", 1, 0))


def test_combine_refuses_a_handle_of_other_ids_on_every_rank(four: Ranks, two: Ranks) -> None:
    for raised, text in two.run(on_wrong_handle, timeout=30):
        assert raised == "ValueError" and "handle sends 0 rows to EP rank 1, whose ids and mask ask for 2" in text


def on_wrong_size(rank: int) -> tuple[str, str]:
    ids = torch.tensor([[0]], dtype=torch.int32)
    return caught(lambda: ops.dispatch(torch.ones(1, 1), None, ids, None, 4, world(), 4, "", 1, 0, 0))


def test_group_of_another_size_is_refused(two: Ranks) -> None:
    for raised, text in two.run(on_wrong_size):
        assert raised == "ValueError" and "ep_size is 4, but group" in text and "has 2 ranks" in text


def on_opcheck(rank: int) -> None:
    x, weights, ids, _, _ = data(rank // 2, 5, torch.bfloat16)
    mask = torch.tensor([True, True, False, True, True])
    parallel = (world(), 4, tp_group(2), 2, 6)
    torch.library.opcheck(ops.dispatch.default, (x, None, ids, mask, EXPERTS, *parallel, 0))  # type: ignore[attr-defined]
    rows, _, _, handle = ops.dispatch(x, None, ids, mask, EXPERTS, *parallel, 0)
    torch.library.opcheck(ops.combine.default, (rows, weights, ids, handle, mask, EXPERTS, *parallel))  # type: ignore[attr-defined]


def test_opcheck(four: Ranks) -> None:
    """All ranks at once: each call of the operators is a collective."""
    four.run(on_opcheck)


# layers


def on_layer(rank: int, tp_size: int, compiled: bool) -> float:
    torch.manual_seed(0)
    options: dict[str, Any] = {"selection_bias": True, "scoring": "sigmoid", "num_groups": 4, "topk_groups": 2}
    whole = MoE(HIDDEN, INNER, EXPERTS, 3, **options, scale=2.5, expert_bias=True)
    for parameter in (whole.w13_bias, whole.w2_bias, whole.selection_bias):
        torch.nn.init.normal_(parameter)  # type: ignore[arg-type]
    torch.manual_seed(rank // tp_size)
    x = torch.randn(2, 5, HIDDEN)
    expected = whole(x)
    shard_experts(whole, place(tp_size))
    assert whole.w13.shape[0] == EXPERTS // dist.get_world_size()
    with torch.no_grad():
        torch._dynamo.reset()
        model = torch.compile(whole, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else whole
        return reference.relative_error(model(x), expected.double())


@pytest.mark.parametrize(("tp_size", "compiled"), [(1, False), (2, False), (2, True)])
def test_sharded_layer_is_the_whole_layer(four: Ranks, tp_size: int, compiled: bool) -> None:
    assert max(four.run(on_layer, tp_size, compiled)) <= reference.BOUNDS[torch.float32]
