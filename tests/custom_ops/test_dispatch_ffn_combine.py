"""The wrapper of vllm-ascend's fused operator in 16 bits: its CPU kernel on four ranks, and its rules.

Quantised weights are in test_fused_wrappers.py, calls of the provider in test_provider_schemas.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from rank_pools import Ranks
from test_custom_ops_ranks import caught, world
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lowering import functional

pytestmark = pytest.mark.xdist_group("custom_ops_ranks")
ops = torch.ops.moe_lowering


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4, collective_timeout=20) as ranks:
        yield ranks


def fused_data(rank: int, tokens: int, dtype: torch.dtype, experts: int) -> tuple[Tensor, ...]:
    torch.manual_seed(8)
    w13, w2 = (torch.randn(experts, 64, 96) / 8).to(dtype), (torch.randn(experts, 48, 64) / 7).to(dtype)
    torch.manual_seed(200 + rank)
    weights, ids = functional.route(torch.randn(tokens, experts), 3)
    return torch.randn(tokens, 64).to(dtype), weights, ids, w13, w2


def on_fused(rank: int, dtype: torch.dtype, lists: bool, limit: int) -> tuple[Any, ...]:
    size, tokens = dist.get_world_size(), [6, 0, 3, 1][rank]
    experts = 3 * size
    x, weights, ids, w13, w2 = fused_data(rank, tokens, dtype, experts)
    own = [part.chunk(size)[rank] for part in (w13, w2)]
    one, other = (list(own[0]), list(own[1])) if lists else ([own[0]], [own[1]])
    out: list[Tensor] = []
    error = caught(lambda: out.extend(ops.dispatch_ffn_combine(x, one, other, ids, weights, world(), size, limit)))
    if not out:
        return error
    everyone = torch.cat([fused_data(r, [6, 0, 3, 1][r], dtype, experts)[2].flatten() for r in range(size)])
    counts = torch.bincount(everyone, minlength=experts).chunk(size)[rank]
    assert out[1].dtype == torch.int32 and torch.equal(out[1].long(), counts)
    assert out[0].dtype == dtype
    return reference.relative_error(out[0], reference.moe(x, weights, ids, w13, w2)), ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lists", [False, True])
def test_fused_operator(four: Ranks, dtype: torch.dtype, lists: bool) -> None:
    for error, _ in four.run(on_fused, dtype, lists, 100):
        assert error <= reference.BOUNDS[dtype]


def test_fused_operator_raises_where_the_real_one_drops_rows(four: Ranks) -> None:
    for raised, text in four.run(on_fused, torch.float16, False, 2, timeout=30):
        assert raised == "RuntimeError"
        assert text.startswith("dispatch_ffn_combine: EP rank 0 would receive ")
        assert text.endswith("accepted: at most max_output_size, 2")


def on_opcheck(rank: int) -> None:
    x, weights, ids, w13, w2 = fused_data(rank, 4, torch.bfloat16, 12)
    own = slice(3 * rank, 3 * rank + 3)
    arguments = (x, [w13[own]], [w2[own]], ids, weights, world(), 4, 100)
    torch.library.opcheck(ops.dispatch_ffn_combine.default, arguments)  # type: ignore[attr-defined]
    x.requires_grad_()
    torch.library.opcheck(ops.dispatch_ffn_combine.default, arguments, test_utils="test_autograd_registration")  # type: ignore[attr-defined]
    error = caught(lambda: ops.dispatch_ffn_combine(*arguments)[0].sum().backward())
    assert error[0] == "NotImplementedError" and "is for inference" in error[1]


def test_opcheck(four: Ranks) -> None:
    """All ranks at once: each call of the operator is a collective."""
    four.run(on_opcheck)


GOOD: dict[str, Any] = {
    "x": torch.ones(4, 64).half(),
    "w13": [torch.ones(3, 64, 32).half()],
    "w2": [torch.ones(3, 16, 64).half()],
    "ids": torch.zeros(4, 2, dtype=torch.int32),
    "weights": torch.ones(4, 2),
    "group": "g",
    "ep_size": 2,
    "max_output_size": 8,
}
PAIR = {"w13": [torch.ones(64, 32).half()] * 2, "w2": [torch.ones(16, 64).half()] * 2}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.ones(4, 64)}, "x is torch.float32"),
    ({"x": torch.ones(2, 2, 64).half()}, r"x is torch.float16 of shape \[2, 2, 64\]"),
    ({"x": torch.ones(4, 40).half()}, "x has hidden size 40; accepted: a multiple of 32"),
    ({"ep_size": 1}, "ep_size is 1; accepted: 2 to 32"),
    ({"ep_size": 33}, "ep_size is 33; accepted: 2 to 32"),
    ({"group": ""}, "group is ''"),
    ({"max_output_size": 0}, "max_output_size is 0; accepted: 1 or more"),
    ({"w13": [torch.ones(2, 64, 32).half()], "w2": [torch.ones(2, 16, 64).half()]}, "w13 holds 2 experts"),
    (PAIR, "w13 holds 2 experts"),
    ({"w13": [torch.ones(64, 32).half()]}, "w13 is not one tensor"),
    ({"w13": [torch.ones(3, 64, 31).half()]}, "w13 has 31 columns"),
    ({"w2": [torch.ones(3, 32, 64).half()]}, r"w2 has shape \[3, 32, 64\]; accepted: \[3, 16, 64\]"),
    ({"w2": [torch.ones(3, 16, 64).bfloat16()]}, r"w2 is torch.bfloat16; accepted: torch.float16"),
    ({"ids": torch.zeros(4, 2, dtype=torch.int64)}, "ids is torch.int64"),
    ({"ids": torch.zeros(3, 2, dtype=torch.int32)}, r"ids is torch.int32 of shape \[3, 2\]"),
    ({"ids": torch.zeros(4, 7, dtype=torch.int32), "weights": torch.ones(4, 7)}, "ids has k = 7; accepted: 1 to 6"),
    ({"w2": list(torch.ones(3, 16, 64).half())}, "w13 and w2 are not both one tensor or both a list of 1"),
    ({"w13_scale": [torch.ones(3, 32)]}, "w13_scale is given for quantisation 'none'; accepted: None"),
    ({"weights": torch.ones(4, 2).half()}, "weights is torch.float16"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_static_mistakes(change: dict[str, Any], message: str) -> None:
    """What the real operator refuses, or computes wrongly; the fake kernel and the CPU kernel say the same."""
    with pytest.raises((ValueError, TypeError), match=f"^dispatch_ffn_combine: {message}") as on_cpu:
        ops.dispatch_ffn_combine(**GOOD | change)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y, numbers = ops.dispatch_ffn_combine(**GOOD)
        assert y.shape == (4, 64) and y.dtype == torch.float16
        assert numbers.shape == (3,) and numbers.dtype == torch.int32
        with pytest.raises(type(on_cpu.value)) as on_fake:
            ops.dispatch_ffn_combine(**GOOD | change)
    assert str(on_fake.value) == str(on_cpu.value)
