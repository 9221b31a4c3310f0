"""What each word of the vocabulary owes: every table has it, what it computes is right, pages tell of it.

A test that fails names the step of docs/adding.md that was left out. Modules that load tables of words are imported by the
tests and not by this file, so that an error of theirs is the error of a test.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from checklists import ROOT, forgotten

from moe_lowering.vocabulary import ACTIVATIONS, EXPERT_FORMATS, IMPLEMENTATION_FORMS, SOCS

IMPLEMENTATION, SOC, ACTIVATION, FORMAT = "An implementation", "A SoC", "An activation", "A weight format"
RECORD = "moe_lowering/vocabulary.py"
FORMATS = tuple(name for name, form in EXPERT_FORMATS.items() if form.quantised)


def require_words(kind: str, file: str, words: Collection[str], vocabulary: Collection[str]) -> None:
    """``words``, which ``file`` has, are those of the vocabulary."""
    missing, unknown = sorted({*vocabulary} - {*words}), sorted({*words} - {*vocabulary})
    assert not missing, forgotten(kind, file, f"has no {', '.join(missing)}")
    assert not unknown, forgotten(kind, RECORD, f"has no {', '.join(unknown)}, which {file} has")


@functools.cache
def page(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def first_cells(name: str, title: str) -> list[str]:
    """The words of the first column of the table of a page whose first title is ``title``."""
    table = page(name).split(f"| {title} |", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\| `(\w+)`", table, re.MULTILINE)


def bullet(name: str, title: str) -> str:
    """The item of a list that begins with ``title``, up to the next one."""
    return page(name).split(f"\n- `{title}`:", 1)[1].split("\n- ", 1)[0]


@functools.cache
def a_block() -> Any:
    """The record of a block on one rank, of which tests change a field."""
    from graph_build import build

    from moe_lowering.passes.find_blocks import find_blocks

    (block,), _, _ = find_blocks(build(one_rank()).gm.graph)
    return block.spec


def one_rank(**fields: Any) -> Any:
    """A graph of one block on one rank, of sizes that every chain of operators takes."""
    import torch
    from graph_cases import BlockCase, GraphCase

    from moe_lowering import Deployment

    deployment = Deployment(weight_format="nz", max_tokens=16)
    return GraphCase(deployment, (BlockCase(4, 2, 256, **fields),), (9,), hidden=256, dtype=torch.bfloat16)


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


def test_implementation_has_a_cost() -> None:
    from moe_lowering.passes import cost_model

    require_words(IMPLEMENTATION, "moe_lowering/passes/cost_model.py", cost_model._COSTS, IMPLEMENTATION_FORMS)
    load = cost_model.Load("A3", 2, 8, 1024, 512, 2, 4, 2.0, 2.0)
    for name in IMPLEMENTATION_FORMS:
        few, many = (cost_model.estimate(name, dataclasses.replace(load, tokens=tokens)) for tokens in (8, 8000))
        assert 0 < few < many, (name, few, many)


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

    rows = re.findall(r"^\| (\d+) \| (\w+) \| (\w+)", page("docs/costs.md"), re.MULTILINE)
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
    """By what the runtime and vllm-ascend call it, and no figure is left out."""
    from moe_lowering.deployment import Deployment
    from moe_lowering.simulator import SimulatorError, _check_soc

    soc = SOCS[name]
    assert [s.name for s in SOCS.values() if re.fullmatch(s.runtime_pattern, soc.runtime_name)] == [name]
    assert [s.name for s in SOCS.values() if {*s.device_types} & {*soc.device_types}] in ([name], [])
    figures = {
        field.name: value for field in dataclasses.fields(soc) if type(value := getattr(soc, field.name)) is float
    }
    assert figures and all(value > 0 for value in figures.values()), figures
    assert Deployment(soc=name).soc == name
    if name != "A3":  # the process's own
        with pytest.raises(SimulatorError, match=f"simulates A3 and cannot change to {name}"):
            _check_soc(name)


def test_soc_has_rows() -> None:
    """Loading refuses a code without a row or a reason (``limits/coverage.py``); and each SoC is one that a row is about."""
    from moe_lowering.limits import load

    load.cache_clear()
    rows = load()
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


# --- activations ------------------------------------------------------------------------------------------------------

LIMIT, ALPHA = 0.7, 1.3  # of activations that have one; not the defaults
GATES = [(word, interleaved) for word, made in ACTIVATIONS.items() for interleaved in (False, True)
         if getattr(made, "gated", True) or not interleaved]  # fmt: skip


def arguments(word: str) -> tuple[str, float, float]:
    return word, LIMIT if ACTIVATIONS[word].clamped else 0.0, ALPHA


def some_hidden(word: str) -> Any:
    """Rows [7, 2I], or [7, I] without a gate, on both sides of every clamp."""
    import torch

    width = 12 if getattr(ACTIVATIONS[word], "gated", True) else 6
    return torch.randn(7, width, generator=torch.Generator().manual_seed(3)) * 2


def expected(word: str, interleaved: bool) -> Any:
    import reference
    import torch

    try:
        rows = [reference.gated(row.double(), *arguments(word), interleaved) for row in some_hidden(word)]
    except ValueError as error:
        raise AssertionError(forgotten(ACTIVATION, "tests/helpers/reference.py", error)) from error
    return torch.stack(rows)


def test_activation_has_a_record() -> None:
    from moe_lowering.passes.implementations import activation

    require_words(ACTIVATION, "moe_lowering/passes/implementations/activation.py", activation.EMITTED, ACTIVATIONS)


@pytest.mark.parametrize("word", ACTIVATIONS)
def test_activation_has_a_reference(word: str) -> None:
    """Which knows the word, and computes something else than for any other word."""
    import torch

    own = expected(word, False)
    for other in ACTIVATIONS:
        if other != word and some_hidden(other).shape == some_hidden(word).shape:
            assert not torch.allclose(own, expected(other, False), atol=1e-6), (word, other)


@pytest.mark.parametrize(("word", "interleaved"), GATES)
def test_activation_is_computed(word: str, interleaved: bool) -> None:
    import torch

    from moe_lowering.custom_ops import grouped_mlp

    try:
        result = grouped_mlp.activate(some_hidden(word), *arguments(word), interleaved, torch.float32)
    except ValueError as error:
        raise AssertionError(forgotten(ACTIVATION, "moe_lowering/custom_ops/grouped_mlp.py", error)) from error
    torch.testing.assert_close(result.double(), expected(word, interleaved), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize(("word", "interleaved"), GATES)
def test_activation_is_emitted(word: str, interleaved: bool, soc: str) -> None:
    """What is emitted on a SoC, run here: where no device operator has the activation, what it is composed of."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import Graph, GraphModule

    from moe_lowering.passes.emitter import Emitter
    from moe_lowering.passes.implementations import activation

    if word not in activation.EMITTED:
        pytest.fail(forgotten(ACTIVATION, "moe_lowering/passes/implementations/activation.py"))
    hidden, (_, limit, alpha) = some_hidden(word), arguments(word)
    fields = {"activation": word, "limit": limit, "alpha": alpha, "interleaved": interleaved, "intermediate": 6}
    mode, graph = FakeTensorMode(), Graph()
    node = graph.placeholder("hidden")
    node.meta["val"] = mode.from_tensor(hidden)
    end = graph.output(None)
    emit = Emitter(graph, mode)
    with emit.at(end, node):
        y = activation.emit_activation(emit, node, dataclasses.replace(a_block(), **fields), soc)
    end.args = (y,)
    result = GraphModule(torch.nn.Module(), graph)(hidden)
    torch.testing.assert_close(result.double(), expected(word, interleaved), rtol=1e-5, atol=1e-6)


