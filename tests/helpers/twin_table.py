"""Negative twins of every form: the same layer with one thing changed, which is none of that form any more.

``TWINS[form][change]`` is a ``Twin``, or the reason in words why the change cannot be made in that form. A form or a change that
is missing fails ``test_twins_of_forms``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import npu_chain_first as first
import npu_chain_layers as chains
import npu_chain_variants as variants
import torch
from torch import Tensor

from moe_lowering import Deployment

CHANGES = (
    "a relu between the matmuls",
    "weights applied twice",
    "another index at the way back",
    "another group",
    "an interior value returned",
    "gate and up exchanged",
    "another k",
    "counts for prefix sums",
    "another mask at one end",
    "abs on a partial range",
    "a range off by one",
)
RANKS = 2
HALF = chains.EXPERTS // RANKS
OF_ANOTHER_RANK = {"active_expert_range": [HALF, 2 * HALF]}


@dataclasses.dataclass(frozen=True)
class Twin:
    """Codes, one of which is told; what a layer of the form is made with; and whether a mask of tokens is given."""

    codes: str
    changes: dict[str, Any]
    mask: bool = False
    ranks: int = 0  # of another deployment than the form's


def flipped(value: Tensor) -> Tensor:
    return value.flip(0)


def twice(value: Tensor) -> Tensor:
    return value * 2


def first_column(value: Tensor) -> Tensor:
    return value[:, :1].contiguous()


def rows_of(*values: Tensor) -> Tensor:
    return values[0]


def upper_first(span: tuple[int, int]) -> tuple[int, int]:
    return span[0] + 1, span[1] + 1


EXCHANGED = {"activation": "gelu_tanh", "halves": lambda pair: pair[::-1]}
EXPERTS = {
    "a relu between the matmuls": Twin("raise.activation", {"between": torch.relu}),
    "weights applied twice": Twin("raise.operation_between", {"out": twice}),
    "an interior value returned": Twin("raise.single_use", {"returned": rows_of}),
    "gate and up exchanged": Twin("raise.gate_second", EXCHANGED),
    "another k": Twin("raise.weights", {"weights": first_column}),
}
NO_INDEX = "the way back is by what dispatch gives combine, which has no index of rows"
NO_MASK = "its operators have no mask of tokens"
NO_RANGE = "its operators route to all experts"
MC2: dict[str, Twin | str] = {
    **EXPERTS,
    "another index at the way back": Twin("raise.other_value", {"ids": lambda ids: ids.flip(1)}),
    "another group": Twin("raise.other_group", {"group": "another"}),
    "counts for prefix sums": Twin("raise.counts", {"dispatch": {"expert_token_nums_type": 0}}),
    "another mask at one end": Twin("raise.both_ends", {"combine": {"x_active_mask": None}}, mask=True),
    "abs on a partial range": NO_INDEX,
    "a range off by one": Twin("raise.other_rank", {"dispatch": {"ep_rank_id": 1}, "combine": {"ep_rank_id": 1}}),
}
PARTIAL: dict[str, Twin | str] = {
    **EXPERTS,
    "another index at the way back": Twin("raise.index", {"index": flipped}),
    "counts for prefix sums": Twin("raise.counts", {"route": {"expert_tokens_num_type": 0}}),
    "another mask at one end": Twin("raise.partial_range", {"compared": flipped}),
    "abs on a partial range": Twin("raise.partial_range", {"masked": ""}),
    "a range off by one": Twin("raise.partial_range", {"range": upper_first}),
}
OLD: dict[str, Twin | str] = {
    **EXPERTS,
    "another index at the way back": Twin("raise.index", {"places": flipped}),
    "another group": Twin("raise.other_group", {}, ranks=RANKS),
    "an interior value returned": Twin("raise.single_use", {"returned": lambda rows, places, groups, out: out}),
    "abs on a partial range": NO_RANGE,
}
MC2_KINDS = {"mc2_v2": chains.Mc2, "mc2_v1": variants.First, "mc2_v2_norm": variants.Normed}
TWINS: dict[str, dict[str, Twin | str]] = {
    "mc2_v2": MC2,
    "mc2_v2_norm": MC2,
    "mc2_v1": {**MC2, "another mask at one end": Twin("raise.literal", {"combine": {"x_active_mask": None}}, mask=True)},
    "routing_v2": {
        **EXPERTS,
        "another index at the way back": Twin("raise.index", {"index": flipped}),
        "another group": Twin("raise.other_group", {}, ranks=RANKS),
        "counts for prefix sums": Twin("raise.counts", {"kind": 1, "route": {"expert_tokens_num_type": 0}}),
        "another mask at one end": NO_MASK,
        "abs on a partial range": Twin("raise.partial_range", {"route": {"active_expert_range": [0, chains.EXPERTS - 1]}}),
        "a range off by one": Twin("raise.partial_range", {"route": {"active_expert_range": [1, chains.EXPERTS]}}),
    },
    "gathered_v2": {**PARTIAL, "another group": Twin("raise.other_group", {"group_of_gathers": "another"})},
    "reduced_v2": {**PARTIAL, "another group": Twin("raise.expert_parallel", {"group": "another"})},
    "routing_v1": {
        **OLD,
        "counts for prefix sums": Twin("raise.counts", {"told": 1}),
        "another mask at one end": Twin(
            "raise.ids_range", {"numbering": "softmax", "finished": lambda _: torch.zeros(6, dtype=torch.bool)}
        ),
        "a range off by one": NO_RANGE,
    },
    "permute": {
        **OLD,
        "counts for prefix sums": Twin("raise.counts", {"told": 0}),
        "another mask at one end": Twin("raise.counts", {"counted": lambda ids: ids.masked_fill(ids == 0, 1)}),
        "a range off by one": Twin("raise.counts", {"most": lambda most: most + 1}),
    },
}  # fmt: skip
# Twins that the issue does not name
MORE: dict[tuple[str, str], Twin] = {
    **{
        (form, change): twin
        for form in ("gathered_v2", "reduced_v2")
        for change, twin in {
            "the condition inverted": Twin("raise.partial_range", {"own": torch.logical_not}),
            "the upper bound inclusive": Twin("raise.partial_range", {"range": lambda span: (span[0], span[1] + 1)}),
            "the lower bound exclusive": Twin("raise.partial_range", {"range": lambda span: (span[0] + 1, span[1])}),
            "either bound": Twin("raise.partial_range", {"own": lambda own: own | own.flip(0)}),
            "the place of another rank": Twin(
                "raise.partial_range", {"range": lambda span: (HALF, 2 * HALF), "route": OF_ANOTHER_RANK}
            ),
            "the place of another rank at the routing": Twin("raise.partial_range", {"route": OF_ANOTHER_RANK}),
            "the mask of weights doubled": Twin("raise.partial_range raise.weights", {"weights": twice}),
            "the mean of the ranks": Twin("raise.other_group raise.expert_parallel", {"reduce": lambda _: "avg"}),
            "the largest of the ranks": Twin("raise.other_group raise.expert_parallel", {"reduce": lambda _: "max"}),
            "sums that are rounded before": Twin(
                "raise.scattered raise.expert_parallel", {"sums": lambda y: y.to(torch.float8_e4m3fn).bfloat16()}
            ),
            "ids compared as booleans": Twin("raise.partial_range", {"compared": lambda ids: ids.bool().int()}),
            "ids routed through 8 bits": Twin(
                "raise.partial_range raise.gathered", {"routed": lambda ids: ids.to(torch.int8).int()}
            ),
            "rows doubled": Twin("raise.operation_between", {"out": twice}),
        }.items()
    },
    ("gathered_v2", "the mask by another all_gather"): Twin(
        "raise.partial_range", {"gathered_again": ("compared", lambda ids: ids.flip(1))}
    ),
    ("gathered_v2", "the mask by the same ids, gathered again"): Twin(
        "raise.partial_range", {"gathered_again": ("compared", lambda ids: ids + 0)}
    ),
    ("gathered_v2", "weights gathered of another k"): Twin(
        "raise.weights", {"gathered_again": ("weights", lambda weights: weights[:, :1].contiguous())}
    ),
    **{
        (form, change): twin
        for form in MC2_KINDS
        for change, twin in {
            "ids through 8 bits at the way back": Twin("raise.other_value", {"ids": lambda ids: ids.to(torch.int8).int()}),
            "another rank at one end": Twin("raise.both_ends raise.other_rank", {"combine": {"ep_rank_id": 1}}),
            "more ranks at one end": Twin("raise.both_ends raise.other_group", {"combine": {"ep_world_size": 4}}),
            "more experts at one end": Twin("raise.both_ends", {"combine": {"moe_expert_num": 2 * chains.EXPERTS}}),
            "counts through 8 bits": Twin("raise.counts", {"counts": lambda counts: counts.to(torch.int8).long()}),
            "rows in another order": Twin("raise.operation_between", {"rows": flipped}),
        }.items()
    },
    ("routing_v2", "the index through 8 bits"): Twin("raise.index", {"index": lambda index: index.to(torch.int8).int()}),
    ("routing_v2", "rows in another order"): Twin("raise.operation_between", {"rows": flipped}),
    ("routing_v1", "the index through 8 bits"): Twin("raise.index", {"places": lambda at: at.to(torch.int8).int()}),
    ("permute", "ids counted through 8 bits"): Twin("raise.counts", {"counted": lambda ids: ids.to(torch.int8).int()}),
    ("permute", "prefix sums of other counts"): Twin("raise.counts", {"kind": 0, "counted": lambda ids: (ids + 1) % 7}),
}  # fmt: skip


def layer_of(form: str, deployment: Deployment, changes: dict[str, Any]) -> torch.nn.Module:
    """The layer of a form, on rank 0 of the deployment's ranks."""
    given = {"quantisation": "none", "activation": "swiglu", **changes}
    quantisation, activation = given.pop("quantisation"), given.pop("activation")
    if form in MC2_KINDS:
        kind = MC2_KINDS[form]
        group = given.pop("group", deployment.ep_communicator)
        return kind(group, quantisation, activation, 0, RANKS, **given)
    if form in ("gathered_v2", "reduced_v2"):
        kind = variants.Gathered if form == "gathered_v2" else variants.Reduced
        layer = kind(given.pop("group", deployment.ep_group), quantisation, activation, 0, RANKS, **given)
        if "gathered_again" in given:  # another exchange of the same shape
            name, other = given["gathered_again"]
            layer.changes[name] = lambda value: variants.Gathered.gathered(layer, other(value[: len(value) // RANKS]))
        if "group_of_gathers" in given:
            layer.changes["group"] = lambda _: given["group_of_gathers"]
        return layer
    one = {"routing_v2": chains.Routed, "routing_v1": first.FirstRouting, "permute": first.Permuted}[form]
    return one(quantisation, activation, **given)


def has_ranks(form: str) -> bool:
    return form in (*MC2_KINDS, "gathered_v2", "reduced_v2")
