"""No rule is forgotten for a SoC: a code that an operator has on one has a row or a reason on every other one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from moe_lowering.deployment import Deployment
from moe_lowering.limits import LimitsError, limits_for, load, row, table
from moe_lowering.limits.coverage import Absent, gaps, read_absent
from moe_lowering.limits.row import read
from moe_lowering.limits.sources import cite, load_sources
from moe_lowering.vocabulary import SOCS

NEW = "A9"
ROW = """
[[limit]]
code = "op.tokens"
operator = "op"
soc = {soc}
value = "tokens"
max = 512
source = "here.architecture"
advice = "x"
"""


@pytest.fixture
def new_soc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A SoC that no table knows, as if its name had been added to ``SOCS`` and nothing else."""
    load()  # the tables as they are, for who asks for them meanwhile
    for module in (row, table):
        monkeypatch.setattr(module, "SOCS", (*SOCS, NEW))
    yield


def rules(*texts: str) -> list[Any]:
    return [row for text in texts for row in read("t.toml", text)]


def absent(*socs: str, code: str = "op.tokens", operator: str = "op") -> Absent:
    return Absent(operator, code, socs, cite("here.architecture", load_sources()), "t.toml, absent 1")


def quoted(socs: tuple[str, ...]) -> str:
    return str(list(socs)).replace("'", '"')


def test_the_tables_are_complete() -> None:
    assert load.__wrapped__()


def test_a_new_soc_without_rows_does_not_load(new_soc: None) -> None:
    """Every operator that exists everywhere is named, with its code and the SoC."""
    with pytest.raises(LimitsError) as refused:
        load.__wrapped__()
    text = str(refused.value)
    assert f"npu_grouped_matmul has no rule gmm.x_dtype on {NEW}, as it has on 310P, A2, A3, A5" in text
    operators = {row.operator for row in load() if set(row.soc) == set(SOCS) - {"310P"} and row.value.text != "soc"}
    everywhere = {row.operator for row in load()} - {row.operator for row in load() if row.value.text == "soc"}
    assert all(f"{operator} has no rule" in text for operator in operators & everywhere)


def test_operators_that_are_not_said_to_exist_there_are_refused(new_soc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were all rows given but those on the SoC itself, every implementation that needs operators would still be illegal."""
    monkeypatch.setattr(table, "gaps", lambda *args: [])
    rows = load.__wrapped__()
    for operator in (
        "allgather",
        "alltoall",
        "mc2",
        "npu_moe_distribute_dispatch_v2",
        "dispatch_ffn_combine",
        "mega_moe",
    ):
        (exists,) = [row for row in rows if row.operator == operator and row.value.text == "soc" and not row.when]
        assert NEW not in exists.one_of and NEW in exists.soc, operator


def test_a_deployment_takes_no_other_soc() -> None:
    with pytest.raises(ValueError, match=f"soc is '{NEW}'; accepted: {', '.join(SOCS)}"):
        Deployment(soc=NEW)


@pytest.mark.parametrize("missing", SOCS)
def test_a_gap_is_named(missing: str) -> None:
    others = tuple(soc for soc in SOCS if soc != missing)
    (found,) = gaps(rules(ROW.format(soc=quoted(others))), [], {}, SOCS)
    assert found.startswith(f"op has no rule op.tokens on {missing}, as it has on ")
    assert gaps(rules(ROW.format(soc=quoted(SOCS))), [], {}, SOCS) == []
    assert gaps(rules(ROW.format(soc=quoted(others))), [absent(missing)], {}, SOCS) == []
    assert gaps(rules(ROW.format(soc=quoted(others))), [], {"op": others}, SOCS) == []  # the operator is not there


@pytest.mark.parametrize(("entry", "words"), [
    (absent("A5", code="op.other"), "op has no rule op.other on any SoC"),
    (absent("A5", operator="other"), "other has no rule op.tokens on any SoC"),
    (absent("A3", "A5"), "op has a rule op.tokens on A3"),
])  # fmt: skip
def test_an_entry_that_contradicts_the_rows_is_an_error(entry: Absent, words: str) -> None:
    some = rules(ROW.format(soc='["A2", "A3"]'))
    found = gaps(some, [absent("A5", "310P"), entry], {}, SOCS)
    assert any(words in line for line in found), found
    assert gaps(some, [absent("A5", "310P")], {}, SOCS) == []


def test_an_entry_stands_once() -> None:
    some = rules(ROW.format(soc='["A2", "A3"]'))
    assert any("stands twice for A5" in line for line in gaps(some, [absent("A5", "310P"), absent("A5")], {}, SOCS))


@pytest.mark.parametrize(("change", "words"), [
    ({"soc": ["A7"]}, r"soc is \['A7'\]; accepted: A2, A3, A5, 310P"),
    ({"source": ""}, "none of them empty"),
    ({"codes": []}, "none of them empty"),
    ({"why": "x"}, r"has \['codes', 'operators', 'soc', 'source', 'why'\]"),
    ({"source": "OT: no such rule"}, "'OT' is not declared in sources.toml"),
])  # fmt: skip
def test_a_malformed_entry_is_an_error(change: dict[str, Any], words: str) -> None:
    raw = {"codes": ["op.tokens"], "operators": ["op"], "soc": ["A5"], "source": "here.architecture"}
    assert read_absent("t.toml", [raw], SOCS, load_sources()) == [absent("A5")]
    with pytest.raises(ValueError, match=f"t.toml, absent 1: .*{words}"):
        read_absent("t.toml", [{**raw, **change}], SOCS, load_sources())


def test_every_entry_has_its_reason() -> None:
    """A row on each SoC, or an entry: nothing is left to a default, and entries are few beside rows."""
    assert all(limits_for(row.operator, soc) for row in load() for soc in row.soc)
