"""Whatever form the tensors of the experts come in, a verdict is kept: what is judged legal is rewritten, and not undone.

Every tensor in every form of ``graph_cases.FORMS`` (and of symbolic sizes), by itself beside stacked and listed ones and
all together; the deployment, the SoC, dtypes, the number of experts and k go round. Nothing is run: ``test_property`` does.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graph_build import build
from graph_cases import FORMS, BlockCase, GraphCase

from moe_lowering import Deployment, MoE, MoeLowering, moe_experts, route, testing
from moe_lowering.passes.blocks import Block
from moe_lowering.passes.find_blocks import find_blocks
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.operands import COMPUTED, MIXED, NZ, ExpertOperands, call_weight_format
from moe_lowering.report.records import LoweringReport
from moe_lowering.vocabulary import EXPERT_FORMATS

EXTRAS = {"none": ("bias",), "w8a8": ("scale",), "w4a8": ("scale", "scale_bias"), "w4a16": ("scale", "offset")}
FUSED = {
    "ep_size": 2,
    "ep_rank": 0,
    "ep_group": "ep",
    "mc2_group": "mc2",
    "hccl_buffer_mb": 4096,
    "weight_format": "nz",
}
VLLM_ASCEND, CANN = (("vllm_ascend", "0.23.0"),), (("cann_ops_transformer", "9.2.0"),)
DEPLOYMENTS = [
    Deployment(weight_format="nz"),
    *(Deployment(**{**FUSED, **fields}) for fields in (
        {"providers": VLLM_ASCEND}, {"providers": CANN}, {"providers": CANN, "weight_format": "nd"},
        {"providers": VLLM_ASCEND, "fused_mode": 2}, {"capture": False}, {"mode": "ge"}, {"soc": "A2"},
        {"soc": "A5", "weight_format": "nd"}, {"max_tokens": 64, "equal_tokens": False},
    )),
]  # fmt: skip
SIZES = ((3, 2), (1, 1), (4, 4), (2, 4))  # experts of a rank, k
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tensors(quantisation: str) -> list[str]:
    return [f"{name}{extra}" for extra in ("", *(f"_{e}" for e in EXTRAS[quantisation])) for name in ("w13", "w2")]


def alike(quantisation: str) -> Iterator[dict[str, str]]:
    """All tensors in one form."""
    yield from (dict.fromkeys(tensors(quantisation), form) for form in (*FORMS, "dynamic"))


def apart(quantisation: str) -> Iterator[dict[str, str]]:
    """One tensor in every form, beside stacked ones and beside lists."""
    names = tensors(quantisation)
    for beside, name, form in itertools.product(("stacked", "list"), names, (*FORMS, "dynamic")):
        if beside == "stacked" or name.startswith("w13"):
            yield {**dict.fromkeys(names, beside), name: form}


def case_of(number: int, quantisation: str, forms: dict[str, str], deployment: Deployment) -> GraphCase:
    local, top_k = SIZES[number // 3 % len(SIZES)]
    usable = [d for d in DTYPES if quantisation == "none" or d != torch.float32]
    block = BlockCase(
        local * deployment.ep_size, min(top_k, local * deployment.ep_size), 512, quantisation=quantisation,
        bias=(quantisation == "none" and number % 5 > 0,) * 2, bias_float32=number % 2 > 0, forms=tuple(forms.items()),
    )  # fmt: skip
    return GraphCase(deployment, (block,), hidden=1024, dtype=usable[number % len(usable)], symbolic=(False,))


def cases(quantisation: str) -> Iterator[tuple[str, GraphCase]]:
    """(implementation that is asked for, case)."""
    comms = tuple(IMPLEMENTATIONS)
    for number, forms in enumerate((*alike(quantisation), *apart(quantisation))):
        deployment = DEPLOYMENTS[number % len(DEPLOYMENTS)]
        yield comms[number // 7 % len(comms)], case_of(number, quantisation, forms, deployment)
    for number, (forms, deployment) in enumerate(itertools.product(alike(quantisation), DEPLOYMENTS[1:5])):
        case = case_of(5 * (number % 3), quantisation, forms, deployment)  # without biases, mostly
        yield "fused_mc2", case.replace(dtype=torch.bfloat16)


def lower(case: GraphCase, comm: str) -> LoweringReport:
    lowering = MoeLowering(case.deployment, comm, policy="fixed")
    lowering(build(case).gm)
    return lowering.reports[-1]


@pytest.mark.parametrize("quantisation", EXPERT_FORMATS)
def test_a_verdict_is_kept(quantisation: str) -> None:
    logging.disable(logging.WARNING)  # pytest keeps what the pass says of every block
    outcomes: Counter[str | None] = Counter()
    for comm, case in cases(quantisation):
        report = lower(case, comm)
        assert not report.unrecognised, (case, report.unrecognised)
        (block,) = report.blocks
        assert block.comm == (comm if block.verdicts[comm].legal else None), (
            case.blocks,
            case.deployment,
            block.reason,
        )
        assert "undone" not in block.reason and "internal error" not in block.reason
        outcomes[block.comm] += 1
    logging.disable(logging.NOTSET)
    assert all(outcomes[comm] > 1 for comm in ("allgather", "alltoall", "mc2", None)), outcomes
    assert outcomes["fused_mc2"] > 1 or quantisation == "w4a16", outcomes


# --- what was undone, by its code -------------------------------------------------------------------------------------

ALONE = Deployment(weight_format="nz", ep_size=1)
REFUSED = [
    ({"w13": "list", "w2": "list"}, "none", True, {"gmm.bias_count", "gmm.bias_dims"}),  # biases in one tensor
    ({"w13_bias": "list", "w2_bias": "list"}, "none", True, {"gmm.bias_count", "gmm.bias_dims"}),
    ({"w13": "swapped"}, "w4a8", False, {"gmm.int4_layout"}),  # torch_npu unpacks such a view along its rows
    ({"w2": "swapped"}, "w4a16", False, {"gmm.int4_layout"}),
    ({"w13_scale": "list"}, "w4a8", False, {"gmm.scale_count"}),
    ({"w13": "list"}, "w4a16", False, {"gmm.antiquant_count", "gmm.antiquant_offset_count"}),
    ({"w2": "list", "w2_scale": "list"}, "w4a16", False, {"gmm.antiquant_offset_count"}),
    ({"w2_scale": "list", "w2_offset": "list"}, "w4a16", False, {"gmm.antiquant_count"}),
]  # fmt: skip


@pytest.mark.parametrize(("forms", "quantisation", "bias", "codes"), REFUSED)
def test_what_was_undone_is_refused(forms: dict[str, str], quantisation: str, bias: bool, codes: set[str]) -> None:
    block = BlockCase(4, 2, 512, quantisation=quantisation, bias=(bias, bias), forms=tuple(forms.items()))
    case = GraphCase(ALONE, (block,), hidden=1024, dtype=torch.bfloat16, symbolic=(False,))
    (refused,) = lower(case, "allgather").blocks
    assert codes <= {v.code for v in refused.verdicts["allgather"].violations} and refused.comm is None
    alike = dict.fromkeys(tensors(quantisation), forms.get("w13", "stacked") if quantisation == "none" else "stacked")
    block = BlockCase(4, 2, 512, quantisation=quantisation, bias=(bias, bias), forms=tuple(alike.items()))
    assert lower(case.replace(blocks=(block,)), "allgather").blocks[0].comm == "allgather"


# One expert: forms differ where counts do not. (what to change of stacked tensors, quantisation, the code that is broken)
ONE_EXPERT = [
    ({"w2_offset": "list"}, "w4a16", "gmm.antiquant_offset_dims"),
    ({"w13_scale": "list", "w13_offset": "list"}, "w4a16", "gmm.antiquant_dims"),
    ({"w13_scale": "list"}, "w8a8", "gmm.scale_dims"),
]


@pytest.mark.parametrize(("forms", "quantisation", "code"), ONE_EXPERT)
def test_one_expert_in_mixed_forms_is_refused(forms: dict[str, str], quantisation: str, code: str) -> None:
    for changed, expected in ((forms, {code}), ({}, set())):
        layout = {**dict.fromkeys(tensors(quantisation), "stacked"), **changed}
        block = BlockCase(1, 1, 512, quantisation=quantisation, forms=tuple(layout.items()))
        case = GraphCase(ALONE, (block,), hidden=1024, dtype=torch.bfloat16, symbolic=(False,))
        (report,) = lower(case, "allgather").blocks
        assert {v.code for v in report.verdicts["allgather"].violations} == expected, report.reason


def test_a_list_of_one_matrix_for_the_decode_operator() -> None:
    decode = Deployment(**{**FUSED, "providers": VLLM_ASCEND, "fused_mode": 2})
    for form, expected in (("list", None), ("stacked", "fused_mc2")):
        block = BlockCase(2, 1, 512, quantisation="w8a8", forms=tuple(dict.fromkeys(tensors("w8a8"), form).items()))
        (report,) = lower(
            GraphCase(decode, (block,), hidden=1024, dtype=torch.float16, symbolic=(False,)), "fused_mc2"
        ).blocks
        assert report.comm == expected, report.reason
        codes = {v.code for v in report.verdicts["fused_mc2"].violations}
        assert ("fused_decode.single_list" in codes) == (expected is None)


# --- FRACTAL_NZ is a property of stored tensors -----------------------------------------------------------------------

CAPABLE = Deployment(**{**FUSED, "providers": (("vllm_ascend", "0.23.0"),)})
FORMATS_OF = {
    "stacked": NZ, "list": NZ, "swapped": NZ, "dynamic": NZ, "computed": COMPUTED, "list_computed": COMPUTED,
    "unbound": COMPUTED, "joined": COMPUTED, "part": COMPUTED, "widened": COMPUTED,
}  # fmt: skip


def nz_case(**forms: str) -> GraphCase:
    block = BlockCase(8, 2, 512, forms=tuple(forms.items()))
    return GraphCase(CAPABLE, (block,), hidden=1024, dtype=torch.bfloat16, symbolic=(False,))


def only_block(case: GraphCase) -> Block:
    (block,), _, _ = find_blocks(build(case).gm.graph)
    return block


def format_of(experts: ExpertOperands, declared: str) -> str:
    """The memory format of both weights of a block."""
    return call_weight_format({"w13": experts.w13.items, "w2": experts.w2.items}, declared)


def test_every_form_is_known() -> None:
    assert {*FORMS, "dynamic"} == FORMATS_OF.keys()


@pytest.mark.parametrize("form", FORMATS_OF)
def test_what_is_stored(form: str) -> None:
    experts = only_block(nz_case(w13=form, w2=form)).spec.tensors
    assert format_of(experts, "nz") == FORMATS_OF[form]
    assert format_of(experts, "nd") == "nd"
    other = only_block(nz_case(w13=form)).spec.tensors
    mixed = MIXED if FORMATS_OF[form] == COMPUTED else NZ
    assert format_of(other, "nz") == mixed


@pytest.mark.parametrize("form", ["computed", "part"])
@pytest.mark.parametrize("names", [("w13", "w2"), ("w13",), ("w2",)])
def test_computed_weights_are_not_for_an_operator_that_reads_nz(form: str, names: tuple[str, ...]) -> None:
    (refused,) = lower(nz_case(**dict.fromkeys(names, form)), "fused_mc2").blocks
    found = {v.code: v for v in refused.verdicts["fused_mc2"].violations}
    assert refused.comm is None and found.keys() == {"fused.weight_format"}
    assert "computed" in found["fused.weight_format"].message
    assert lower(nz_case(), "fused_mc2").blocks[0].comm == "fused_mc2"
    for comm in ("allgather", "mc2"):
        assert lower(nz_case(**dict.fromkeys(names, form)), comm).blocks[0].comm == comm


def test_a_call_has_weights_of_one_format() -> None:
    """A list of which the graph computes a part; all of it computed is ND."""
    case = nz_case(w13="list", w2="list")
    built = build(case)
    (mlp,) = built.gm.graph.find_nodes(op="call_function", target=torch.ops.moe_lowering.grouped_mlp.default)
    first = mlp.args[3][0]
    with built.gm.graph.inserting_before(mlp):
        copy = built.gm.graph.call_function(torch.ops.aten.clone.default, (first,))
    with first.meta["val"].fake_mode:
        copy.meta["val"] = first.meta["val"].clone()
    mlp.args = (*mlp.args[:3], [copy, *mlp.args[3][1:]], *mlp.args[4:])
    lowering = MoeLowering(CAPABLE, "allgather")
    lowering(built.gm)
    (block,) = lowering.reports[-1].blocks
    assert {v.code for v in block.verdicts["allgather"].violations} == {"gmm.weight_format"}
    assert lower(nz_case(w13="list_computed", w2="list"), "allgather").blocks[0].comm == "allgather"


def test_equal_but_for_who_computes_the_weights_is_not_equal() -> None:
    """Blocks that are decided once must be alike in this, too."""
    stored, computed = (only_block(nz_case(w13=form)).spec for form in ("stacked", "computed"))
    assert stored != computed and stored == only_block(nz_case(w13="stacked")).spec


# --- sizes of weights -------------------------------------------------------------------------------------------------


def test_weights_of_a_size_that_must_vary_are_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixing it would fail the compile of a user who marked it; one that may be fixed is."""
    case: Any = nz_case(w13="dynamic", w2="dynamic")
    assert lower(case, "allgather").blocks[0].comm == "allgather"
    monkeypatch.setattr("moe_lowering.passes.find_blocks.must_vary", lambda size: True)
    report = lower(case, "allgather")
    assert not report.blocks and report.unrecognised[0][1].startswith("[raise.size_varies]")


