"""Every implementation on real ranks with every weight format, against a dense reference; and that the table can fail."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re

import matrix_changes
import pytest
import torch
from json_schema import problems

from moe_lowering import cli, quantisation
from moe_lowering.cli.commands import parse
from moe_lowering.cli.matrix.text import render
from moe_lowering.cli.usage import UsageError
from moe_lowering.limits.table import load
from moe_lowering.matrix import cells as matrix_cells
from moe_lowering.matrix import forms, runner
from moe_lowering.matrix import reference as matrix_reference
from moe_lowering.matrix.cells import SCENARIOS, Cell
from moe_lowering.matrix.expected import REFUSALS, refusals
from moe_lowering.matrix.forms import FORMS, WITHOUT_A_ROW
from moe_lowering.matrix.reference import FLOORS, signal_to_noise
from moe_lowering.matrix.runner import Pool
from moe_lowering.matrix.table import EVERYTHING, Axes, CellResult, Table
from moe_lowering.report.schemas import schema
from moe_lowering.report.width import WIDTH
from moe_lowering.vocabulary import EXPERT_FORMATS, IMPLEMENTATION_FORMS, UNPERMUTE_OPERATORS


@pytest.fixture(scope="module")
def pools():
    """One pool for each world size, for all tests of this file."""
    made = {ep: Pool(ep) for ep in forms.EP_SIZES}
    yield made
    for pool in made.values():
        pool.close()


def run(pools, change=None, **axes):
    """The cells of ``axes``, without other layouts than the forms' own unless they are asked for."""
    return runner.run(Axes(**{"layouts": (), **axes}), change=change, pools=pools)


# The table

# Cells that are run, of 4 formats x 2 TP sizes (on four ranks: TABLES) x the scenarios, and 41 in other layouts; the others are
# refused. Written down so that a rule that refuses too much is seen, whichever list it is in.
LEGAL = {1: 56, 2: 588 + 70 + 41, 4: 286 + 91}
# Scenarios for all formats, or for two, or for one
CELLS = {
    1: 14 * 56,
    2: 14 * 56 + 3 * 28 + 14 + 84,
    4: 14 * 28 + 14 + 7 * 15,
}


# On four ranks without TP in one format: there the others do what they do on two. The command has all.
TABLES = {1: [{}], 2: [{}], 4: [{"tps": (2,)}, {"tps": (1,), "quantisations": ("w8a8",)}]}


@pytest.mark.parametrize("ep", forms.EP_SIZES)
def test_every_cell_is_what_it_must_be(pools, ep):
    tables = [run(pools, eps=(ep,), layouts=tuple(forms.LAYOUTS), **axes) for axes in TABLES[ep]]
    assert [table.problems() for table in tables] == [[]] * len(tables)
    results = [result for table in tables for result in table.results]
    assert sum(result.snr is not None for result in results) == LEGAL[ep]
    assert len(results) == CELLS[ep]
    assert pools[ep].restarts == 0


FINALIZE = {"eps": (2,), "unpermute_operator": "finalize_routing"}


def test_cells_whose_rows_are_brought_back_by_finalize_routing_are_what_they_must_be(pools):
    """The matrix has them all: --unpermute-operator. Here every scenario with AllGather, and some in the other formats and
    with AllToAll, which differs behind that operator alone."""
    some = ("skewed", "unequal_masked", "symbolic", "t0")
    tables = [
        run(pools, forms=("allgather",), tps=(1,), quantisations=("w8a8",), **FINALIZE),
        run(pools, forms=("allgather",), tps=(1,), quantisations=("none", "w4a8", "w4a16"), scenarios=some, **FINALIZE),
        run(pools, forms=("alltoall_static",), tps=(2,), quantisations=("none",), scenarios=some, **FINALIZE),
    ]
    for table in tables:
        assert table.problems() == []
    results = [result for table in tables for result in table.results]
    assert {result.cell.scenario for result in results} == set(SCENARIOS)
    empty = [result.cell.scenario for result in results if "finalize.empty" in result.codes]
    assert empty == ["t0"] * 5 and sum(result.snr is None for result in results) == 5


