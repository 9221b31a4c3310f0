"""What ``alltoall_experts`` owes its callers and torch: mistakes raise on every rank alike, and its place in graphs.

Functions that begin with ``on_`` run in the ranks' processes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
from alltoall_layers import KERNELS, Case, arguments_of, given_to, layer, on_case, operator
from rank_jobs import setup
from rank_pools import Ranks
from test_custom_ops_ranks import caught, world
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lowering.custom_ops import alltoall_experts, token_exchange
from moe_lowering.custom_ops.library import bind_kernel

pytestmark = pytest.mark.xdist_group("alltoall_experts")


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2, setup=setup, collective_timeout=20) as ranks:
        yield ranks


# ---------------------------------------------------------------- mistakes: every rank raises the same, and none hangs


def on_mistake(rank: int, kernel: str, kind: str) -> tuple[tuple[str, str], float]:
    tokens, options = 4, {}
    if kind == "unequal":
        tokens = 4 + rank
    elif kind == "too many":
        tokens, options = 4 + rank, {"max_tokens": 4}
    elif kind == "rows":
        options = {"max_rows": 5}
    ids = torch.tensor([[0, 1]] * tokens, dtype=torch.int32)
    mask = torch.ones(tokens, dtype=torch.bool)
    if kind == "masked":
        ids[2, 1], mask[2] = 8, False
    elif rank == 1 and kind == "range":
        ids[2, 1] = 8
    elif rank == 1 and kind == "negative":
        ids[3, 0] = -1
    elif rank == 1 and kind == "choices":
        ids = torch.tensor([[0, 1, 2]] * tokens, dtype=torch.int32)
    whole = layer(8, 32, 16, "none", torch.float32)
    arguments = arguments_of(
        x=torch.ones(tokens, 32), ids=ids, weights=torch.ones(ids.shape), num_experts=8, ep_group=world(), ep_size=2,
        mask=mask, **whole.shard(rank, 2, False), **options,
    )  # fmt: skip
    error = caught(lambda: KERNELS[kernel](*arguments))
    return error, on_case(rank, Case("after"), torch.float32, False)[kernel]


MISTAKES_OF_DATA = [
    (
        "unequal",
        "ValueError",
        "max_tokens is 0, which says that T is equal on all ranks, but T is 4 on EP rank 0 and 5",
    ),
    ("too many", "ValueError", "T is 5 on EP rank 1; accepted: at most max_tokens, 4"),
    ("rows", "RuntimeError", "EP rank 0 would receive 16 rows; accepted: at most R = 5 (max_rows is 5)"),
    ("range", "ValueError", "ids has 8 for token 2 on EP rank 1; accepted: 0 to 7"),
    ("negative", "ValueError", "ids has -1 for token 3 on EP rank 1; accepted: 0 to 7"),
    ("choices", "ValueError", "EP ranks 0 and 1 were given different k, hidden sizes or dtypes"),
]


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize(("kind", "name", "message"), MISTAKES_OF_DATA, ids=[m[0] for m in MISTAKES_OF_DATA])
def test_mistakes_raise_on_every_rank(two: Ranks, kernel: str, kind: str, name: str, message: str) -> None:
    for (raised, text), error in two.run(on_mistake, kernel, kind, timeout=30):
        assert raised == name and text.startswith(f"alltoall_experts: {message}"), text
        assert error <= reference.BOUNDS[torch.float32]


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_ids_of_masked_tokens_may_be_anything(two: Ranks, kernel: str) -> None:
    for (raised, text), _ in two.run(on_mistake, kernel, "masked", timeout=30):
        assert (raised, text) == ("", "nothing was raised")


def alone(**changes: Any) -> tuple[Any, ...]:
    """A call on one rank."""
    whole = layer(4, 16, 8, "none", torch.bfloat16)
    given = {
        "x": torch.ones(3, 16).bfloat16(), "ids": torch.tensor([[0, 1], [2, 3], [1, 3]], dtype=torch.int32),
        "weights": torch.ones(3, 2), "num_experts": 4, "ep_group": "", "ep_size": 1, **whole.shard(0, 1, False),
    }  # fmt: skip
    return arguments_of(**given | changes)


EIGHT = {"x": torch.ones(3, 16, dtype=torch.int8), "x_scale": torch.ones(3)}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.ones(1, 3, 16).bfloat16()}, r"x has shape \[1, 3, 16\]; accepted: \[M, hidden\]"),
    ({"x": torch.ones(3, 16).double()}, "x is torch.float64"),
    ({"x": torch.ones(3, 16)}, r"w13 is torch.bfloat16; accepted: torch.float32"),
    ({"x": EIGHT["x"]}, "x is int8 and x_scale is None"),
    (EIGHT, "rows is torch.int8 for quantisation 'none'"),
    ({"x_scale": torch.ones(3)}, r"row_scale has shape \[1\] for rows of torch.bfloat16"),
    ({"ids": torch.ones(3, 2)}, "ids is torch.float32; accepted: int32"),
    ({"ids": torch.ones(3, 5, dtype=torch.int32)}, r"ids has shape \[3, 5\]; accepted: \[..., k\], k from 1 to 4"),
    ({"ids": torch.ones(2, 2, dtype=torch.int32)}, r"ids has shape \[2, 2\]"),
    ({"weights": torch.ones(3, 2).half()}, "weights is torch.float16; accepted: float32"),
    ({"weights": torch.ones(3, 1)}, r"weights has shape \[3, 1\]; accepted: that of ids, \[3, 2\]"),
    ({"mask": torch.ones(3)}, "mask is torch.float32; accepted: bool"),
    ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask has shape \[2\]"),
    ({"num_experts": 8}, r"w13 has shape \[4, 16, 16\]; accepted: \[8, 16, 16\]"),
    ({"ep_size": 3}, "num_experts is 4; accepted: a multiple of ep_size, 3"),
    ({"ep_size": 2}, "ep_group is '' for 2 ranks"),
    ({"max_tokens": -1}, "max_tokens is -1"),
    ({"max_rows": -1}, "max_rows is -1"),
    ({"w2": [torch.ones(4, 4, 16).bfloat16()]}, r"w2 has shape \[4, 4, 16\]"),
    ({"activation": "reglu"}, "activation is 'reglu'"),
    ({"activation": "swiglu_oai"}, "limit is 0.0 for swiglu_oai"),
    ({"quantisation": "w2a2"}, "quantisation is 'w2a2'"),
    ({"quantisation": "w8a8"}, r"w13 is torch.bfloat16; accepted: torch.int8"),
    ({"out_dtype": torch.float32}, "out_dtype is torch.float32"),
]


FAKE = bind_kernel(alltoall_experts.SCHEMA, alltoall_experts._fake, alltoall_experts.AllToAllExpertsCall)


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_static_mistakes(change: dict[str, Any], message: str) -> None:
    """Found before anything is sent, by all three kernels."""
    texts = set()
    for kernel in (operator, KERNELS["npu"], FAKE):
        with pytest.raises((TypeError, ValueError), match=f"^alltoall_experts: {message}") as found:
            kernel(*alone(**change))
        texts.add(str(found.value))
    assert len(texts) == 1


def test_what_only_the_device_refuses() -> None:
    whole = layer(4, 16, 8, "w4a8", torch.bfloat16)
    given = {**whole.shard(0, 1, False), "quantisation": "w4a8"}
    with pytest.raises(TypeError, match=r"^alltoall_experts: the result is torch.float32 for quantisation 'w4a8'"):
        KERNELS["npu"](*alone(**given, x=torch.ones(3, 16)))
    given["w2_scale_bias"] = None
    assert operator(*alone(**given))[0].shape == (3, 16)
    with pytest.raises(ValueError, match=r"^alltoall_experts: w2_scale_bias is None for 'w4a8'"):
        KERNELS["npu"](*alone(**given))


def test_the_device_kernel_refuses_to_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KERNELS["npu"](*alone())[0].shape == (3, 16)
    monkeypatch.setattr(torch.npu, "is_current_stream_capturing", lambda: True)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"during the capture of a graph.*Declare Deployment.capture=True"):
        KERNELS["npu"](*alone())


# ---------------------------------------------------------------------------------------------------------------- graphs


class Seen(TorchDispatchMode):
    """The ATen operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(f"{func.namespace}.{func._opname}")
        if func._opname == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, "its size would be read from the device"
        return func(*args, **kwargs or {})