# --- the same, traced -------------------------------------------------------------------------------------------------

BF16 = torch.bfloat16


def test_a_lora_merge_a_cast_and_a_slice_are_computed() -> None:
    """Parameters of a module, and what a model may make of such in its graph."""
    with testing.fake_deployment(ep_size=16, max_tokens=64) as deployment, testing.fake_tensors():
        layer = MoE(1024, 512, 64, 4, deployment=deployment, dtype=BF16)
        x = torch.empty(32, 1024, dtype=BF16)
        a, b = torch.empty(4, 1024, 8, dtype=BF16), torch.empty(4, 8, 1024, dtype=BF16)
        wide, layers = (
            (layer.w13.float(), layer.w2.float()),
            (torch.stack([layer.w13] * 2), torch.stack([layer.w2] * 2)),
        )
        forms: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {
            "stored": lambda: (layer.w13, layer.w2),
            "merged": lambda: (layer.w13 + a @ b, layer.w2),
            "cast": lambda: (wide[0].to(BF16), wide[1].to(BF16)),
            "slice": lambda: (layers[0][1], layers[1][1]),
        }
        for name, make in forms.items():

            def model(x: torch.Tensor, make: Callable[[], Any] = make) -> torch.Tensor:
                weights, ids = route(layer.gate(x), 4)
                return moe_experts(x, weights, ids, *make(), num_experts=64, deployment=deployment)

            lowered = testing.lower_graph(model, x, deployment=deployment, comm="fused_mc2", policy="fixed")
            if name == "stored":
                testing.assert_lowered(lowered, comm="fused_mc2")
            else:
                testing.assert_refused(lowered, code="fused.weight_format", comm="fused_mc2")


def test_weights_that_are_arguments_of_a_dynamic_graph() -> None:
    """Symbolic in every size, also where the number of experts is said beside them."""
    with testing.fake_tensors():
        args = (torch.empty(5, 16), torch.empty(5, 2), torch.empty(5, 2, dtype=torch.int32), torch.empty(4, 16, 16),
                torch.empty(4, 8, 16), torch.empty(4, 16), torch.empty(4, 16))  # fmt: skip

    def model(x: Any, weights: Any, ids: Any, w13: Any, w2: Any, w13_bias: Any, w2_bias: Any) -> torch.Tensor:
        return moe_experts(x, weights, ids, w13, w2, num_experts=4, w13_bias=w13_bias, w2_bias=w2_bias)

    lowered = testing.lower_graph(model, *args, deployment=Deployment(), dynamic=True)
    testing.assert_lowered(lowered, comm="allgather", blocks=1)
