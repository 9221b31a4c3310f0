"""The report as text: width, grouping of equal blocks, and what a refused block shows."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import sympy

import moe_lowering
from moe_lowering.limits import Citation, TokenRange, Violation
from moe_lowering.limits.violations import BufferNeed
from moe_lowering.limits.wording import Accepted, Bound
from moe_lowering.prices.rows import Row
from moe_lowering.report.deployment_text import deployment_text
from moe_lowering.report.graphs import GraphNode
from moe_lowering.report.module_names import names
from moe_lowering.report.records import BlockReport, LoweringReport, Verdict
from moe_lowering.report.text import distinct, missing_values, render
from moe_lowering.report.width import WIDTH
from moe_lowering.source_lines import SourceLine

OPS = ("moe_lowering.dispatch", "moe_lowering.grouped_mlp", "moe_lowering.combine")


WORDS, FLAG = Accepted(one_of=("bfloat16",)), Accepted(one_of=(False,))
SMALL = Accepted(min=Bound(1, "1"), max=Bound(3, "3"))
RANGE = Accepted(min=Bound(1024, "1024"), max=Bound(8192, "8192"))


def source(title: str) -> tuple[Citation, ...]:
    return (Citation(title, title, "", "", title),)


def violation(code: str = "mc2.hidden", says: str = "", value: int = 64) -> Violation:
    return Violation(code, "mc2", "hidden", value, RANGE, source("a source"), says, "use AllGather")


def block(name: str, comm: str | None = "allgather", violations: tuple[Violation, ...] = (violation(),)) -> BlockReport:
    verdicts = {"allgather": Verdict("allgather"), "mc2": Verdict("mc2", violations)}
    after = ("npu.npu_grouped_matmul",) * 6 if comm else OPS
    return BlockReport(name, comm, "a reason", OPS, after, verdicts)


def report(*blocks: BlockReport, unrecognised: tuple[tuple[str, str], ...] = ()) -> LoweringReport:
    return LoweringReport(blocks, unrecognised, 100, 120, 3.25)


def test_equal_blocks_are_shown_once_with_their_count():
    text = render(report(*(block(f"model.layers.{i}.mlp.experts") for i in range(3, 61))))
    assert text.count("implementation") == 1
    assert "model.layers.{3-60}.mlp.experts  x58" in text
    assert "58 MoE blocks; 100 graph nodes became 120; the pass took 3.2 ms" in text


# Another value of each field that a verdict or a price may depend on; groups' names and what is installed say nothing of it.
OTHER = {
    "soc": "A2", "ep_size": 8, "tp_size": 2, "max_tokens": 32, "min_tokens": 2, "equal_tokens": False, "guards": "forbid",
    "max_rows": 999, "max_output_size": 7, "hccl_buffer_mb": 300, "capture": False, "mode": "ge",
    "unpermute_operator": "finalize_routing", "fused_mode": 2, "mask_is_prefix": True, "mc2_capacity": 32, "mc2_hierarchy": True,
    "shared_expert_ranks": 4, "shared_experts": 2, "ranks_per_node": 4, "measured": (Row("A3", "vector", 1, 0, 1.0),),
    "weight_format": "nz", "cann": "9.1.0", "torch_npu": "2.10.0", "providers": (("vllm_ascend", "0.23.0"),),
    "mc2_group": "",
}  # fmt: skip
SILENT = {"ep_group", "ep_communicator", "installed"}


@pytest.mark.parametrize("name", OTHER)
def test_the_deployment_of_a_report_says_what_verdicts_depend_on(name: str):
    beside = {"equal_tokens": False, "max_tokens": 64} if name == "min_tokens" else {}
    beside |= {"shared_expert_ranks": 4} if name == "shared_experts" else {}
    beside |= {"tp_group": "tp"} if name == "tp_size" else {}
    given = {"ep_size": 16, "ep_group": "ep", "mc2_group": "mc2", "max_tokens": 64} | beside
    base, other = moe_lowering.Deployment(**given), moe_lowering.Deployment(**given | {name: OTHER[name]})
    assert deployment_text(base) != deployment_text(other)
    assert {*OTHER} | SILENT == base.invariant_fields().keys()


@pytest.mark.parametrize(
    "other",
    [
        block("layers.1", comm=None),
        block("layers.1", violations=()),
        block("layers.1", violations=(violation(value=65),)),
    ],
    ids=["comm", "verdict", "message"],
)
def test_blocks_that_differ_are_shown_apart(other: BlockReport):
    assert render(report(block("layers.0"), other)).count("implementation") == 2


def test_a_refused_block_shows_no_operators_after_and_every_violation():
    violations = (violation(), violation("mc2.dtype", "dtype is float32; accepted: bfloat16"))
    text = render(report(block("layers.0", comm=None, violations=violations)))
    assert "NOT LOWERED (a reason)" in text
    assert "after (" not in text
    assert "[mc2.hidden]" in text and "[mc2.dtype]" in text and "(use AllGather; source 1)" in text


def test_a_rule_broken_at_both_ends_of_an_exchange_is_shown_once():
    text = render(report(block("layers.0", violations=(violation(), violation(says="combine: hidden is 64")))))
    assert text.count("[mc2.hidden]") == 1


def test_no_line_is_wider_than_the_report():
    long = " ".join(["word"] * 80)
    text = render(
        report(
            *(block(f"model.layers.{i}.mlp.experts", violations=(violation(says=long),)) for i in (0, 2)),
            unrecognised=(("model.layers.1.mlp", long),),
        )
    )
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "model.layers.{0,2}.mlp.experts" in text and "not recognised" in text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["a.0.b"], "a.0.b"),
        (["a.0.b", "a.1.b", "a.5.b"], "a.{0-1,5}.b"),
        (["a.0.b.0", "a.1.b.1"], "a.0.b.0, a.1.b.1"),
        (["a.0.b", "c.1.b"], "a.0.b, c.1.b"),
        (["a.0", "b"], "a.0, b"),
    ],
)
def test_names_are_joined_when_one_number_varies(given: list[str], shown: str):
    assert names(given) == shown


def test_sources_are_listed_once_each_at_the_end():
    violations = (
        violation(),
        Violation("mc2.dtype", "mc2", "x_dtype", "float32", WORDS, source("another source"), "wrong dtype"),
        Violation("mc2.mode", "mc2", "capture", True, FLAG, source("a source"), "captured"),
    )
    text = render(report(*(block(f"layers.{i}", violations=violations[: i + 2]) for i in range(2))))
    body, listed = text.split("sources of the broken rules\n")
    assert listed.split() == ["source", "1", "a", "source", "source", "2", "another", "source"]
    assert body.count("source 1)") == 3 and body.count("source 2)") == 2
    assert "(use AllGather; source 1)" in body
    assert "sources" not in render(report(block("layers.0", violations=())))


def test_value_and_limit_are_shown_where_the_message_does_not_hold_them():
    said, value_only, neither = (
        Violation("a.b", "mc2", "size", 5, SMALL, source("s"), says) for says in ("", "5 is too much", "too much")
    )
    flag = Violation("a.b", "mc2", "capture", True, FLAG, source("s"), "captured")
    assert [missing_values(v) for v in (said, value_only, neither, flag)] == [
        "",
        "; size is 5; accepted: 1 to 3",
        "; size is 5; accepted: 1 to 3",
        "",
    ]


def test_a_value_and_a_limit_that_the_rules_own_words_have_are_not_said_again():
    most = Accepted(max=Bound(16, "declared"))
    own = "T is {size}, at most {declared}"
    full, other = (
        Violation("a.b", "mc2", "size", 32, limit, source("s"), own, shown=(("size", 32), ("declared", 16)))
        for limit in (most, SMALL)
    )
    assert missing_values(full) == "" and full.fault == "T is 32, at most 16"
    assert missing_values(other) == "; size is 32; accepted: 1 to 3"
    need = BufferNeed(200, 290)
    bytes_, symbolic = (
        Violation("a.c", "mc2", "8 * size", value, most, source("s"), "needs {needed_mb} MB", buffer=need)
        for value in (304087040, sympy.Symbol("T") * 8)
    )
    assert missing_values(bytes_) == "" and bytes_.fault == "needs 290 MB"
    assert missing_values(symbolic) == "; value is 8*T; accepted: at most 16 (declared)"


def test_a_line_of_this_package_is_told_by_its_place_in_it():
    ours = Path(moe_lowering.__file__).parent
    assert str(SourceLine(f"{ours}/functional.py", 93, "route")) == "moe_lowering/functional.py:93 in route"
    assert str(SourceLine(f"{ours}_of_mine/model.py", 1, "f")) == f"{ours}_of_mine/model.py:1 in f"


def test_a_rule_that_several_implementations_break_is_said_once_in_a_block():
    broken = (violation(), violation("mc2.own"))
    verdicts = {"allgather": Verdict("allgather", broken[:1]), "mc2": Verdict("mc2", broken)}
    one = dataclasses.replace(block("layers.0", comm=None), verdicts=verdicts)
    text = " ".join(render(report(one, block("other", comm=None, violations=broken))).split())
    said = "[mc2.hidden] mc2: hidden is 64; accepted: 1024 to 8192 (use AllGather"
    assert text.count(f"not allgather {said}") == 1
    assert text.count("not mc2 [mc2.hidden] as for allgather [mc2.own] mc2: hidden is 64") == 1
    assert text.count(f"not mc2 {said}") == 1, "another block"


def test_a_rule_that_is_broken_twice_is_said_once():
    rules = tuple(violation(code) for code in ("fused.variant", "fused.provider", "fused.tokens", "fused.variant"))
    codes = [rule.code for rule in distinct(Verdict("fused_mc2", rules))]
    assert codes == ["fused.variant", "fused.provider", "fused.tokens"]


def test_a_block_of_a_graph_without_modules_is_placed_by_its_node():
    node = GraphNode("combine", "moe_lowering.combine", ())
    by_node = dataclasses.replace(block("combine"), nodes_before=(node,))
    assert "\nMoE block that ends at graph node combine\n" in render(report(by_node))
    assert "\nlayers.0\n" in render(report(dataclasses.replace(block("layers.0"), nodes_before=(node,)))), (
        "a module's path"
    )


def test_every_label_is_a_line_of_the_page():
    """Of the reports of ``lower`` and ``explain``, as the source has them."""
    top = Path(moe_lowering.__file__).parents[1]
    files = [top / "moe_lowering/report/text.py", *sorted((top / "moe_lowering/cli").glob("[el]*/*.py"))]
    label = re.compile(r'(?:labelled_text|labelled_rows)\(\s*"([a-z][\w -]+)"|^ +\(?"([a-z][a-z ]+)", f?["\w]', re.M)
    labels = {a or b for file in files for a, b in label.findall(file.read_text())}
    rows = [line.split("|")[1] for line in (top / "docs/reports.md").read_text().splitlines() if line.startswith("| `")]
    assert len(labels) > 12 and {each for each in labels if f"`{each}`" not in "".join(rows)} == set()


def test_blocks_of_different_sizes_are_shown_apart_and_the_enforced_range_once():
    checked = dataclasses.replace(
        block("layers.0"), ops_after=("moe_lowering.assert_tokens", "npu.npu_swiglu"), enforced=TokenRange(1, 8)
    )
    same = dataclasses.replace(checked, name="layers.1", ops_after=("npu.npu_swiglu",))
    text = render(report(checked, same))
    assert text.count("implementation") == 1
    assert text.count("moe_lowering.assert_tokens: refuses to run outside of 1 <= T <= 8") == 1
    assert render(report(checked, dataclasses.replace(same, enforced=TokenRange(1, 9)))).count("implementation") == 2


def test_a_report_without_a_graph_says_so():
    text = render(LoweringReport((block("layers.0", comm=None),), (), 0, 0, 0.0))
    assert text.startswith("1 MoE block, judged from the command's options alone")
    assert "graph nodes" not in text