def test_activation_is_documented() -> None:
    meanings = bullet("docs/architecture.md", "activation")
    told = {word for word in re.findall(r"`(\w+)`", meanings) if word != "interleaved"}
    require_words(ACTIVATION, "docs/architecture.md", told, ACTIVATIONS)


# --- weight formats ---------------------------------------------------------------------------------------------------


@functools.cache
def drawn(format: str) -> Any:
    """(the graph of a block with such experts, its inputs) on one rank; weights are drawn, not quantised."""
    from graph_build import build
    from graph_data import Data

    case = one_rank(quantisation=format)
    return build(case), Data(case)


def noise(built: Any, data: Any) -> float:
    """Signal-to-noise of y against float64 with the weights that were drawn, in dB."""
    import graph_quantised
    import torch

    with torch.no_grad():
        outputs = built.gm(*data.inputs(built))
    values = dict(zip(built.outputs, outputs, strict=True))
    return float(graph_quantised.ratio(values["y0"], data.expected(0, values["x0"])))


@pytest.mark.parametrize("format", FORMATS)
def test_format_has_a_record(format: str) -> None:
    """Tables of words know no others; and floats become such a weight, and come back to within a step of it."""
    import torch

    from moe_lowering.custom_ops import grouped_mlp, npu_grouped_mlp
    from moe_lowering.passes.implementations import quantised_mlp
    from moe_lowering.quantisation import dequantise, quantise_weight

    for words in (grouped_mlp._COMPUTED, npu_grouped_mlp._COMPUTED, {"none", *quantised_mlp.EMITTED}):
        assert words <= EXPERT_FORMATS.keys(), forgotten(FORMAT, RECORD, words - EXPERT_FORMATS.keys())
    w = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    step = (w.float().amax(1, keepdim=True) - w.float().amin(1, keepdim=True)) / (2 ** EXPERT_FORMATS[format].bits - 2)
    made = quantise_weight(w, format)
    assert ((dequantise(made) - w.float()).abs() <= 1.1 * step).all()


