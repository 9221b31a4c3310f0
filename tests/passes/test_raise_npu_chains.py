"""Hand-written MC2 chains on two ranks: raised, brought to each implementation that is legal, and compared.

With the reference (float64, dense), and with the chain as it is written: bit by bit where the operators are the same.
MOE_LOWERING_RANKS sets another number of ranks.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import npu_chain_jobs as jobs
import npu_chain_products as products
import npu_chain_spellings as spelled
import npu_chain_variants as variants
import pytest
import torch
from edited_forms import OF_RANKS, edited
from rank_pools import Ranks
from reference import relative_error

from moe_lowering.passes.implementations import IMPLEMENTATIONS

RANKS = int(os.environ.get("MOE_LOWERING_RANKS", "2"))
SEED = os.environ.get("MOE_LOWERING_SEED", "")  # part of the seeds of edits
FORMS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "W8A8": {"quantisation": "w8a8", "shared": ""},
    "W8A8, smooth scales": {"quantisation": "w8a8", "smooth": "both"},
    "W4A16": {"quantisation": "w4a16", "shared": "argument"},
    "W4A8": {"quantisation": "w4a8"},
    "W4A8, in one": {"quantisation": "w4a8", "joined": {}},
    "W4A8, clipped": {"quantisation": "w4a8", "clipped": True},
    "GEGLU": {"activation": "gelu_tanh", "shared": ""},
    "clamps before silu": {"activation": "swiglu_clamp", "shared": "argument"},
}
REFUSED = {("W4A16", "fused_mc2"): "fused.quantisation", ("GEGLU", "fused_mc2"): "fused.activation"}
REFUSED["clamps before silu", "fused_mc2"] = "fused.activation"
REFUSED["W8A8, smooth scales", "fused_mc2"] = "fused.smooth_scales"
REFUSED["W4A8, clipped", "fused_mc2"] = "fused.clip"
# As MC2: W8A8's and W4A8's experts get an operator that fuses more, which has no smooth scales
# What is written as the pass would write it. Not clamps before SiLU: the pass has one operator for them where the chain has six.
UNTOUCHED = {"W8A8, smooth scales", "bfloat16", "W4A16", "W4A8, in one", "W4A8, clipped", "GEGLU"}
BOUND = {"none": 2e-2, "w8a8": 4e-2, "w4a16": 2e-2, "w4a8": 4e-2}  # int8 activations round by 1 / 254 each


@pytest.fixture(scope="module")
def ranks():
    with Ranks(RANKS, setup=jobs.setup) as pool:
        yield pool


def require_right(found: dict[str, Any], bound: float) -> None:
    for lowered, written, reference in zip(found["lowered"], found["written"], found["reference"], strict=True):
        lowered, written = (each[0] if isinstance(each, tuple) else each for each in (lowered, written))
        assert relative_error(lowered, reference) < bound
        assert relative_error(written, reference) < bound
        assert relative_error(lowered, written) < bound


@pytest.mark.parametrize("comm", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_a_chain_becomes_what_is_asked_for(ranks, form, comm):
    case = FORMS[form]
    for found in ranks.run(jobs.raise_and_run, case, comm):
        require_right(found, BOUND[case.get("quantisation", "none")])
        ((chosen, reason, raised_from, before, after, _),) = found["blocks"]
        assert raised_from == "mc2_v2" and before[0] == "npu.npu_moe_distribute_dispatch_v2"
        assert found["foreign"] == []
        if (form, comm) in REFUSED:
            assert chosen is None and REFUSED[form, comm] in reason and after == before
        elif comm == "mc2" and form in UNTOUCHED:
            assert chosen == "mc2" and "[raise.already]" in reason and after == before
        else:
            assert chosen == comm and after != before
        if after == before:
            assert torch.equal(found["lowered"][0], found["written"][0])


def test_of_many_sizes(ranks):
    for found in ranks.run(jobs.raise_and_run, {}, "allgather", (6, 9, 17)):
        require_right(found, 2e-2)
        assert [chosen for chosen, *_ in found["blocks"]] == ["allgather"]


@pytest.mark.parametrize("comm", ["allgather", "fused_mc2"])
def test_counts_that_are_read_elsewhere(ranks, comm):
    for found in ranks.run(jobs.raise_and_run, {"counts_read": True}, comm):
        require_right(found, 2e-2)
        assert [chosen for chosen, *_ in found["blocks"]] == [comm]
        assert torch.equal(found["lowered"][0][1], found["written"][0][1])


TWINS = [
    "relu between the matmuls",
    "results weighted twice",
    "rows returned",
    "gate and up exchanged",
    "rows travel back as int8",
]


@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_is_left_and_computes_what_it_did(ranks, twin):
    for found in ranks.run(jobs.raise_and_run, {}, "allgather", (6,), twin):
        assert found["blocks"] == []
        assert len(found["foreign"]) == 1 and "[raise." in found["foreign"][0]
        lowered, written = (found[name][0] for name in ("lowered", "written"))
        pairs = zip(lowered, written, strict=True) if isinstance(lowered, tuple) else [(lowered, written)]
        for a, b in pairs:
            assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


COPIES: dict[str, Any] = {"copies": 4}
SPECIAL: dict[tuple[str, str], dict[str, Any]] = {
    ("copies", "allgather"): COPIES,
    ("copies", "fused_mc2"): COPIES,  # refused
    ("zeros and copies, W8A8", "mc2"): {"zero": 2, "copies": 3, "quantisation": "w8a8", "shared": ""},
    ("copies and consts", "allgather"): {"copies": 2, "const": 3, "shared": ""},
    ("zeros and consts, W8A8", "mc2"): {"zero": 2, "const": 4, "quantisation": "w8a8", "shared": "argument"},
    ("zeros, shared expert", "alltoall"): {"zero": 4, "shared": "argument"},
}


@pytest.mark.parametrize(("form", "comm"), SPECIAL)
def test_zero_and_copy_experts(ranks, form, comm):
    case = SPECIAL[form, comm]
    for found in ranks.run(jobs.raise_and_run, {**case, "kind_of": variants.Special}, comm):
        require_right(found, BOUND[case.get("quantisation", "none")])
        ((chosen, reason, raised_from, before, after, _),) = found["blocks"]
        assert raised_from == "mc2_v2" and found["foreign"] == []
        if comm == "fused_mc2":
            assert chosen is None and "fused.zero_experts" in reason and after == before
            assert torch.equal(found["lowered"][0], found["written"][0])
        else:
            assert chosen == comm and after != before, reason


def test_a_router_over_experts_and_copies(ranks):
    """Its ids are more than the block's experts."""
    case = {"copies": 4, "kind_of": variants.Chosen}
    for found in ranks.run(jobs.raise_and_run, case, "allgather"):
        require_right(found, BOUND["none"])
        assert [chosen for chosen, *_ in found["blocks"]] == ["allgather"]
        assert found["foreign"] == []