def test_a_cell_that_does_not_have_the_other_operator_is_seen(pools):
    given = {"forms": ("allgather",), "tps": (1,), "quantisations": ("none",), "scenarios": ("even",), **FINALIZE}
    assert run(pools, **given).problems() == []
    problems = run(pools, change=matrix_changes.the_other_unpermute_operator, **given).problems()
    assert problems and all("npu.npu_moe_finalize_routing is not in the graph" in problem for problem in problems)


# That it can fail

BROKEN = [
    ("scales_of_the_next_expert", {"quantisations": ("w8a8", "w4a8")}),
    ("second_scales_of_the_next_expert", {"quantisations": ("w8a8", "w4a16")}),
    ("no_offset", {"quantisations": ("w4a16",), "forms": ("allgather", "mc2")}),
    ("no_compensation", {"quantisations": ("w4a8",), "forms": ("allgather", "alltoall_static", "mc2")}),
    ("one_weight_packed_in_another_place", {"quantisations": ("w4a8",)}),
    ("gate_and_up_swapped", {"quantisations": ("none", "w8a8")}),
    ("small_error", {"quantisations": ("none",)}),
    ("x_of_the_next_token", {"quantisations": ("none",), "tps": (2,)}),
    ("mask_reversed", {"quantisations": ("w8a8",), "scenarios": ("masked",), "forms": ("allgather", "mc2")}),
    ("another_x_on_the_second_rank", {"quantisations": ("w8a8",)}),
    ("scales_of_the_next_token", {"quantisations": ("w8a8",), "scenarios": ("quantised_input",)}),
    ("weights_of_the_next_token", {"quantisations": ("none",), "scenarios": ("weight_on_input",)}),
    ("another_place_of_experts", {"quantisations": ("none",), "scenarios": ("log2phy",)}),
]
STACKED = ("allgather", "alltoall_static", "alltoall_exact", "mc2", "dispatch_ffn_combine")


@pytest.mark.parametrize(("change", "axes"), BROKEN, ids=[name for name, _ in BROKEN])
def test_wrong_numbers_are_seen(pools, change, axes):
    """Each in every legal cell: a cell that passes anyway would say nothing."""
    axes = {"forms": STACKED, "eps": (2,), "tps": (1,), "scenarios": ("even",), **axes}
    table = run(pools, change=getattr(matrix_changes, change), **axes)
    ran = [result for result in table.results if result.snr is not None]
    assert ran
    for result in ran:
        assert any("under the floor" in problem for problem in result.problems), f"{result.cell}: {result.snr} dB"


def test_counts_of_other_experts_are_seen(pools):
    given = {"eps": (2,), "tps": (1,), "quantisations": ("none",), "scenarios": ("counts",)}
    table = run(pools, change=matrix_changes.experts_of_the_next_rank, forms=("allgather",), **given)
    assert any("counts are" in problem for problem in table.problems())


def test_results_that_differ_within_a_tp_group_are_seen(pools):
    """x is the same on the ranks of a TP group; where it is not, each computes and gathers another slice."""
    given = {"eps": (2,), "quantisations": ("none",), "forms": ("allgather",)}
    (good,) = run(pools, tps=(2,), scenarios=("even",), **given).results
    outcomes = pools[2].outcomes([good.cell], None)
    pair = [outcome[0] for outcome in outcomes]
    assert runner._judge(good.cell, pair).problems == []
    pair[1].y = pair[1].y.clone()
    pair[1].y[0, 0] += 2**-9 * abs(pair[1].y[0, 0])  # less than any floor sees
    pair[1].y[0, 0] = torch.nextafter(pair[0].y[0, 0], torch.tensor(9.0, dtype=torch.bfloat16))
    assert ["bit by bit" in problem for problem in runner._judge(good.cell, pair).problems] == [True]


