"""``explain`` for several deployments, presets, hub ids, aliases of SoCs, and defaults that are said."""

import dataclasses
import json
import re

import pytest
import torch
import transformers
from test_explain import BLOCK, answer, codes, command

from moe_lowering import Deployment, simulator
from moe_lowering.cli.commands import parse
from moe_lowering.cli.explain.command import run_explain
from moe_lowering.cli.lower.prepare import deployment_facts
from moe_lowering.explanation import describe
from moe_lowering.explanation.memory import ON_TOP
from moe_lowering.model_configs.check import check_model
from moe_lowering.model_configs.errors import ModelError
from moe_lowering.model_configs.presets import DEFAULTS, PRESETS
from moe_lowering.vocabulary import IMPLEMENTATION_FORMS, SOCS, soc_named

DEPLOYMENTS = f"{BLOCK} --soc A2,910C --ep 16,64 --quant none,w8a8"


def table(capfd, given):
    return answer(capfd, given)[1]["rows"]


# --------------------------------------------------------------------------------------------------------------- table


def test_a_table_says_what_single_answers_say(capfd):
    """Each row's ends, and the tokens next to them, by the command for one deployment."""
    rows = table(capfd, f"{DEPLOYMENTS} --tokens 1..700")
    assert {(row["soc"], row["ep"], row["quantisation"]) for row in rows} == {
        (soc, ep, quant) for soc in ("A2", "A3") for ep in (16, 64) for quant in ("none", "w8a8")
    }
    for row in rows[::3]:
        given = f"{BLOCK} --soc {row['soc']} --ep {row['ep']} --quant {row['quantisation']}"
        assert answer(capfd, f"{given} --tokens {row['from']}")[1]["choice"] == row["choice"]
        last = answer(capfd, f"{given} --tokens {row['to']}")[1]
        assert last["choice"] == row["choice"]
        assert last["costs"][0] == row["cost"] and last["memory"] == row["memory"]
        refused = {name: found for name, found in codes(last).items() if found}
        assert {
            name: set(found) for name, found in row["others"].items() if found not in (["cost"], ["policy"])
        } == refused
        assert set(row["others"]) == IMPLEMENTATION_FORMS.keys() - {row["choice"]}
        if row["to"] < 700:
            assert answer(capfd, f"{given} --tokens {row['to'] + 1}")[1]["choice"] != row["choice"]


def test_ranges_and_single_numbers_are_rows_of_their_own(capfd):
    rows = table(capfd, f"{BLOCK} --ep 16 --tokens 4,600..601,8")
    assert [(row["from"], row["to"]) for row in rows] == [(4, 4), (600, 601), (8, 8)]
    assert "rows" not in answer(capfd, f"{BLOCK} --ep 16 --tokens 4")[1], "one deployment and one T: no table"


@pytest.mark.parametrize(("comm", "tokens"), [("mc2", 100), ("fused_mc2", 512)])  # of one rule, of the larger of two
def test_the_buffer_to_set_is_enough_and_less_is_not(capfd, comm, tokens):
    (row,) = table(capfd, f"{BLOCK} --ep 16,32 --tokens {tokens} --comm {comm} --buffer-mb 4096")[:1]
    size = row["hccl_buffer_mb"]
    assert row["choice"] == comm and 100 < size < 4096
    given = f"{BLOCK} --ep 16 --tokens {tokens} --comm {comm} --buffer-mb"
    assert answer(capfd, f"{given} {size}")[0] == 0
    assert answer(capfd, f"{given} {size - 1}")[0] == 1