def test_the_first_versions(ranks):
    comm = "fused_mc2"
    case = {"quantisation": "w8a8", "shared": "", "kind_of": variants.First}
    for found in ranks.run(jobs.raise_and_run, case, comm):
        require_right(found, BOUND["w8a8"])
        ((chosen, reason, raised_from, *_),) = found["blocks"]
        assert (chosen, raised_from) == (comm, "mc2_v1"), reason


GATHERED: dict[str, tuple[dict[str, Any], str]] = {
    "unpermute": ({}, "mc2"),
    "finalize, by a product": ({"back": "finalize", "masked": "mul"}, "fused_mc2"),
    "W8A8": ({"quantisation": "w8a8"}, "alltoall"),
    "as it is": ({}, "allgather"),
}


@pytest.mark.parametrize("form", GATHERED)
def test_a_chain_of_gathered_tokens(ranks, form):
    case, comm = GATHERED[form]
    for found in ranks.run(jobs.raise_and_run, {**case, "kind_of": variants.Gathered}, comm):
        require_right(found, BOUND[case.get("quantisation", "none")])
        ((chosen, reason, raised_from, before, after, _),) = found["blocks"]
        assert (chosen, raised_from) == (comm, "gathered_v2"), reason
        assert found["foreign"] == []
        assert (before == after) == (comm == "allgather") == ("[raise.already]" in reason)