WAITS = {"aten._local_scalar_dense", "aten.nonzero", "aten.unique_consecutive", "aten._unique2", "aten.masked_select"}


def on_seen(rank: int, masked: str) -> list[str]:
    case, whole = Case("", masked=masked), layer(8, 32, 16, "none", torch.bfloat16)
    with Seen() as seen:
        KERNELS["npu"](*arguments_of(**given_to(rank, case, whole, torch.bfloat16), **whole.shard(rank, 2, False)))
    return seen.names


@pytest.mark.parametrize("masked", ["", "third"])
def test_the_device_kernel_waits_for_nothing_but_the_counts(two: Ranks, masked: str) -> None:
    """No operator whose result, or whose result's size, is read from the device; what it should call is called."""
    names = two.run(on_seen, masked)[0]
    assert WAITS & set(names) == set()
    assert [name for name in names if name.startswith("npu.")] == [
        "npu.npu_moe_init_routing_v2", "npu.npu_moe_init_routing_v2", "npu.npu_grouped_matmul", "npu.npu_swiglu",
        "npu.npu_grouped_matmul", "npu.npu_moe_token_unpermute",
    ]  # fmt: skip
    assert names.count("aten.repeat_interleave") == 1


def on_opcheck(rank: int, form: str) -> None:
    whole = layer(8, 64, 32, form, torch.bfloat16)
    given = given_to(rank, Case("", masked="third"), whole, torch.bfloat16) | {"quantisation": form}
    arguments = arguments_of(**given, **whole.shard(rank, 2, False))
    torch.library.opcheck(operator.default, arguments)  # type: ignore[attr-defined]
    given["x"].requires_grad_()
    error = caught(lambda: operator(*arguments)[0].sum().backward())
    assert error[0] == "NotImplementedError" and "is for inference" in error[1]


