"""What each word of the vocabulary owes: every table has it, pages tell of it.

A test that fails names the step of docs/adding.md that was left out. Modules that load tables of words are imported by the
tests and not by this file, so that an error of theirs is the error of a test.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checklists import RECORD, ROOT, first_cells, forgotten, page, require_words

from moe_lowering.vocabulary import EXPERT_FORMATS, IMPLEMENTATION_FORMS, SOCS

IMPLEMENTATION, SOC, FORMAT = "An implementation", "A SoC", "A weight format"

# --- implementations --------------------------------------------------------------------------------------------------


def test_implementation_is_registered() -> None:
    folder = "moe_lowering/passes/implementations"
    files = {name for name in IMPLEMENTATION_FORMS if (ROOT / folder / f"{name}.py").is_file()}
    require_words(IMPLEMENTATION, f"{folder}/<name>.py", files, IMPLEMENTATION_FORMS)
    from moe_lowering.passes.implementations import IMPLEMENTATIONS

    require_words(IMPLEMENTATION, f"{folder}/__init__.py", IMPLEMENTATIONS, IMPLEMENTATION_FORMS)


@pytest.mark.parametrize("name", IMPLEMENTATION_FORMS)
def test_implementation_has_rules(name: str) -> None:
    """Under its own name, or under those of its forms, each says on which SoCs it is."""
    from moe_lowering.limits import load

    exists = {row.operator for row in load() if row.value.text == "soc" and row.one_of}
    forms = {form for form in IMPLEMENTATION_FORMS[name] if not exists & {name, form, f"{name}.{form}"}}
    assert not forms, forgotten(IMPLEMENTATION, "moe_lowering/limits/data/implementations.toml", forms)


def test_implementation_has_facts() -> None:
    from fact_tables import cases

    from moe_lowering.limits import load

    names = {*IMPLEMENTATION_FORMS, *(f"{name}.{form}" for name, all_ in IMPLEMENTATION_FORMS.items() for form in all_)}
    illegal = {(case.operator, case.code) for case in cases() if not case.legal}
    missing = {(row.operator, row.code) for row in load() if row.operator in names} - illegal
    assert not missing, forgotten(IMPLEMENTATION, "tests/helpers/limit_facts/implementations.toml", missing)
    rules = {row.operator for row in load()}
    stray = {operator for operator, code in illegal if code.endswith(".soc") and operator not in rules}
    assert not stray, forgotten(IMPLEMENTATION, "moe_lowering/limits/data/implementations.toml", stray)


def test_implementation_has_rows_in_the_matrix() -> None:
    from moe_lowering.matrix.forms import FORMS, WITHOUT_A_ROW

    rows = [f"{comm}, {form}" for comm, form in (*((row.comm, row.form) for row in FORMS.values()), *WITHOUT_A_ROW)]
    forms = [f"{name}, {form}" for name, forms in IMPLEMENTATION_FORMS.items() for form in forms]
    require_words(IMPLEMENTATION, "moe_lowering/matrix/forms.py", rows, forms)


def test_implementation_is_lowered() -> None:
    """Each row of the matrix, on the first of two ranks: the form, with the operators that the row says, is in the graph."""
    import torch
    from graph_build import build
    from graph_cases import BlockCase, GraphCase

    from moe_lowering import Deployment, MoeLowering
    from moe_lowering.matrix.forms import FORMS

    for row in FORMS.values():
        layout = row.layout("none")
        groups = {"ep_size": 2, "ep_rank": 0, "ep_group": "ep", "mc2_group": "mc2"}
        deployment = Deployment(**groups, **row.deployment_fields(layout))
        block = BlockCase(16, 3, 512, as_list=(layout.lists,) * 2)
        built = build(GraphCase(deployment, (block,), (6,), 1024, torch.bfloat16, symbolic=(False,)))
        lowering = MoeLowering(deployment, row.comm, policy="fixed")
        lowering(built.gm)
        (report,) = lowering.reports[-1].blocks
        assert report.comm == row.comm, report.reason
        assert report.verdicts[row.comm].form == row.form
        targets = {str(node.target) for node in built.gm.graph.nodes}
        assert {f"{operator}.default" for operator in row.operators} <= targets, (row.name, targets)
        assert not {f"moe_lowering.{name}.default" for name in ("dispatch", "grouped_mlp", "combine")} & targets


def test_implementation_is_documented() -> None:
    require_words(IMPLEMENTATION, "README.md", first_cells("README.md", "implementation"), IMPLEMENTATION_FORMS)
    (axis,) = re.findall(r"^\| implementation \| (.*) \|$", page("docs/matrix.md"), re.MULTILINE)
    named = {name for part in axis.split("; ") for name in re.findall(r"^`(\w+)`", part)}
    require_words(IMPLEMENTATION, "docs/matrix.md", named, IMPLEMENTATION_FORMS)


def test_costs_have_a_row() -> None:
    """For each implementation and weight format, at each EP size; ``test_costs.py`` says whether they are right."""
    from moe_lowering.custom_ops.fused import FORMATS as FUSED_FORMATS
    from moe_lowering.vocabulary import ONE_OPERATOR

    # the rows of a setting, e.g. "allgather, finalize_routing", are more of the same implementation
    rows = re.findall(r"^\| (\d+) \| (\w+) \| (\w+)(?!\w|[^|]*, )", page("docs/costs.md"), re.MULTILINE)
    measured = {(format.lower().replace("bf16", "none"), name) for _, format, name in rows}
    require_words(IMPLEMENTATION, "docs/costs.md", {name for _, name in measured}, IMPLEMENTATION_FORMS)
    require_words(FORMAT, "docs/costs.md", {format for format, _ in measured}, EXPERT_FORMATS)
    pairs = {
        (format, name)
        for format in EXPERT_FORMATS
        for name in IMPLEMENTATION_FORMS
        if name not in ONE_OPERATOR or format in FUSED_FORMATS
    }
    assert pairs == measured and len(rows) == len(pairs) * len({size for size, _, _ in rows})


# --- SoCs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOCS)
def test_soc_is_told_apart(name: str) -> None:
    """By what the runtime and vllm-ascend call it."""
    from moe_lowering.deployment import Deployment
    from moe_lowering.simulator import SimulatorError, _check_soc

    soc = SOCS[name]
    assert [s.name for s in SOCS.values() if re.fullmatch(s.runtime_pattern, soc.runtime_name)] == [name]
    assert [s.name for s in SOCS.values() if {*s.device_types} & {*soc.device_types}] in ([name], [])
    assert Deployment(soc=name).soc == name
    if name != "A3":  # the process's own
        with pytest.raises(SimulatorError, match=f"simulates A3 and cannot change to {name}"):
            _check_soc(name)


def test_soc_has_figures() -> None:
    """All positive, but for a memory that is not known."""
    from moe_lowering.prices.machines import FILE, machines, read_data

    require_words(SOC, f"moe_lowering/prices/data/{FILE}", read_data(FILE), SOCS)
    for name, machine in machines().items():
        links = [getattr(link, field) for link in (machine.within, machine.between) for field in ("gb_s", "latency_us")]
        figures = [machine.ranks_per_node, machine.memory, *links, *(number for _, number in machine.tops)]
        assert all(figure > 0 for figure in figures) and machine.sources, (name, machine)


def test_soc_has_rows() -> None:
    """Loading refuses a code without a row or a reason (``limits/coverage.py``); and each SoC is one that a row is about."""
    from moe_lowering.limits import load

    rows = load.__wrapped__()  # not the rows that other tests hold, which a cleared cache would make strangers
    named = {soc for row in rows for soc in row.soc if set(row.soc) != set(SOCS)}
    named |= {soc for row in rows if row.value.text == "soc" for soc in row.one_of}
    require_words(SOC, "moe_lowering/limits/data/*.toml", named, SOCS)


def test_soc_has_facts() -> None:
    """For each row on each SoC, but for rows on ``soc`` where they permit it, a call that a fact says is illegal."""
    from fact_tables import cases

    from moe_lowering.limits import load

    illegal = {(case.operator, case.code, case.soc) for case in cases() if not case.legal}
    exists = {(row.operator, soc) for row in load() if row.value.text == "soc" for soc in row.one_of}
    rows = {(row.operator, row.code, soc) for row in load() for soc in row.soc
            if row.value.text != "soc" or (row.operator, soc) not in exists}  # fmt: skip
    missing = sorted(rows - illegal)
    assert not missing, forgotten(SOC, "tests/helpers/limit_facts/*.toml", missing[:5])
    require_words(SOC, "tests/helpers/limit_facts/*.toml", {case.soc for case in cases()}, SOCS)


@pytest.mark.parametrize("name", SOCS)
def test_soc_is_known_to_the_rules_of_vllm_ascend(name: str) -> None:
    from moe_lowering.passes import vllm_ascend_rules as rules

    situation = rules.Situation(soc=name, ep_size=16, tokens=8, capacity=512, experts=64, top_k=8)
    try:
        chosen = rules.choose_main(situation)
    except ValueError as error:
        assert not SOCS[name].device_types, forgotten(SOC, "moe_lowering/passes/vllm_ascend_rules.py", error)
    else:
        assert chosen in IMPLEMENTATION_FORMS


def test_soc_is_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*) \|$", page("docs/deployment.md"), re.MULTILINE)
    rows = [row for row in rows if row[1].startswith("Ascend")]
    require_words(SOC, "docs/deployment.md", [name for name, _, _ in rows], SOCS)
    assert [(name, runtime, tuple(re.findall(r"`(\w+)`", words))) for name, runtime, words in rows] == [
        (soc.name, soc.runtime_name, soc.device_types) for soc in SOCS.values()
    ]


# --- the messages ----------------------------------------------------------------------------------------------------


def test_a_step_is_named_by_its_file() -> None:
    """The twin of all messages here: a file that no step is about is an error, and so is a list that is not there."""
    assert forgotten(SOC, RECORD).startswith(f"docs/adding.md, A SoC, step 1: {RECORD}: its record in `SOCS`")
    with pytest.raises(ValueError):
        forgotten(SOC, str(Path("moe_lowering") / "nothing.py"))
    with pytest.raises(KeyError):
        forgotten("A nothing", RECORD)