REDUCED: dict[str, tuple[dict[str, Any], str]] = {
    "unpermute": ({}, "mc2"),
    "finalize, by a product, W8A8": ({"back": "finalize", "masked": "mul", "quantisation": "w8a8"}, "alltoall"),
    "as it is": ({}, "allgather"),
}


@pytest.mark.parametrize("form", REDUCED)
def test_a_chain_of_tokens_that_all_ranks_have(ranks, form):
    case, comm = REDUCED[form]
    for found in ranks.run(jobs.raise_and_run, {**case, "kind_of": variants.Reduced, "same_tokens": True}, comm):
        require_right(found, BOUND[case.get("quantisation", "none")])
        ((chosen, reason, raised_from, before, after, _),) = found["blocks"]
        assert (chosen, raised_from) == (comm, "reduced_v2"), reason
        assert found["foreign"] == [] and ("_c10d_functional.all_reduce" in after) == (comm == "allgather")
        assert (before == after) == (comm == "allgather") == ("[raise.already]" in reason)


SHARDED: dict[str, dict[str, Any]] = {
    "W8A8, pairs, shared expert": {"quantisation": "w8a8", "back": "finalize", "kind": 2, "shared": True},
    "prefix sums": {"back": "finalize", "kind": 0},
}


@pytest.mark.parametrize("form", SHARDED)
def test_a_chain_of_experts_sharded_by_columns(ranks, form):
    """A block of one rank each; the all_reduce after it stays."""
    case = {**SHARDED[form], "kind_of": variants.Sharded}
    for found in ranks.run(jobs.raise_and_run, case, "allgather"):
        require_right(found, BOUND[case.get("quantisation", "none")])
        ((chosen, reason, raised_from, before, after, _),) = found["blocks"]
        assert (chosen, raised_from) == ("allgather", "routing_v2"), reason
        assert found["foreign"] == [] and (before == after) == ("quantisation" not in case)


REDUCED_TWINS = {
    "another range": ("raise.partial_range", {"range": jobs.off_by_one}),
    "a maximum": ("raise.expert_parallel", {"reduce": jobs.maximum}),
    "sums doubled": ("raise.expert_parallel", {"sums": jobs.doubled}),
    "a shared expert in float32": (
        "raise.expert_parallel",
        {"kind_of": variants.ReducedShared, "part": torch.Tensor.float},
    ),
    "a sum with a shared expert that is doubled": (
        "raise.expert_parallel",
        {"kind_of": variants.ReducedShared, "added": jobs.doubled},
    ),
    "tokens of each rank": ("raise.gathered", {"same_tokens": False}),
}


@pytest.mark.parametrize("twin", REDUCED_TWINS)
def test_a_twin_of_tokens_that_all_ranks_have_is_left(ranks, twin):
    code, changes = REDUCED_TWINS[twin]
    case = {"kind_of": variants.Reduced, "same_tokens": True, **changes}
    for found in ranks.run(jobs.raise_and_run, case, "mc2"):
        assert found["blocks"] == [] and f"[{code}]" in found["foreign"][0], found["foreign"]
        assert torch.equal(torch.nan_to_num(found["lowered"][0]), torch.nan_to_num(found["written"][0]))


GATHERED_TWINS = {
    "no mask": ("raise.partial_range", {"masked": ""}),
    "a range off by one": ("raise.partial_range", {"range": jobs.off_by_one}),
    "results doubled": ("raise.operation_between", {"out": jobs.doubled}),
    "a maximum": ("raise.other_group", {"reduce": jobs.maximum}),
    "sums doubled": ("raise.scattered", {"sums": jobs.doubled}),
}


@pytest.mark.parametrize("twin", GATHERED_TWINS)
def test_a_twin_of_gathered_tokens_is_left(ranks, twin):
    code, changes = GATHERED_TWINS[twin]
    for found in ranks.run(jobs.raise_and_run, {**changes, "kind_of": variants.Gathered}, "mc2"):
        assert found["blocks"] == [] and f"[{code}]" in found["foreign"][0], found["foreign"]
        assert torch.equal(torch.nan_to_num(found["lowered"][0]), torch.nan_to_num(found["written"][0]))