@pytest.mark.parametrize("columns", [60, 80, 100, 300])
def test_a_table_fits(capfd, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = command(
        capfd,
        f"{BLOCK} --soc A2,A3 --ep 16 --tokens {0 if columns == 80 else 500}..{2**31 - 1 if columns == 80 else 600}",
    )
    assert code == 0
    assert max(map(len, out.splitlines())) <= min(max(columns, 80), 100)
    assert not any(line != line.rstrip() for line in out.splitlines())
    assert out.index("one change:") < out.index("not alltoall"), "what would help stands first"
    assert re.search(r"one change: \w+ legal with ", out) and ON_TOP in " ".join(out.split())


def test_figures_stand_below_their_titles(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = command(capfd, "qwen3_235b --soc A2 --ep 16,64 --quant none,w8a8 --tokens 1..4096")
    lines = out.splitlines()
    (titles,) = (line for line in lines if line.startswith("  SoC"))
    figures = [line for line in lines if " +- " in line]
    assert any(re.search(r"[1-9]\d{5} \+- \d{5} ", line) for line in figures), "wider than the title"
    assert {len(line) for line in figures} == {len(titles)}
    assert all(line[titles.index("choice") :].startswith(("allgather ", "mc2 ")) for line in figures)


def test_where_nothing_is_legal_the_exit_code_is_1(capfd):
    code, out, err = command(capfd, f"{BLOCK} --ep 16,32 --tokens 600 --comm mc2")
    assert code == 1 and out.count("NONE") == 2
    assert err == "moe-lowering: no implementation is legal in any of the deployments\n"
    assert command(capfd, f"{BLOCK} --ep 16,32 --tokens 600")[0] == 0


@pytest.mark.parametrize(("given", "message"), [
    ("--ep 16,24", "argument --ep: is 24; accepted: a divisor of the number of experts, 256"),
    ("--ep 16,16", "argument --ep: is '16,16', with a value twice; accepted: each value once"),
    ("--ep 16,", "argument --ep: is '16,', with nothing beside a comma; accepted: values with commas between them"),
    ("--soc A2,910b", "argument --soc: is 'A2,910b', with a SoC twice; accepted: each SoC once"),
    ("--soc A2,H100", r"argument --soc: is 'H100'; accepted: A2 \(910B\), A3 \(910C, "),
    ("--quant none,int8", "argument --quant: is 'int8'; accepted: none, w8a8, w4a8, w4a16"),
    ("--tokens 8..1", r"argument --tokens: is '8..1'; accepted: T, or LOW..HIGH with 0 <= LOW <= HIGH"),
    ("--tokens 1..", r"argument --tokens: is '1..'; accepted: T, or LOW..HIGH"),
    ("--tokens 1..8,1..8", r"argument --tokens: is '1..8,1..8', with a value twice"),
    ("--tokens 1..8 --why mc2", "argument --why: is given with several deployments or a range of --tokens"),
    ("--ep 16,32 --sweep tokens=1..8", "argument --sweep: is given with several deployments or a range of --tokens"),
    ("--tokens 1..8 --unequal-tokens --max-tokens 8", "argument --tokens: is a range with --unequal-tokens"),
])  # fmt: skip
def test_wrong_usage_is_one_line(capfd, given, message):
    code, out, err = command(capfd, f"{BLOCK} {given}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(f"moe-lowering: error: {message}", err), err


def test_the_buffer_that_a_row_needs_is_in_words(capfd):
    """MC2's window has a rule, AllGather has a communicator without one, and one rank has none."""
    for given, said in (
        ("--ep 16 --comm mc2", "960 MB or more"),
        ("--ep 16 --comm allgather", "any"),
        ("", "not used"),
    ):
        out = " ".join(command(capfd, f"{BLOCK} {given} --tokens 127..128")[1].split())
        assert f"GB; HCCL_BUFFSIZE {said}" in out, given
        assert "columns" in out and "any: none of its rules is on it" in out


# ------------------------------------------------------------------------------------------------- names, sizes, aliases


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_is_a_default_is_the_default(name):
    """Of those that say so, and of no other: there some value differs, so that the default is another model."""
    simulator.enable()
    preset = PRESETS[name]
    default = transformers.CONFIG_MAPPING[preset.kind]()
    differ = [key for key, value in preset.values.items() if getattr(default, key, value) != value]
    assert bool(preset.source) and (differ == []) == (preset.source == DEFAULTS), differ


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_its_model_card_says(name):
    """Experts are nine tenths or more of these models; kimi's card rounds down."""
    block = describe(name)
    experts = block.layers * block.experts * 3 * block.hidden * block.intermediate / 1e9
    assert 0.89 < experts / PRESETS[name].billions < 1.02
    assert PRESETS[name].hub in block.assumptions[0]


def test_a_type_says_that_it_means_its_defaults_and_which_sizes_are_published(capfd):
    (said,) = [text for text in answer(capfd, "qwen3_moe")[1]["assumptions"] if "default config" in text]
    assert "qwen3_30b, qwen3_235b, qwen3_coder_480b" in said
    assert not [text for text in answer(capfd, "qwen3_235b")[1]["assumptions"] if "default config" in text]


def test_a_hub_id_says_that_files_must_be_local(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, also in (
        ("Qwen/Qwen3-30B-A3B", "accepted: qwen3_30b, which"),
        ("some/model", "accepted: a local folder"),
    ):
        code, out, err = command(capfd, given)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "nothing is downloaded" in err and also in err
    folder = tmp_path / "some" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PRESETS["qwen3_30b"].config))
    assert answer(capfd, "some/model")[1]["block"] == answer(capfd, "qwen3_30b")[1]["block"]


@pytest.mark.parametrize("name", ["qwen3_mo", "gpt_os", "mixtra", "glm45", "deepseek_r1", "DEEPSEEK_V3"])
def test_suggestions_are_models_with_experts(name):
    with pytest.raises(ModelError) as caught:
        check_model(name)
    close = re.search(r"did you mean (.*)\?\)", str(caught.value))[1].split(", ")
    for each in close:
        check_model(each)
    with pytest.raises(ModelError) as caught:
        check_model("bertt")
    assert "did you mean" not in str(caught.value), "bert has no experts"


@pytest.mark.parametrize("soc", SOCS.values(), ids=SOCS)
def test_a_soc_has_its_aliases_in_any_case(soc):
    for word in (soc.name, *soc.aliases, *soc.device_types, soc.runtime_name, soc.runtime_name.removeprefix("Ascend")):
        for spelt in (word, word.lower(), word.upper()):
            assert soc_named(spelt) is soc, spelt


@pytest.mark.parametrize("word", ["", "A", "A4", "910", "910A", "Ascend", "H100", "A3 A2", "9"])
def test_another_word_is_no_soc(word):
    assert soc_named(word) is None


def test_an_alias_is_said_as_what_it_was_taken(capfd):
    found = answer(capfd, f"{BLOCK} --soc 910c")[1]
    assert found["deployment"]["soc"] == "A3" and "SoC 910c is taken as A3" in found["assumptions"]
    assert not [text for text in answer(capfd, f"{BLOCK} --soc A3")[1]["assumptions"] if "taken as" in text]
    request = parse(["lower", "moe", "--soc", "950"])
    assert request.soc == "A5" and "SoC 950 is taken as A5" in dict(deployment_facts(request))["assumed"]


def test_every_default_that_differs_from_a_deployments_is_said(capfd):
    """Fields of the deployment of a bare command against those of a bare ``Deployment``."""
    explanation = run_explain(parse(["explain", *BLOCK.split()])).explanation
    made, bare = explanation.question.deployment, Deployment()
    differing = {
        field.name
        for field in dataclasses.fields(Deployment)
        if field.compare and getattr(made, field.name) != getattr(bare, field.name)
    }
    said = {"hccl_buffer_mb": f"take {bare.hccl_buffer_mb})", "weight_format": f"default is {bare.weight_format})",
            "providers": "is installed (a Deployment's default is none)", "mc2_group": "MC2 has a communicator"}  # fmt: skip
    assert differing == said.keys(), "the package's defaults and those of the command"
    for text in said.values():
        assert any(text in assumption for assumption in explanation.assumptions), text
    assert torch.bfloat16 == explanation.block.dtype


@pytest.mark.parametrize(
    ("given", "said"),
    [("--soc A3", ["A3"]), ("--soc A2,A3", ["A3"]), ("--soc A2", []), ("--soc A3 --provider none", [])],
)
def test_a_build_that_no_wheel_is_is_assumed_by_name(capfd, given, said):
    out = " ".join(command(capfd, f"{BLOCK} --ep 16 {given}")[1].split())
    assert re.findall(r"vllm_ascend is built from source for (\w+) \(its wheels are A2 builds\)", out) == said