@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_format_is_computed(format: str) -> None:
    from moe_lowering.custom_ops import grouped_mlp

    if format not in grouped_mlp._COMPUTED:
        pytest.fail(forgotten(FORMAT, "moe_lowering/custom_ops/grouped_mlp.py"))
    assert noise(*drawn(format)) >= EXPERT_FORMATS[format].snr_floor


@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_format_is_computed_on_a_device(format: str) -> None:
    """The operators that a graph takes which was not lowered, with the simulator's kernels, beside the CPU kernel."""
    import graph_quantised
    import torch

    from moe_lowering.custom_ops import npu_grouped_mlp
    from moe_lowering.custom_ops.grouped_mlp import GroupedMlpCall

    if format not in npu_grouped_mlp._COMPUTED:
        pytest.fail(forgotten(FORMAT, "moe_lowering/custom_ops/npu_grouped_mlp.py"))
    _, data = drawn(format)
    given, w13, w2, _, _ = data.experts(0)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    counts, empty = torch.tensor([3, 0, 4, 1]), torch.empty(0)
    extras = {f"{name}_{part}": [given[f"{name}_{part}"]] if f"{name}_{part}" in given else None
              for name in ("w13", "w2") for part in ("scale", "offset", "scale_bias")}  # fmt: skip
    gate = ("swiglu", 0.0, 1.702, False)
    call: Any = GroupedMlpCall(x, empty, counts, [given["w13"]], [given["w2"]], [], [], *gate, format, **extras)
    result = npu_grouped_mlp.npu_grouped_mlp(call)
    experts = torch.repeat_interleave(counts)
    gate_, up = torch.einsum("nk,nki->ni", x.double(), w13[experts].double()).tensor_split(2, 1)
    y = torch.einsum("ni,nih->nh", gate_ / (1 + torch.exp(-gate_)) * up, w2[experts].double())
    assert graph_quantised.ratio(result, y) >= EXPERT_FORMATS[format].snr_floor


@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_format_is_lowered(format: str) -> None:
    """AllGather on one rank, its operators run with the simulator's kernels."""
    from graph_build import build

    from moe_lowering import MoeLowering
    from moe_lowering.passes.implementations import quantised_mlp

    if format not in {"none", *quantised_mlp.EMITTED}:
        pytest.fail(forgotten(FORMAT, "moe_lowering/passes/implementations/quantised_mlp.py"))
    built, data = build(one_rank(quantisation=format)), drawn(format)[1]
    lowering = MoeLowering(data.case.deployment, "allgather", strict=True)
    lowering(built.gm)
    assert [block.comm for block in lowering.reports[-1].blocks] == ["allgather"]
    assert noise(built, data) >= EXPERT_FORMATS[format].snr_floor


def test_format_is_documented() -> None:
    meanings = bullet("docs/architecture.md", "quantisation")
    told = {word for word in FORMATS if f"`{word}`" in meanings} | {*re.findall(r"`(w\w+)`", meanings)}
    require_words(FORMAT, "docs/architecture.md", told, FORMATS)
    rows = re.findall(r"^\| `(\w+)` \| (\d+) dB \|", page("docs/matrix.md"), re.MULTILINE)
    require_words(FORMAT, "docs/matrix.md", [name for name, _ in rows], EXPERT_FORMATS)
    assert {name: float(floor) for name, floor in rows} == {f.name: f.snr_floor for f in EXPERT_FORMATS.values()}


def test_a_step_is_named_by_its_file() -> None:
    """The twin of all messages here: a file that no step is about is an error, and so is a list that is not there."""
    assert forgotten(SOC, RECORD).startswith(f"docs/adding.md, A SoC, step 1: {RECORD}: its record in `SOCS`")
    with pytest.raises(ValueError):
        forgotten(SOC, str(Path("moe_lowering") / "nothing.py"))
    with pytest.raises(KeyError):
        forgotten("A nothing", RECORD)