# Spelled otherwise: the layer, the implementation asked for, and the form that it is raised from
IN_PLACE: dict[str, Any] = {"kind_of": spelled.InPlace}
SPELLED: dict[str, tuple[dict[str, Any], str, str]] = {
    "by the quotient of ids": (IN_PLACE, "mc2", "gathered_v2"),
    "by a table made here": ({**IN_PLACE, "own": "table"}, "alltoall", "gathered_v2"),
    "rows of others dropped": ({**IN_PLACE, "back": "drop"}, "fused_mc2", "gathered_v2"),
    "neither below nor above": (
        {"same_tokens": True, "kind_of": spelled.InPlaceReduced, "own": "neither"}, "mc2", "reduced_v2"
    ),
    "a shared expert in the sum": ({"same_tokens": True, "kind_of": variants.ReducedShared}, "mc2", "reduced_v2"),
    "a shared expert in the sum, W8A8": (
        {"same_tokens": True, "kind_of": variants.ReducedShared, "quantisation": "w8a8"}, "alltoall", "reduced_v2"
    ),
    "prefix sums": ({"kind_of": spelled.PrefixSums, "shared": "", "quantisation": "w8a8"}, "fused_mc2", "mc2_v2"),
    "slots that are off": ({"kind_of": spelled.Slots, "copies": 3, "zero": 1, "quantisation": "w8a8"}, "mc2", "mc2_v2"),
    "a norm": ({"kind_of": variants.Normed}, "mc2", "mc2_v2_norm"),
    "gate and up apart": ({"kind_of": products.Mc2Apart}, "allgather", "mc2_v2"),
    "gate and up apart, W8A8": ({"kind_of": products.Mc2Apart, "quantisation": "w8a8"}, "mc2", "mc2_v2"),
    "gate and up apart, W4A8": ({"kind_of": products.Mc2Apart, "quantisation": "w4a8"}, "alltoall", "mc2_v2"),
    "gate and up apart, gathered": ({"kind_of": products.GatheredApart}, "mc2", "gathered_v2"),
    "no gate": ({"kind_of": products.Mc2Ungated, "shared": ""}, "allgather", "mc2_v2"),
    "no gate, W8A8": ({"kind_of": products.Mc2Ungated, "quantisation": "w8a8", "shared": ""}, "alltoall", "mc2_v2"),
    "a norm, the sum alone": ({"kind_of": variants.Normed, "read": (2,)}, "fused_mc2", "mc2_v2_norm"),
}  # fmt: skip


@pytest.mark.parametrize("form", SPELLED)
def test_a_chain_that_is_spelled_otherwise(ranks, form):
    case, comm, raised = SPELLED[form]
    for found in ranks.run(jobs.raise_and_run, case, comm):
        require_right(found, BOUND[case.get("quantisation", "none")])
        ((chosen, reason, raised_from, *_),) = found["blocks"]
        assert (chosen, raised_from) == (comm, raised), reason


def test_a_write_into_what_was_gathered_is_seen(ranks):
    """Edits that put a zero_ behind the routing, on the gathered weights and on half of their mask."""
    case = {"kind_of": variants.Gathered, "quantisation": "w8a8", "masked": "mul"}
    seeds = [f"f/gathered w8a8/{seed}" for seed in (63, 79)]
    for found in ranks.run(edited, case, "allgather", seeds):
        assert found == [("left", "")] * 2


# A few of the forms where no number of edits is asked for: a graph of each costs about a second
EDITED = (
    OF_RANKS if "MOE_LOWERING_EDITS" in os.environ else ("bfloat16", "W8A8", "gathered", "reduced", "first versions")
)


@pytest.mark.parametrize("form", EDITED)
def test_graphs_with_random_edits_are_left_or_equal(ranks, form):
    """MOE_LOWERING_EDITS sets how many of all forms."""
    comm, case = OF_RANKS[form]
    count = int(os.environ.get("MOE_LOWERING_EDITS", "100")) // len(OF_RANKS)
    seeds = [f"{SEED}{form}/{index}" for index in range(count)]
    found = ranks.run(edited, case, comm, seeds, timeout=3600.0)
    print(form, Counter(outcome for outcome, _ in found[0]))
    assert [wrong for each in found for _, wrong in each if wrong] == []