@pytest.mark.parametrize("form", ["none", "w8a8", "w4a16"])
def test_opcheck(two: Ranks, form: str) -> None:
    """All ranks at once: each call of the operator is a collective."""
    two.run(on_opcheck, form)


def test_fake_kernel_has_a_symbolic_token_count() -> None:
    arguments = alone(
        x=torch.ones(3, 16, dtype=torch.int8), x_scale=torch.ones(3), quantisation="w8a8", out_dtype=torch.float16,
        **layer(4, 16, 8, "w8a8", torch.float16).shard(0, 1, False),
    )  # fmt: skip
    traced = make_fx(operator.default, tracing_mode="symbolic")(*arguments)
    (call,) = [node for node in traced.graph.nodes if node.target is operator.default]
    y, counts = call.meta["val"]
    assert isinstance(y.shape[0], torch.SymInt) and y.shape[0].node.expr.is_symbol
    assert (y.shape[1], y.dtype) == (16, torch.float16)
    assert (counts.shape, counts.dtype) == ((4,), torch.int64)
    symbol = y.shape[0].node.expr
    assert [guard for guard in traced.shape_env.guards if symbol in guard.expr.free_symbols] == []


def test_unused_calls_stay() -> None:
    graph = torch.fx.Graph()
    graph.call_function(operator.default, (graph.placeholder("x"),))
    graph.output(())
    graph.eliminate_dead_code()
    assert operator.default in [node.target for node in graph.nodes]


def test_the_device_has_a_kernel_of_its_own() -> None:
    """In a process of its own: the simulator's device adds kernels for the generic operators."""
    script = """
import torch
import moe_lowering.custom_ops
for name in ("alltoall_experts", "dispatch"):
    print(torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_lowering::{name}", "PrivateUse1"))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert ended.stdout.split() == ["True", "False"]


def test_fields_that_ranks_tell_each_other_stand_where_dispatch_reads_them() -> None:
    names = ("TOKENS", "TP_GROUP", "FAULT", "FAULT_TOKEN", "FAULT_ID", "TOP_K", "WIDTH", "DTYPE", "FIELDS")
    assert [getattr(token_exchange, name) for name in names] == list(range(9))
