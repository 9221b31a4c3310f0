"""Layers, tokens and calls for the tests of ``alltoall_experts``, and what runs on each rank.

Nothing here shares code with what it checks: int4 is packed digit by digit, and dense weights are what the stored
integers stand for, in float64.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import reference
import torch
import torch.distributed as dist
from quantised_numbers import pack_int4, scale_bits, snr
from test_custom_ops_ranks import world
from torch import Tensor

import moe_lowering.custom_ops  # noqa: F401  (registers torch.ops.moe_lowering)
from moe_lowering.custom_ops import alltoall_experts
from moe_lowering.custom_ops.alltoall_experts import SCHEMA, AllToAllExpertsCall
from moe_lowering.custom_ops.library import bind_kernel

operator = torch.ops.moe_lowering.alltoall_experts
KERNELS = {"cpu": operator, "npu": bind_kernel(SCHEMA, alltoall_experts._npu, AllToAllExpertsCall)}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of all experts. ``dense`` weights are what the stored ones stand for, in float64."""

    w13: Tensor
    w2: Tensor
    dense: tuple[Tensor, Tensor]
    scales: dict[str, Tensor]

    def shard(self, rank: int, size: int, lists: bool) -> dict[str, Any]:
        """The arguments of one rank, each list as one stacked tensor or as one tensor for each expert."""
        arguments = {}
        for name, tensor in {"w13": self.w13, "w2": self.w2, **self.scales}.items():
            own = tensor.chunk(size)[rank]
            arguments[name] = list(own) if lists else [own]
        return arguments


def layer(experts: int, hidden: int, inner: int, form: str, dtype: torch.dtype, wide: bool = False) -> Layer:
    """Random weights in one format. ``wide``: scales as bits in int64, or in four groups of lines for w4a16."""
    torch.manual_seed(7)
    stored, dense, scales = [], [], {}
    groups = 4 if wide and form == "w4a16" else 1
    for name, lines, columns in (("w13", hidden, 2 * inner), ("w2", inner, hidden)):
        whole = torch.randn(experts, lines, columns, dtype=torch.float64) / math.sqrt(lines)
        if form == "none":
            stored.append(whole.to(dtype))
            dense.append(stored[-1].double())
            continue
        largest = 127 if form == "w8a8" else 7
        whole = whole.reshape(experts, groups, lines // groups, columns)
        scale = (whole.abs().amax(2) / largest).to(dtype if form == "w4a16" else torch.float32)
        shift = torch.arange(columns).expand(scale.shape) % 3 if form == "w4a16" else torch.zeros(scale.shape)
        each, moved = scale.double().unsqueeze(2), shift.unsqueeze(2)
        integers = (whole / each - moved).round().clamp(-largest - 1, largest)
        dense.append(((integers + moved) * each).reshape(experts, lines, columns))
        integers = integers.reshape(experts, lines, columns)
        stored.append(integers.to(torch.int8) if form == "w8a8" else pack_int4(integers))
        if groups == 1:
            scale, shift = scale.squeeze(1), shift.squeeze(1)
        if form == "w4a16":
            scales[f"{name}_offset"] = shift.to(dtype)
        if form == "w4a8":
            scales[f"{name}_scale_bias"] = (8 * dense[-1].sum(1)).float()
        scales[f"{name}_scale"] = scale_bits(scale) if wide and form != "w4a16" else scale
    return Layer(stored[0], stored[1], (dense[0], dense[1]), scales)


def tokens_of(rank: int, tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype, ids: str) -> Any:
    """x, ids, weights of one rank. ``ids``: random; first: everything to the first k experts; gap: none to expert 1."""
    torch.manual_seed(100 + rank)
    x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k) + 0.1
    scores = torch.rand(tokens, experts)
    scores[:, :top_k] += 2.0 if ids == "first" else 0.0
    scores[:, 1] -= 2.0 if ids == "gap" else 0.0
    return x, scores.topk(top_k).indices.to(torch.int32), weights


def arguments_of(**given: Any) -> tuple[Any, ...]:
    """In the order of the schema, with what was not given as in a call without quantisation, mask and biases."""
    usual = {
        "x_scale": None, "mask": None, "w13_bias": [], "w2_bias": [], "activation": "swiglu", "limit": 0.0,
        "alpha": 1.702, "interleaved": False, "quantisation": "none", "max_tokens": 0, "max_rows": 0,
    }  # fmt: skip
    names = AllToAllExpertsCall._fields
    assert set(given) <= set(names)
    return tuple(given.get(name, usual.get(name)) for name in names)