@pytest.mark.parametrize(("change", "form", "quantised", "scenario", "says"), [
    ("no_provider", "dispatch_ffn_combine", "w8a8", "even", "must be legal, and is refused: .*fused.provider"),
    ("weights_in_nd", "dispatch_ffn_combine", "w8a8", "even", "must be legal, and is refused: .*fused.weight_format"),
    ("captured", "alltoall_exact", "none", "even", "lowered to alltoall as static, asked for alltoall as exact"),
    ("captured", "alltoall_exact", "none", "even", "moe_lowering.alltoall_experts is not in the graph"),
    ("no_mask", "dispatch_ffn_combine", "none", "masked", "is legal, and must be refused with fused.mask"),
    ("no_mask", "mc2", "none", "unequal_masked", "is legal, and must be refused with mc2.mask_global_bs"),
])  # fmt: skip
def test_a_fall_back_and_a_missing_refusal_are_seen(pools, change, form, quantised, scenario, says):
    given = {"eps": (2,), "tps": (1,), "quantisations": (quantised,), "forms": (form,), "scenarios": (scenario,)}
    assert run(pools, **given).problems() == []
    problems = run(pools, change=getattr(matrix_changes, change), **given).problems()
    assert any(re.search(says, problem) for problem in problems), problems


def test_a_rank_that_raises_breaks_its_own_cell_only():
    """The other rank waits, the pool is replaced, and the next cell runs."""
    with Pool(2, collective_timeout=20) as pool:
        given = {"eps": (2,), "tps": (1,), "quantisations": ("none",), "forms": ("alltoall_static",)}
        table = runner.run(
            Axes(scenarios=("even", "t1"), layouts=(), **given),
            change=matrix_changes.a_wrong_id_on_the_second_rank,
            pools={2: pool},
        )
        broken, fine = table.results
    assert pool.restarts == 1
    assert any("rank 1" in problem and "ids" in problem for problem in broken.problems)
    assert fine.problems == []
    assert fine.snr is not None


# The expectation and the reference


def cells(**changes):
    axes = dataclasses.replace(EVERYTHING, **changes)
    for ep, tp, quantised in itertools.product(axes.eps, axes.tps, axes.quantisations):
        yield from axes.cells(ep, tp, quantised)


def test_every_rule_refuses_a_cell_by_itself():
    every = [cell for name in UNPERMUTE_OPERATORS for cell in cells(unpermute_operator=name)]
    alone = {found[0] for cell in every if len(found := refusals(cell)) == 1}
    assert {rule.code for rule in REFUSALS} == alone


def test_every_code_is_one_of_the_tables():
    assert {rule.code for rule in REFUSALS} - {row.code for row in load()} == {"Deployment"}


def test_other_layouts_are_at_one_place_and_in_one_scenario():
    other = [cell for cell in cells() if cell.layout]
    assert {(cell.ep, cell.tp, cell.scenario) for cell in other} == {(2, 1, "even")}
    assert len(other) == 7 * 4 * 3  # the fourth is the form's own
    assert not [cell for cell in other if cell.layout == FORMS[cell.form].layout(cell.quantisation).name]
    assert Axes(scenarios=("t1",)).cells(2, 1, "none") == [Cell(form, "none", 2, 1, "t1") for form in FORMS]


