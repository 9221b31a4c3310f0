"""A decode step's few rows take another way through the CPU kernels: it gives the same, bit by bit, and refuses the same."""

from __future__ import annotations

import pytest
import torch

from moe_lowering.custom_ops import combine, dispatch_plan, grouped_mlp, library
from moe_lowering.custom_ops.dispatch_plan import FEW, make_plan
from moe_lowering.custom_ops.placement import Placement

OPS = torch.ops.moe_lowering
EXPERTS, HIDDEN = 8, 16
GROUP = (EXPERTS, "", 1, "", 1, 0)


@pytest.fixture
def many(monkeypatch):
    """Calls of a function as if it had many rows."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch_plan, "FEW", -1)
            patch.setattr(combine, "FEW", -1)
            return function()

    return call


def ids_of(tokens, top_k, seed=0):
    torch.manual_seed(seed)
    return torch.stack([torch.randperm(EXPERTS)[:top_k] for _ in range(tokens)]).int().view(tokens, top_k)


def layer(ids, dtype=torch.bfloat16, mask=None):
    """dispatch, something done to the rows, combine."""
    torch.manual_seed(1)
    x = torch.randn(len(ids), HIDDEN).to(dtype)
    weights = torch.rand(ids.shape)
    rows, _, counts, handle = OPS.dispatch(x, None, ids, mask, *GROUP, 0)
    y = OPS.combine(rows * 1.5 + 0.25, weights, ids, handle, mask, *GROUP)
    return rows[: int(counts.sum())], counts, handle, y


@pytest.mark.parametrize("dtype", grouped_mlp.FLOATS, ids=str)
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 4), (7, 3), (FEW // 4, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_few_rows_are_what_many_are(many, tokens, top_k, dtype, masked):
    ids = ids_of(tokens, top_k)
    mask = torch.arange(tokens) % 3 != 1 if masked else None
    assert make_plan(ids, mask, Placement(EXPERTS, 1), 0, 0).listed is not None
    assert make_plan(ids_of(FEW // 4 + 1, 4), None, Placement(EXPERTS, 1), 0, 0).listed is None
    for ours, theirs in zip(layer(ids, dtype, mask), many(lambda: layer(ids, dtype, mask)), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.stride() == theirs.stride()


@pytest.mark.parametrize(
    "ids",
    [[[0, 1], [-1, 2]], [[0, 1], [2, EXPERTS]], [[3, 3], [1, 2]], [[0, 1], [5, 5]], [[-2, 9], [5, 5]]],
    ids=["negative", "past the last", "twice", "twice later", "several"],
)
def test_few_rows_are_refused_as_many_are(many, ids):
    errors = []
    for run in (lambda call: call(), many):
        with pytest.raises(ValueError, match=r"dispatch: ids has -?\d+ .*for token") as caught:
            run(lambda: layer(torch.tensor(ids, dtype=torch.int32)))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("change", ["a line lost", "a slot twice"])
def test_a_handle_that_dispatch_did_not_make_is_refused(many, change):
    ids = ids_of(3, 2)
    rows, _, _, handle = OPS.dispatch(torch.randn(3, HIDDEN), None, ids, None, *GROUP, 0)
    handle[0] = torch.tensor([-1, -1, -1], dtype=torch.int32) if change == "a line lost" else handle[1]
    errors = []
    for run in (lambda call: call(), many):
        with pytest.raises(ValueError, match="combine: handle") as caught:
            run(lambda: OPS.combine(rows, torch.rand(3, 2), ids, handle, None, *GROUP))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("dtype", grouped_mlp.FLOATS, ids=str)
def test_experts_without_rows_cost_no_product_and_change_nothing(dtype):
    torch.manual_seed(0)
    weights = torch.randn(64, HIDDEN, 8, dtype=torch.float64).to(dtype)
    counts = [0] * 64
    counts[5], counts[63], counts[17] = 2, 1, 3
    rows = torch.randn(6, HIDDEN, dtype=torch.float64).to(dtype)
    ours = grouped_mlp.grouped_matmul(rows, counts, [weights], [], dtype)
    owner = torch.tensor([5, 5, 17, 17, 17, 63])
    exact = (rows.double().unsqueeze(1) @ weights.double()[owner]).squeeze(1)
    assert (ours.double() - exact).abs().max() <= exact.abs().max() * 2 * torch.finfo(dtype).eps


def test_arguments_that_passed_once_do_not_let_others_pass():
    ids = ids_of(2, 2)
    x = torch.randn(2, HIDDEN)
    for _ in range(2):
        OPS.dispatch(x, None, ids, None, *GROUP, 0)
        with pytest.raises(TypeError, match=r"ids is torch\.int64"):
            OPS.dispatch(x, None, ids.long(), None, *GROUP, 0)
        with pytest.raises(ValueError, match="leading dimensions"):
            OPS.dispatch(x[:1], None, ids, None, *GROUP, 0)
        with pytest.raises(ValueError, match="max_rows is -1"):
            OPS.dispatch(x, None, ids, None, *GROUP, -1)


def test_equal_numbers_of_other_types_are_checked_by_themselves():
    seen = []
    check = seen.append
    for call in ((1,), (True,), (1.0,), (1,), (torch.zeros(2),), (torch.ones(2),), ([torch.zeros(2)],)):
        library.check_once(check, call)
    assert len(seen) == 5


def test_what_passed_is_forgotten_before_it_grows_without_end(monkeypatch):
    monkeypatch.setattr(library, "MOST_PASSED", 4)
    monkeypatch.setattr(library, "_PASSED", set())
    for number in range(10):
        library.check_once(lambda call: None, (number,))
    assert 0 < len(library._PASSED) <= 4