@dataclasses.dataclass(frozen=True)
class Case:
    """``tokens`` by rank; ``masked``: which tokens do not count, as a function's name below."""

    name: str
    tokens: tuple[int, ...] = (9, 9, 9, 9)
    top_k: int = 2
    ids: str = "random"
    masked: str = ""
    experts: int = 8
    lists: bool = False
    options: tuple[tuple[str, Any], ...] = ()


MASKS = {
    "": lambda rank, tokens: None,
    "third": lambda rank, tokens: torch.arange(tokens) % 3 != 1,
    "rank 1": lambda rank, tokens: torch.full((tokens,), rank != 1),
    "all": lambda rank, tokens: torch.zeros(tokens, dtype=torch.bool),
}


def given_to(rank: int, case: Case, whole: Layer, dtype: torch.dtype) -> dict[str, Any]:
    size = dist.get_world_size() if dist.is_initialized() else 1
    experts, hidden = (size if case.name == "one-expert-each" else case.experts), whole.dense[0].shape[1]
    x, ids, weights = tokens_of(rank, case.tokens[rank], hidden, experts, case.top_k, dtype, case.ids)
    return {
        "x": x, "ids": ids, "weights": weights, "mask": MASKS[case.masked](rank, case.tokens[rank]),
        "num_experts": experts, "ep_size": size, "ep_group": world() if size > 1 else "", **dict(case.options),
    }  # fmt: skip


def counts_of(case: Case, whole: Layer, dtype: torch.dtype, rank: int, size: int) -> Tensor:
    """Rows of this rank's experts, from the ids of all ranks."""
    total = torch.zeros(whole.dense[0].shape[0], dtype=torch.int64)
    for other in range(size):
        given = given_to(other, case, whole, dtype)
        for token, chosen in enumerate(given["ids"].tolist()):
            if given["mask"] is None or given["mask"][token]:
                total[chosen] += 1
    return total.chunk(size)[rank]


def on_case(rank: int, case: Case, dtype: torch.dtype, bias: bool) -> dict[str, float]:
    """The error of each kernel."""
    size = dist.get_world_size()
    whole = layer(size if case.name == "one-expert-each" else case.experts, 32, 16, "none", dtype)
    biases = {}
    if bias:
        torch.manual_seed(3)
        biases = {"w13_bias": torch.randn(case.experts, 32).to(dtype), "w2_bias": torch.randn(case.experts, 32)}
    given = given_to(rank, case, whole, dtype)
    shares = {name: tensor.chunk(size)[rank] for name, tensor in biases.items()}
    lists = {name: list(share) if case.lists else [share] for name, share in shares.items()}
    arguments = arguments_of(**given, **whole.shard(rank, size, case.lists), **lists)
    gate = {name: value for name, value in case.options if name in ("activation", "limit", "alpha", "interleaved")}
    expected = reference.moe(
        given["x"], given["weights"], given["ids"], *whole.dense, mask=given["mask"], **biases, **gate
    )
    errors = {}
    for name, kernel in KERNELS.items():
        y, counts = kernel(*arguments)
        assert y.dtype == dtype and counts.dtype == torch.int64
        assert torch.equal(counts, counts_of(case, whole, dtype, rank, size)), name
        if given["mask"] is not None:
            assert not y[~given["mask"]].any(), name
        errors[name] = reference.relative_error(y, expected)
    return errors


def on_quantised(rank: int, case: Case, form: str, dtype: torch.dtype, arrives: bool, wide: bool) -> dict[str, float]:
    """Signal-to-noise ratios: of each kernel, and of the device's kernel with the experts of another rank."""
    size = dist.get_world_size()
    whole = layer(case.experts, 256, 256, form, dtype, wide)
    given = given_to(rank, case, whole, dtype) | {"quantisation": form}
    exact = given["x"].double()
    if arrives:
        scale = given["x"].float().abs().amax(1) / 127
        given |= {"x": (given["x"].float() / scale.unsqueeze(1)).round().to(torch.int8), "x_scale": scale}
        given["out_dtype"] = dtype
        exact = given["x"].double() * scale.double().unsqueeze(1)
    expected = reference.moe(exact, given["weights"], given["ids"], *whole.dense, mask=given["mask"])
    arguments = arguments_of(**given, **whole.shard(rank, size, case.lists))
    swapped = arguments_of(**given, **whole.shard((rank + 1) % size, size, case.lists))
    ratios = {}
    for name, kernel, taken in (*((n, k, arguments) for n, k in KERNELS.items()), ("swapped", KERNELS["npu"], swapped)):
        y, counts = kernel(*taken)
        assert y.dtype == dtype
        assert torch.equal(counts, counts_of(case, whole, dtype, rank, size)), name
        ratios[name] = snr(y, expected)
    return ratios