def test_physical_experts_are_a_permutation_that_moves_experts_between_ranks():
    place = matrix_cells.physical_experts().tolist()
    assert sorted(place) == list(range(matrix_cells.EXPERTS))
    assert sum(expert // 8 != where // 8 for expert, where in enumerate(place)) >= 8


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_are_what_they_say(name):
    scenario = SCENARIOS[name]
    for groups in (1, 2, 4):
        given = [scenario.inputs(group, groups) for group in range(groups)]
        for one in given:
            assert one.ids.dtype == torch.int32
            assert all(len(set(row)) == scenario.top_k for row in one.ids.tolist())
        counts = matrix_reference.expected_counts(scenario, groups)
        if name == "even":
            assert int(counts.max()) - int(counts.min()) <= 1
        if name == "skewed":
            assert int((counts > 0).sum()) == matrix_cells.TOP_K
        if name == "empty":
            assert (counts.view(4, -1).amin(1) == 0).all()
            assert (counts.view(4, -1).amax(1) > 0).all()
        if scenario.masked and groups > 1:
            assert not given[-1].mask.any()
            assert any(one.mask.any() and not one.mask.all() for one in given)
        assert (name == "idle") == (0 in scenario.by_group(groups) and any(scenario.by_group(4)))
    lengths = scenario.by_group(4)
    assert scenario.unequal == (len(set(lengths)) > 1)


def test_the_signal_to_noise_ratio():
    want = torch.tensor([[3.0, 4.0], [6.0, 8.0]], dtype=torch.float64)
    assert signal_to_noise(want.float(), want) == math.inf
    one_off = want + torch.tensor([[0.05, 0.0], [0.0, 0.0]])
    assert signal_to_noise(one_off, want) == pytest.approx(40.0)  # of the worst token: 25 to 0.0025
    assert signal_to_noise(want * math.nan, want) == -math.inf
    assert signal_to_noise(want[:1], want) == -math.inf
    zero = torch.zeros(1, 2, dtype=torch.float64)
    assert signal_to_noise(zero, zero) == math.inf
    assert signal_to_noise(zero + 1e-9, zero) == -math.inf
    assert signal_to_noise(zero[:0], zero[:0]) == math.inf


@pytest.mark.parametrize("quantised", ["w8a8", "w4a8", "w4a16"])
def test_the_references_weights_are_those_that_were_quantised(quantised):
    """Two ways to read a format: the reference's own, and the package's."""
    given = {name: tensor[3] for name, tensor in matrix_cells.expert_weights(quantised).items()}
    for name in ("w13", "w2"):
        own = matrix_reference._dequantise_weight(given, name)
        record = quantisation.QuantisedWeight(
            quantised, given[name], given[f"{name}_scale"], given.get(f"{name}_offset")
        )
        assert torch.allclose(own, quantisation.dequantise(record).double(), rtol=1e-6, atol=0)
        plain = matrix_cells.expert_weights("none")[name][3].double()
        assert signal_to_noise(own, plain) > (12 if "4" in quantised else 35)


def test_a_result_rounded_once_is_over_the_floor_and_five_per_cent_off_is_not():
    for quantised, floor in FLOORS.items():
        reference = matrix_reference.expected(quantised, SCENARIOS["even"], 0, 1)
        assert signal_to_noise(reference.to(torch.bfloat16), reference) > floor + 5
        assert signal_to_noise((1.05 * reference).to(torch.bfloat16), reference) < floor


# The command


def test_the_commands_axes_are_those_of_the_matrix():
    request = parse(["matrix"])
    assert (request.ep, request.tp, request.quant) == (forms.EP_SIZES, forms.TP_SIZES, tuple(EXPERT_FORMATS))
    assert request.forms == tuple(FORMS)
    assert parse(["matrix", "--unpermute-operator", "finalize_routing"]).unpermute_operator == "finalize_routing"


def test_the_table_says_its_unit_and_its_columns_are_straight():
    """Sources stand in the limit tables, and not behind a code; the longest code moves no other."""
    codes = ("fused.ep_size", "fused_decode.weight_dtype")
    found = [CellResult(Cell(form, "none", 1, 1, "even"), (code,)) for form, code in zip(FORMS, codes, strict=False)]
    text = render(Table(Axes(tuple(FORMS)[:2], ("none",), (1,), (1,), ("even",)), tuple(found)), 1.0)
    assert text.splitlines()[0].split() == ["dB", "of", "the", "worst", "token", "EP/TP", "1/1"]
    assert "  (a) fused.ep_size             nobody to exchange rows with" in text, text
    assert "  (b) fused_decode.weight_dtype int8 or 16-bit weights" in text, text


def test_every_form_of_the_vocabulary_has_its_rows():
    rows = [(form.comm, form.form) for form in FORMS.values()]
    registered = [(comm, form) for comm, names in IMPLEMENTATION_FORMS.items() for form in names]
    assert {*WITHOUT_A_ROW} <= {*registered} and rows == [key for key in registered if key not in WITHOUT_A_ROW]


@pytest.mark.parametrize(("given", "says"), [
    (["--ep", "3"], "argument --ep: is '3'; accepted: one or more of 1,2,4, with commas"),
    (["--ep", ""], "argument --ep: is ''"),
    (["--tp", "1,4"], "argument --tp: is '1,4'; accepted: one or more of 1,2"),
    (["--quant", "fp8"], "argument --quant: is 'fp8'; accepted: one or more of none,w8a8,w4a8,w4a16"),
    (["--comm", "nccl"], "argument --comm: is 'nccl'; accepted: one or more of allgather,alltoall,mc2,fused_mc2"),
    (["--unpermute-operator", "sum"], "argument --unpermute-operator: is 'sum'; accepted: token_unpermute, finalize_routing"),
    (["--soc", "A3"], "argument --soc: is no option of matrix; accepted: those of moe-lowering matrix --help"),
])  # fmt: skip
def test_wrong_usage(given, says):
    with pytest.raises(UsageError) as caught:
        parse(["matrix", *given])
    assert says in str(caught.value)
    assert cli.main(["matrix", *given]) == 2


def test_lists_are_in_the_matrixs_order_and_without_repetition():
    request = parse(["matrix", "--ep", "4,1,4", "--comm", "mc2,allgather", "--quant", "w8a8"])
    assert (request.ep, request.forms, request.quant) == ((1, 4), ("allgather", "mc2"), ("w8a8",))


def test_a_small_table(capfd):
    given = ["matrix", "--ep", "1", "--tp", "1", "--quant", "none", "--comm", "allgather,mc2"]
    assert cli.main(given) == 0
    printed = capfd.readouterr().out
    assert all(len(line) <= WIDTH for line in printed.splitlines())
    grid = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:3]}
    assert 40 < float(grid["allgather"][1]) < 60
    assert grid["mc2"][1] == "(a)"
    assert "(a) mc2.ep_size" in printed
    run = sum(1 in scenario.eps for scenario in SCENARIOS.values())
    cells = 2 * run
    assert f"{cells} cells in {run} scenarios: {run} run, {cells - run} refused, 0 not as" in printed


