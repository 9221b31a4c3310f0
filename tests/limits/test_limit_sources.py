"""Where rules come from, and what to do about them: every row cites declared documents and has advice, and a reader gets both."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from source_citations import find_unused, read_citations, read_texts

from moe_lowering.limits import LimitsError, check, load
from moe_lowering.limits.row import NOTHING_HELPS, read
from moe_lowering.limits.sources import (
    OWN,
    Citation,
    cite,
    declare_sources,
    load_sources,
    render_citations,
)
from moe_lowering.limits.toml import loads
from moe_lowering.matrix.expected import REFUSALS

ROOT = Path(__file__).parents[2]
FOLDERS = ("moe_lowering", "tests", "provider_tests", "benchmarks", "docs", ".ci")
PRIVATE = re.compile(r"(?<!\w)facts/|\bDESIGN\b|/work/")
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


def test_a_document_that_nothing_cites_is_found() -> None:
    (row,) = read("t.toml", ROW, DECLARED)
    assert find_unused(DECLARED, list(row.sources)) == ["pull.12"]
    assert find_unused(DECLARED, [*row.sources, *cite("pull.12", DECLARED)]) == []


@pytest.mark.parametrize(("text", "keys"), [
    ("Source: lib.guide.", ["lib.guide"]),
    ("It is so. Source: lib.guide: at most 8.\n\nNot lib.old.", ["lib.guide"]),
    ("Sources: lib.guide, lib.old: at\nmost 8; pull.12.", ["lib.guide", "lib.old", "pull.12"]),
    ("Written as ``Source: x``; no source here.", []),
])  # fmt: skip
def test_citations_of_a_docstring(text: str, keys: list[str]) -> None:
    assert [citation.key for citation in read_citations(text, DECLARED)] == keys


@pytest.mark.parametrize("text", ["Source: lib.gide.", "Source: the guide.", "Sources: lib.guide; guide", "Source:"])
def test_a_docstring_that_cites_no_document_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not declared in sources\.toml"):
        read_citations(text, DECLARED)


def test_docstrings_and_comments_are_read() -> None:
    code = '"""One."""\n\n# two\n# three\nx = 1  # four\n\n\ndef f():\n    """Five."""\n    return "six"\n'
    assert [text for text in read_texts(code) if text] == ["One.", "Five.", "two\nthree\nfour"]


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


def _files(*endings: str) -> list[Path]:
    files = [ROOT / "README.md", *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.is_file())]
    return [file for file in files if file.suffix in endings and "__pycache__" not in file.parts]


def _cited_in_code() -> list[Citation]:
    cited: list[Citation] = []
    for file in _files(".py"):
        code = file.read_text("utf-8")
        for text in read_texts(code) if "Source" in code else ():
            try:
                cited += read_citations(text, load_sources())
            except ValueError as error:
                raise AssertionError(f"{file.relative_to(ROOT)}: {error}") from None
    return cited


def _cited_in_tables() -> list[Citation]:
    cited: list[Citation] = []
    for file in resources.files("moe_lowering.limits").joinpath("data").iterdir():
        if file.name.endswith(".toml"):
            entries = loads(file.read_text("utf-8"))
            for entry in [*entries.get("limit", ()), *entries.get("absent", ())]:
                cited += cite(entry["source"], load_sources())
    return cited


def _cited_in_facts() -> list[Citation]:
    files = sorted((ROOT / "tests/helpers/limit_facts").glob("*.toml"))
    groups = [group for file in files for group in loads(file.read_text("utf-8"))["group"]]
    return [citation for group in groups for citation in cite(group["source"], load_sources())]


def test_every_citation_is_declared_and_every_document_is_cited() -> None:
    reasons = [citation for refusal in REFUSALS for citation in cite(refusal.why, load_sources())]
    parts = [_cited_in_tables(), _cited_in_code(), _cited_in_facts(), reasons]
    assert all(len(part) > 20 for part in parts)
    assert find_unused(load_sources(), [citation for part in parts for citation in part]) == []


def test_texts_name_nothing_that_is_not_public() -> None:
    files = _files(".py", ".toml", ".md", ".c", ".h", ".cpp", ".sh", "")
    assert len(files) > 300
    named = {str(file.relative_to(ROOT)) for file in files if PRIVATE.search(file.read_text("utf-8"))}
    own = Path(__file__).relative_to(ROOT)
    assert named == {str(own)}
    lines = [line for line in (ROOT / own).read_text("utf-8").splitlines() if PRIVATE.search(line)]
    assert len(lines) == 3, lines  # the pattern, and two rows that the loader must refuse


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
