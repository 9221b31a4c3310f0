"""Where rules come from, and what to do about them: every row cites declared documents and has advice, and a reader gets both."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from moe_lowering.limits import LimitsError, check, load, table
from moe_lowering.limits.row import NOTHING_HELPS, read
from moe_lowering.limits.sources import (
    OWN,
    Citation,
    cite,
    declare_sources,
    find_unused,
    load_sources,
    render_citations,
)

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCES = f"""
[lib]
title = "lib"
version = "{COMMIT}"
link = "https://example.org/lib/blob/{{version}}/{{path}}"
[lib.documents]
guide = "docs/guide.md"
old = {{ path = "old.md", version = "0.9" }}

[pull]
title = "lib pull request #{{path}}"
link = "https://example.org/lib/pull/{{path}}"
[pull.documents]
12 = {{ path = "12", version = "2026-01-02" }}

[here]
title = "moe_lowering"
[here.documents]
proof = "docs/limits.md"
"""
ROW = """
[[limit]]
code = "x.rows"
operator = "op"
value = "rows"
max = 8
source = ["lib.guide, lib.old: at most 8", "here.proof"]
advice = "lower it"
"""
GUIDE = Citation(
    "lib.guide", "lib", COMMIT, f"https://example.org/lib/blob/{COMMIT}/docs/guide.md", "docs/guide.md", "at most 8"
)
DECLARED = declare_sources("s.toml", SOURCES)


# ------------------------------------------------------------------------------------------------------------- the rules


def test_a_row_cites_documents_with_all_their_fields() -> None:
    (row,) = read("t.toml", ROW, DECLARED)
    assert row.sources[0] == GUIDE
    assert [source.key for source in row.sources] == ["lib.guide", "lib.old", "here.proof"]
    assert [source.note for source in row.sources] == ["at most 8", "at most 8", ""]
    assert row.source == (
        "lib (0123456789), docs/guide.md and lib (0.9), old.md: at most 8; moe_lowering, docs/limits.md"
    )


@pytest.mark.parametrize(("old", "new", "message"), [
    ("lib.guide,", "lib.gide,", r"limit 1 \(x.rows\): source .*'lib.gide' is not declared in sources.toml"),
    ('"here.proof"', '"proof"', "'proof' is not declared"),
    ('"here.proof"', '"OT: 8"', "'OT' is not declared"),
    ('"here.proof"', '""', "'' is not declared"),
    ('"here.proof"', '"here.proof: facts/ops.md 1.1"', "names facts/, which is not public"),
    ('"here.proof"', '"here.proof: DESIGN 3"', "names DESIGN, which is not public"),
    ('source = ["lib.guide, lib.old: at most 8", "here.proof"]\n', "", "source is missing"),
    ('["lib.guide, lib.old: at most 8", "here.proof"]', "[]", "source is missing"),
    ('advice = "lower it"\n', "", "advice is ''; accepted: what to change, or 'nothing helps: ' and why"),
    ('"lower it"', '""', "advice is ''"),
    ('"lower it"', '"nothing helps: "', "advice is 'nothing helps:'"),
    ('"lower it"', '"nothing helps"', "advice is 'nothing helps'"),
])  # fmt: skip
def test_a_row_without_a_source_or_advice_is_refused(old: str, new: str, message: str) -> None:
    assert old in ROW
    with pytest.raises(LimitsError, match=message):
        read("t.toml", ROW.replace(old, new), DECLARED)


@pytest.mark.parametrize("advice", ["nothing helps: it is so", "lower it"])
def test_advice_is_what_to_change_or_why_nothing_helps(advice: str) -> None:
    (row,) = read("t.toml", ROW.replace("lower it", advice), DECLARED)
    assert row.advice == advice


@pytest.mark.parametrize(("old", "new", "message"), [
    ('title = "lib"\n', "", r"s.toml, lib: has \['documents', 'link', 'version'\]; accepted: title, documents"),
    ('title = "lib"', 'title = ""', "none of them empty"),
    ('title = "lib"', 'title = "lib"\nname = "x"', "has .*'name'"),
    ('[lib.documents]\nguide = "docs/guide.md"\nold', "[lib.documents]\nGuide = \"docs/guide.md\"\nold", "document lib.Guide is"),
    ('guide = "docs/guide.md"', 'guide = ""', "document lib.guide is"),
    ('old = { path = "old.md", version', 'old = { pth = "old.md", version', "document lib.old is"),
    (f'version = "{COMMIT}"\n', "", "document lib.guide has no link or no version"),
    ('version = "2026-01-02"', 'path_ = "2026-01-02"', "document pull.12 is"),
    (', version = "2026-01-02"', "", "document pull.12 has no link or no version"),
    ('link = "https://example.org/lib/pull/{path}"\n', "", "document pull.12 has no link or no version"),
])  # fmt: skip
def test_a_malformed_declaration_is_refused(old: str, new: str, message: str) -> None:
    assert old in SOURCES and declare_sources("s.toml", SOURCES) == DECLARED
    with pytest.raises(ValueError, match=message):
        declare_sources("s.toml", SOURCES.replace(old, new))


def test_a_document_that_nothing_cites_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = read("t.toml", ROW, DECLARED)
    assert find_unused(DECLARED, row.sources) == ["pull.12"]
    assert find_unused(DECLARED, [*row.sources, *cite("pull.12", DECLARED)]) == []
    one_more = {**load_sources(), "lib.guide": GUIDE}
    monkeypatch.setattr(table, "load_sources", lambda: one_more)
    with pytest.raises(LimitsError, match=r"sources.toml: no row cites lib.guide$"):
        table.load.__wrapped__()


def test_documents_that_say_the_same_share_the_note() -> None:
    assert render_citations(cite(["lib.guide: a", "lib.old: b"], DECLARED)) == (
        "lib (0123456789), docs/guide.md: a; lib (0.9), old.md: b"
    )
    assert render_citations(cite("pull.12: adds it", DECLARED)) == "lib pull request #12 (2026-01-02): adds it"


# ------------------------------------------------------------------------------------------------------------ the tables


def test_every_source_can_be_followed() -> None:
    """A link, with the version in it or in what it leads to; or a file of this repository."""
    for key, document in load_sources().items():
        if key.startswith(f"{OWN}."):
            assert (ROOT / document.path).is_file(), key
        else:
            assert document.link.startswith("https://") and "{" not in document.link, key
            assert document.version, key
            assert "github.com" not in document.link or document.path in document.link, key
    assert all(row.sources and row.advice for row in load())


def test_no_key_stands_for_two_documents() -> None:
    documents = load_sources().values()
    assert len({(d.link, d.version, d.path) for d in documents}) == len(documents)


def test_texts_name_nothing_that_is_not_public() -> None:
    files = [
        file
        for folder in ("data", ".")
        for file in resources.files("moe_lowering.limits").joinpath(folder).iterdir()
        if file.name.endswith(".toml")
    ]
    assert len(files) > 25
    for file in files:
        assert not re.search(r"\bfacts/|\bDESIGN\b|/work/", file.read_text("utf-8")), file.name


def test_nothing_helps_is_rare_and_says_why() -> None:
    rows = [row for row in load() if row.advice.startswith(NOTHING_HELPS.strip(": "))]
    assert 0 < len(rows) < 10
    assert all(len(row.advice) > len(NOTHING_HELPS) + 20 for row in rows)


def test_advice_is_of_the_rule() -> None:
    """One sentence does not serve the whole table: most advice belongs to few codes."""
    codes: dict[str, set[str]] = {}
    for row in load():
        codes.setdefault(row.advice, set()).add(row.code)
    assert len(codes) > 300
    assert max(len(of) for of in codes.values()) <= 40, max(codes.items(), key=lambda item: len(item[1]))


# --------------------------------------------------------------------------------------------------------------- reports


def test_a_violation_has_the_source_as_text_and_as_records() -> None:
    (violation,) = check("npu_moe_distribute_dispatch_v2", "A3", {"tokens": 513, "comm_alg": ""})
    assert "CANN ops-transformer (25923f10b2), mc2/moe_distribute_dispatch_v2/" in violation.source
    told: dict[str, Any] = violation.to_json()
    assert told["source"] == violation.source
    assert [record["key"] for record in told["sources"]] == ["ops_transformer.dispatch_tiling", "op_plugin.dispatch"]
    assert told["sources"][0] == {
        "key": "ops_transformer.dispatch_tiling",
        "title": "CANN ops-transformer",
        "version": "25923f10b21fd69ae1b933994b5bd59a638f2840",
        "link": "https://github.com/libochao-huawei/ops-transformer/blob/25923f10b21fd69ae1b933994b5bd59a638f2840/mc2/"
        "moe_distribute_dispatch_v2/op_host/op_tiling/moe_distribute_dispatch_v2_tiling.cpp",
        "path": "mc2/moe_distribute_dispatch_v2/op_host/op_tiling/moe_distribute_dispatch_v2_tiling.cpp",
        "note": "BS_UPPER_BOUND",
    }