def canned(**problem):
    """A table that needs no ranks: one cell run, one refused."""
    axes = Axes(("allgather", "mc2"), ("none",), (1,), (1,), ("even",))
    ran = CellResult(Cell("allgather", "none", 1, 1, "even"), snr=46.04, **problem)
    refused = CellResult(Cell("mc2", "none", 1, 1, "even"), ("mc2.ep_size",), "mc2 is not legal")
    return Table(axes, (ran, refused))


def test_json(monkeypatch, capfd):
    monkeypatch.setattr(runner, "run", lambda axes, progress: canned())
    assert cli.main(["matrix", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert not problems(printed, schema("matrix")) and problems({**printed, "cells": [{}]}, schema("matrix"))
    assert printed["floors_db"] == FLOORS
    assert printed["cells"] == [
        {
            "form": "allgather", "quantisation": "none", "ep": 1, "tp": 1, "scenario": "even", "layout": "",
            "unpermute_operator": "token_unpermute", "legal": True,
            "snr_db": 46.04, "codes": [], "expected_codes": [], "problems": [],
        },
        {
            "form": "mc2", "quantisation": "none", "ep": 1, "tp": 1, "scenario": "even", "layout": "",
            "unpermute_operator": "token_unpermute", "legal": False,
            "snr_db": None, "codes": ["mc2.ep_size"], "expected_codes": ["mc2.ep_size"], "problems": [],
        },
    ]  # fmt: skip


def test_a_cell_that_is_not_what_it_must_be_is_exit_code_1(monkeypatch, capfd):
    wrong = ["rank 0: Traceback (most recent call last):\n  File x\nValueError: ids", "under the floor"]
    monkeypatch.setattr(runner, "run", lambda axes, progress: canned(problems=wrong))
    assert cli.main(["matrix"]) == 1
    printed = capfd.readouterr()
    assert "46.0!" in printed.out
    assert printed.err.splitlines()[-2:] == [
        "moe-lowering: allgather none EP 1 TP 1 even: rank 0: ValueError: ids",
        "moe-lowering: allgather none EP 1 TP 1 even: under the floor",
    ]
