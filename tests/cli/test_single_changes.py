"""What one change of a deployment, of weights or of T would make legal: which are tried, in which order, how they are said."""

import dataclasses
import re
from pathlib import Path

import pytest
from test_explain import BLOCK, answer, command

from moe_lowering import Deployment
from moe_lowering.cli.commands import parse
from moe_lowering.cli.explain.command import run_explain
from moe_lowering.explanation import candidate_changes
from moe_lowering.explanation.single_changes import single_changes
from moe_lowering.limits import Violation
from moe_lowering.limits.row import read
from moe_lowering.limits.sources import load_sources
from moe_lowering.limits.table import load
from moe_lowering.passes import legality
from moe_lowering.vocabulary import CANN_VERSIONS, SOCS


def test_other_sizes_count_the_ranks_that_hold_routed_experts():
    """Of 6 ranks with 2 of shared experts, 4 hold the 8 routed ones; the twin has none of shared experts."""
    assert candidate_changes.other_sizes(Deployment(ep_size=6, ep_rank=0, ep_group="ep", shared_expert_ranks=2), 8) == [
        4,
        10,
        3,
    ]
    assert candidate_changes.other_sizes(Deployment(ep_size=4, ep_rank=0, ep_group="ep"), 8) == [2, 8, 1]


# What takes least first, as docs/deployment.md says it: a setting, an installation, smaller steps, other weights, ranks, a SoC.
ORDER = (
    "hccl_buffer_mb", "max_tokens", "weight_format", "fused_mode", "unpermute_operator", "capture", "mc2_hierarchy", "providers",
    "installed", "cann", "tokens", "quantisation", "dtype", "ep_size", "soc",
)  # fmt: skip
REFUSALS = [
    f"{BLOCK} --ep 16 --tokens 600",
    f"{BLOCK} --ep 16 --tokens 128 --buffer-mb 200 --provider none --weight-format nd",
    f"{BLOCK} --ep 64 --soc A2 --tokens 0",
    f"{BLOCK} --ep 16 --dtype float32",
    f"{BLOCK} --ep 16 --unequal-tokens --max-tokens 4096",
    f"{BLOCK} --soc 310P --quant w8a8",
    "mixtral_8x7b --ep 4 --fused-mode 0",
    "mixtral_8x7b --ep 4 --unpermute-operator finalize_routing --dtype float16",
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
            # T is to be within it, or it is all that is known of T
            bound = -1 if question.deployment.equal_tokens else 1
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


@pytest.mark.parametrize("soc", SOCS)
def test_other_socs_are_tried_newer_ones_first(soc):
    deployment = Deployment(soc=soc, ep_size=16, ep_rank=0, ep_group="ep", mc2_group="mc2", installed=())
    tried = [SOCS[change.value] for change, _ in candidate_changes._machines(deployment)]
    assert {other.name for other in tried} == SOCS.keys() - {soc}
    newer = [other.generation > SOCS[soc].generation for other in tried]
    assert newer == sorted(newer, reverse=True)
    for here in {"A2", "A5"}:
        found = changes_of(f"qwen3_30b --ep 8 --soc {here}", "fused_mc2")
        assert found == [("soc", "SoC A3, with vllm_ascend built for it")]
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
    (0, "mc2: no single change of the deployment makes it legal at T = 0, a step without tokens"),
    (1, "mc2 would be legal with EP 2"),
])  # fmt: skip
def test_no_tokens_and_one_rank_are_two_reasons(capfd, tokens, said):
    assert f" {said} fused_mc2" in " ".join(command(capfd, f"{BLOCK} --tokens {tokens}")[1].split())


NONE = "fused_mc2: no single change of the deployment makes it legal"


@pytest.mark.parametrize(("given", "said"), [
    ("--soc A2", "fused_mc2 would be legal with SoC A3, with vllm_ascend built for it imp"),  # its wheels are builds for A2
    ("--soc A2 --provider none", f"{NONE} imp"),
    ("--soc A5", "fused_mc2 would be legal with SoC A3, with vllm_ascend built for it imp"),
    ("--soc A5 --provider none", f"{NONE} imp"),
    ("--soc A3 --provider none", "fused_mc2 would be legal with vllm_ascend 0.23.0 installed, built for A3 imp"),
])  # fmt: skip
def test_another_soc_is_said_with_what_it_wants(capfd, given, said):
    assert said in " ".join(command(capfd, f"qwen3_30b --ep 16 {given}")[1].split())
    if "built for it" in said:  # in the table and in JSON as well
        table = " ".join(command(capfd, f"qwen3_30b --ep 16,32 {given}")[1].split())
        assert table.count("SoC A3, with vllm_ascend built for it") == 2


def test_one_token_is_no_change_of_a_step_without_tokens(capfd):
    """Which MC2 would take: who asks about a rank without tokens has none to give it."""
    _, found = answer(capfd, f"{BLOCK} --ep 16 --tokens 0")
    assert found["changes"]["mc2"] == [] and not found["verdicts"]["mc2"]["legal"]
    assert answer(capfd, f"{BLOCK} --ep 16 --tokens 1")[1]["verdicts"]["mc2"]["legal"], "the twin"


def test_a_fused_mode_is_named_by_its_operator(capfd):
    changes = answer(capfd, "qwen3_235b --ep 16 --fused-mode 0")[1]["changes"]["fused_mc2"]
    assert "fused mode 1 (dispatch_ffn_combine, mega_moe)" in [change["text"] for change in changes]


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


@pytest.mark.parametrize(("soc", "built"), [("A3", ", built for A3"), ("A2", "")])
def test_what_is_to_be_installed_is_a_build_for_the_soc(soc, built):
    deployment = Deployment(soc=soc, ep_size=16, ep_rank=0, ep_group="ep", mc2_group="mc2", installed=())
    texts = [change.text for change, _ in candidate_changes._installations(deployment)]
    assert f"vllm_ascend 0.23.0 installed{built}" in texts and "cann_ops_transformer 9.1.0 installed" in texts


def test_experts_without_a_quantisation_are_named_in_words():
    assert ("quantisation", "unquantised (16-bit) experts") in changes_of(
        "qwen3_30b --ep 16 --quant w4a16", "fused_mc2"
    )
