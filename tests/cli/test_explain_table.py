"""``explain`` for several deployments, single changes, presets, hub ids, aliases of SoCs, and defaults that are said."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from test_explain import BLOCK, answer, codes, command

from moe_lowering import Deployment, simulator
from moe_lowering.cli.commands import parse
from moe_lowering.cli.explain.command import run_explain
from moe_lowering.cli.lower.prepare import assumptions
from moe_lowering.explanation import candidate_changes, describe
from moe_lowering.explanation.single_changes import single_changes
from moe_lowering.limits import Violation
from moe_lowering.limits.row import read
from moe_lowering.limits.sources import load_sources
from moe_lowering.limits.table import load
from moe_lowering.model_configs.check import check_model
from moe_lowering.model_configs.errors import ModelError
from moe_lowering.model_configs.presets import DEFAULTS, PRESETS
from moe_lowering.passes import legality
from moe_lowering.vocabulary import CANN_VERSIONS, IMPLEMENTATION_FORMS, SOCS, soc_named

DEPLOYMENTS = f"{BLOCK} --soc A2,910C --ep 16,64 --quant none,w8a8"


def test_other_sizes_count_the_ranks_that_hold_routed_experts():
    """Of 6 ranks with 2 of shared experts, 4 hold the 8 routed ones; the twin has none of shared experts."""
    assert candidate_changes.other_sizes(Deployment(ep_size=6, ep_rank=0, ep_group="ep", shared_expert_ranks=2), 8) == [
        4,
        10,
        3,
    ]
    assert candidate_changes.other_sizes(Deployment(ep_size=4, ep_rank=0, ep_group="ep"), 8) == [2, 8, 1]


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
    assert re.search(r"one change: \w+ legal with ", out) and "attention, embeddings and KV" in " ".join(out.split())


def test_where_nothing_is_legal_the_exit_code_is_1(capfd):
    code, out, err = command(capfd, f"{BLOCK} --ep 16,32 --tokens 600 --comm mc2")
    assert code == 1 and out.count("NONE") == 2
    assert err == "moe-lowering: no implementation is legal in any of the deployments\n"
    assert command(capfd, f"{BLOCK} --ep 16,32 --tokens 600")[0] == 0


@pytest.mark.parametrize(("given", "message"), [
    ("--ep 16,24", "argument --ep: is 24; accepted: a divisor of the number of experts, 256"),
    ("--ep 16,16", "argument --ep: is '16,16', with a value twice; accepted: each value once"),
    ("--ep 16,", "argument --ep: is ''; accepted: an integer from 1 to"),
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


# -------------------------------------------------------------------------------------------------------------- changes

# What takes least first, as docs/deployment.md says it: a setting, an installation, smaller steps, other weights, ranks, a SoC.
ORDER = (
    "hccl_buffer_mb", "max_tokens", "weight_format", "fused_mode", "capture", "mc2_hierarchy", "providers", "installed", "cann",
    "tokens", "quantisation", "dtype", "ep_size", "soc",
)  # fmt: skip
REFUSALS = [
    f"{BLOCK} --ep 16 --tokens 600",
    f"{BLOCK} --ep 16 --tokens 128 --buffer-mb 200 --provider none --weight-format nd",
    f"{BLOCK} --ep 64 --soc A2 --tokens 0",
    f"{BLOCK} --ep 16 --dtype float32",
    f"{BLOCK} --ep 16 --unequal-tokens --max-tokens 4096",
    f"{BLOCK} --soc 310P --quant w8a8",
    "mixtral_8x7b --ep 4 --fused-mode 0",
    "gpt_oss_20b --ep 8 --hierarchy --soc A5",
    f"{BLOCK} --ep 16 --max-tokens 16 --tokens 32",
    f"{BLOCK} --ep 16 --provider vllm_ascend=0.13.0",
    f"{BLOCK} --ep 16 --fused-mode 2 --provider vllm_ascend=0.26.0rc1",
]


def applied(question, change, tokens):
    """The verdicts with a change, put together here by hand."""
    block, deployment = question.block, question.deployment
    if change.field in ("quantisation", "dtype"):
        block = dataclasses.replace(block, **{change.field: change.value})
    elif change.field == "tokens":
        tokens = change.value
    else:
        more = {"ep_group": "ep"} if change.field == "ep_size" else {}
        deployment = deployment.replace(**{change.field: change.value}, **more)
    asked = dataclasses.replace(question, block=block, deployment=deployment)
    return asked.at(tokens if deployment.equal_tokens else deployment.max_tokens).judgement.verdicts


@pytest.mark.parametrize("given", REFUSALS)
def test_each_single_change_makes_it_legal_and_one_step_less_does_not(given):
    explanation = run_explain(parse(["explain", *given.split()])).explanation
    question, tokens = explanation.question, explanation.answer.tokens
    refused = {name for name, verdict in explanation.answer.judgement.verdicts.items() if not verdict.legal}
    assert explanation.changes.keys() == refused
    for name, changes in explanation.changes.items():
        fields = [change.field for change in changes]
        assert len(set(fields)) == len(fields)
        assert fields == sorted(fields, key=ORDER.index), "what takes least to do stands first"
        for change in changes:
            assert applied(question, change, tokens)[name].legal, change
            bound = (
                -1 if question.deployment.equal_tokens else 1
            )  # T is to be within it, or it is all that is known of T
            step = {"hccl_buffer_mb": -1, "tokens": 1, "max_tokens": bound}.get(change.field)
            if step is not None and not (change.field == "tokens" and tokens == 0):
                less = dataclasses.replace(change, value=change.value + step)
                assert not applied(question, less, tokens)[name].legal, change


def changes_of(given, name, **deployment):
    """(field, text) of the changes for one implementation, with a deployment that may differ from what options say."""
    question = run_explain(parse(["explain", *given.split()])).explanation.question
    question = dataclasses.replace(question, deployment=question.deployment.replace(**deployment))
    found = single_changes(question, question.at(64))
    return [(change.field, change.text) for change in found.get(name, ())]


MANY_EXPERTS = (
    "--hidden 2048 --intermediate 512 --experts 1024 --topk 8 --ep 16"  # more than MC2 of CANN before 8.5 takes
)


@pytest.mark.parametrize(
    ("given", "deployment", "name", "expected"),
    [
        ("--provider vllm_ascend=0.13.0", {}, "fused_mc2", ("providers", "vllm_ascend 0.23.0 in place of 0.13.0")),
        (
            "--fused-mode 2 --provider vllm_ascend=0.26.0rc1", {}, "fused_mc2",
            ("providers", "vllm_ascend 0.23.0 in place of 0.26.0rc1"),
        ),
        (
            "", {"installed": (("vllm_ascend", "0.26.0", "A3"),)}, "fused_mc2",
            ("providers", "vllm_ascend 0.26.0 declared, which is installed"),
        ),
        ("", {"installed": (("vllm_ascend", "0.23.0", "A2"),)}, "fused_mc2", ("installed", "vllm_ascend 0.23.0 built for A3")),
        (f"{MANY_EXPERTS} --cann 8.2.RC1", {}, "mc2", ("cann", "CANN 8.5.0")),
        (MANY_EXPERTS, {}, "mc2", ("cann", "CANN 8.5.0 declared")),
    ],
)  # fmt: skip
def test_another_version_is_offered_where_it_alone_would_do(given, deployment, name, expected):
    """What is installed or declared is a change like others, tried; the twin: with the versions of a row nothing is refused."""
    whole = given if MANY_EXPERTS in given else f"qwen3_235b --ep 16 {given}"
    assert expected in changes_of(whole, name, **deployment)
    assert not changes_of("qwen3_235b --ep 16 --provider vllm_ascend=0.23.0 --cann 9.1.0", name, installed=())


@pytest.mark.parametrize(
    ("soc", "newer"), [("310P", {"A2", "A3", "A5"}), ("A2", {"A3", "A5"}), ("A3", {"A5"}), ("A5", set())]
)
def test_an_older_soc_is_not_offered(soc, newer):
    deployment = Deployment(soc=soc, ep_size=16, ep_rank=0, ep_group="ep", mc2_group="mc2", installed=())
    assert {change.value for change, _ in candidate_changes._machines(deployment)} == newer
    assert changes_of("qwen3_30b --ep 8 --soc A2", "fused_mc2") == [("soc", "SoC A3")]
    assert len({record.generation for record in SOCS.values()}) == len(SOCS)


def test_the_order_is_that_of_the_page():
    """Of all fields, not of those alone that one refusal brings together."""
    assert candidate_changes.FIELDS == ORDER
    page = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
    kinds = re.findall(r"^\| \d \| ([\w ,]+) \|", page, re.M)
    assert len(kinds) == len(candidate_changes.EFFORT) and kinds[0].startswith("a setting")
    for (kind, _), shown in zip(candidate_changes.EFFORT, kinds, strict=True):
        assert shown.startswith(kind)


def test_versions_of_cann_that_are_tried_are_those_of_the_rules():
    rules = [constraint for limit in load() for constraint in limit.versions]
    wanted = {rule.number for rule in rules if rule.name == "cann" and rule.operator == "<"}
    assert {tuple(map(int, version.split(".")))[:2] for version in CANN_VERSIONS} == wanted


def test_changes_are_found_and_said_before_the_verdicts(capfd):
    code, out, _ = command(capfd, f"{BLOCK} --ep 16 --tokens 600 --comm mc2")
    assert code == 1
    assert "one change        mc2 would be legal with T at most 136" in out
    assert out.index("one change") < out.index("implementation    verdict") < out.index("not mc2")
    given = f"{BLOCK} --ep 16 --tokens 128 --buffer-mb 200 --provider none"
    changes = answer(capfd, given)[1]["changes"]
    assert {"field": "hccl_buffer_mb", "value": 960, "text": "HCCL_BUFFSIZE 960 MB"} in changes["mc2"]
    assert "providers" in [change["field"] for change in changes["fused_mc2"]]
    assert not answer(capfd, f"{BLOCK} --ep 16 --tokens 128")[1]["changes"], "nothing is refused"


def test_what_all_implementations_lack_is_said_once(capfd):
    code, out, _ = command(capfd, f"{BLOCK} --ep 16 --max-tokens 16 --tokens 32")
    text = " ".join(out.split())
    assert code == 1 and "one change each would be legal with at most 32 tokens declared or T at most 16 imp" in text
    assert (
        text.count("[deployment.max_tokens] deployment: T is 32") == 1 and "none is legal [deployment.max_tok" in text
    )
    assert "not mc2" not in text
    asked = command(capfd, f"{BLOCK} --ep 16 --max-tokens 16 --tokens 32 --comm mc2")[1]
    assert "not mc2 " in asked and "none is legal  " not in asked, "the one that was asked for has its rules by itself"
    several = command(capfd, f"{BLOCK} --ep 16 --buffer-mb 200 --tokens 600")[1]  # the twin: not all are refused
    assert "none is legal" not in several and "each would" not in several


@pytest.mark.parametrize(("tokens", "said"), [
    (0, "mc2: no one change of the deployment makes it legal at T = 0, nor T 1 alone"),
    (1, "mc2 would be legal with EP 2"),
])  # fmt: skip
def test_no_tokens_and_one_rank_are_two_reasons(capfd, tokens, said):
    assert f" {said} fused_mc2" in " ".join(command(capfd, f"{BLOCK} --tokens {tokens}")[1].split())


def test_a_fused_mode_is_named_by_its_operator(capfd):
    changes = answer(capfd, "qwen3_235b --ep 16 --fused-mode 0")[1]["changes"]["fused_mc2"]
    assert "fused mode 1 (dispatch_ffn_combine, mega_moe)" in [change["text"] for change in changes]


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


DISPATCH = "npu_moe_distribute_dispatch_v2"
# Rules that it may have beside its own, and what its change of tokens is then; 136 is the most by its own.
NOT_MONOTONE = {
    "none": ("value = 'tokens'\nmin = 1", "T at most 136"),
    "a hole": ("value = '(tokens - 40) * (tokens - 40)'\nmin = 100", "T from 50 to 136"),
    "multiples": ("value = 'tokens'\nmultiple_of = 8", "T 136"),
    "not a few": ("value = 'tokens'\nmin = 100", "T from 100 to 136"),
    "a power of two": ("value = 'tokens'\none_of = [2, 64]", "T 64"),
    "nothing": ("value = 'tokens'\nmin = 601", None),
}


@pytest.mark.parametrize(("rule", "said"), NOT_MONOTONE.values(), ids=NOT_MONOTONE)
def test_tokens_are_said_as_far_as_they_were_shown(monkeypatch, rule, said):
    source = next(iter(load_sources()))
    text = f"[[limit]]\ncode = 'toy.tokens'\noperator = '{DISPATCH}'\nsource = '{source}: a toy'\nadvice = 'another T'\n{rule}"
    (toy,), check = read("toy", text), legality.check

    def check_toy_too(operator, soc, quantities, prover, versions):
        broken, known = check(operator, soc, quantities, prover, versions), {**quantities, "soc": soc}
        if operator == DISPATCH and not toy.holds(toy.value(known), known, prover):
            broken.append(Violation(toy.code, operator, "tokens", None, toy.accepted(known), toy.sources))
        return broken

    monkeypatch.setattr(legality, "check", check_toy_too)
    explanation = run_explain(parse(["explain", *BLOCK.split(), "--ep", "16", "--tokens", "600"])).explanation
    changes = [change.text for change in explanation.changes["mc2"] if change.field == "tokens"]
    assert changes == ([] if said is None else [said])


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


@pytest.mark.parametrize("name", ["qwen3_mo", "gpt_os", "mixtra", "glm45", "deepseek_r1"])
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
    assert request.soc == "A5" and "SoC 950 is taken as A5" in assumptions(request)


def test_every_default_that_differs_from_a_deployments_is_said(capfd):
    """Fields of the deployment of a bare command against those of a bare ``Deployment``."""
    explanation = run_explain(parse(["explain", *BLOCK.split()])).explanation
    made, bare = explanation.question.deployment, Deployment()
    differing = {
        field.name
        for field in dataclasses.fields(Deployment)
        if field.compare and getattr(made, field.name) != getattr(bare, field.name)
    }
    said = {"hccl_buffer_mb": f"is {bare.hccl_buffer_mb})", "weight_format": f"default is {bare.weight_format})",
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


@pytest.mark.parametrize(("soc", "built"), [("A3", ", built for A3"), ("A2", "")])
def test_what_is_to_be_installed_is_a_build_for_the_soc(soc, built):
    deployment = Deployment(soc=soc, ep_size=16, ep_rank=0, ep_group="ep", mc2_group="mc2", installed=())
    texts = [change.text for change, _ in candidate_changes._installations(deployment)]
    assert f"vllm_ascend 0.23.0 installed{built}" in texts and "cann_ops_transformer 9.1.0 installed" in texts


def test_experts_without_a_quantisation_are_named_in_words():
    assert ("quantisation", "unquantised (16-bit) experts") in changes_of(
        "qwen3_30b --ep 16 --quant w4a16", "fused_mc2"
    )
