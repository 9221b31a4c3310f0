"""Pages can be read and followed: short sentences, a first paragraph that says what, for whom and what next, links that lead
somewhere, and words that are explained where they first stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from page_text import drop_code, drop_fences

TOP = Path(__file__).parents[2]
sys.path.insert(0, str(TOP / ".ci"))

import public_names  # noqa: E402

DOCS = sorted((TOP / "docs").glob("*.md"))
PAGES = [TOP / "README.md", TOP / "CONTRIBUTING.md", *DOCS]
MOST_WORDS = 35
MOST_OF_A_ROW = 500  # characters, links among them
# Pages for a reader who is new, and the words of the glossary that they may not use unexplained.
FOR_NEWCOMERS = [TOP / "README.md"] + [
    TOP / "docs" / f"{name}.md"
    for name in (
        *("five_minutes", "install", "use", "examples", "loading", "transformers", "vllm", "torchair", "serving"),
        *("commands", "deployment", "refusals", "reports", "models"),
    )
]
WORDS = ("EP", "MC2", "FusedMC2", "CANN", "npugraph_ex", "GE", "FRACTAL_NZ", "W8A8", "SoC", "NPU", "log2phy")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def _documented():
    """A (b. c) or ``d``: e. F."""


def long_rows(text: str) -> list[str]:
    """Rows of tables that nobody can read: in a terminal, or as a paragraph in one cell."""
    return [line for line in text.splitlines() if line.startswith("|") and len(line) > MOST_OF_A_ROW]


def prose(text: str) -> str:
    """A page without code, comments, tables, headings and directives of the site; what is in backticks is one word."""
    text = re.sub(r"<!--.*?-->", "\n\n", drop_code(text), flags=re.S)
    text = re.sub(r"^(\s*\|.*|#.*|::: .*)$", "\n", text, flags=re.M)
    return re.sub(r"`[^`]*`", "code", text)


def sentences(text: str) -> list[str]:
    """A sentence ends at a full stop, question mark or exclamation mark, and with its paragraph or its item of a list.

    For who reads it, it goes on behind a colon or a semicolon: what a colon introduces ends it only as a list or a block of code.
    A bracket, quotes or bold may close behind the full stop.
    """
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", LINK.sub(r"\1", prose(text)))
    return [
        each
        for paragraph in paragraphs
        for each in re.split(r"(?<=[.!?])[\"')*]*\s+", " ".join(paragraph.split()))
        if each
    ]


def long_sentences(text: str) -> list[str]:
    return [each for each in sentences(text) if len(each.split()) > MOST_WORDS]


def first_paragraph(text: str) -> str:
    return text.split("\n\n", 2)[1]


def anchors(text: str) -> set[str]:
    """The names that headings get, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.+)$", drop_fences(text), re.M)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", LINK.sub(r"\1", head))).strip().lower().replace(" ", "-")
        for head in heads
    }


def broken_links(page: Path, text: str) -> list[str]:
    """Links to files that are not there, or to headings that they have not."""
    broken = []
    for _, target in LINK.findall(re.sub(r"`[^`]*`", "", drop_code(text))):
        name, _, anchor = target.partition("#")
        if name.startswith(("http:", "https:")):
            continue
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(text if file == page else file.read_text())):
            broken.append(target)
    return broken


def unexplained(text: str) -> list[str]:
    """Words whose first place in the prose is no link to the glossary."""
    bare = re.sub(r"^#.*$", "\n", re.sub(r"`[^`]*`", "code", drop_code(text)), flags=re.M)
    missing = []
    for word in WORDS:
        match = re.search(
            rf"(?<![\w/-]){word}s?(?![\w-])", re.sub(r"\]\([^)]*\)", lambda m: "]" + " " * (len(m[0]) - 1), bare)
        )
        if match and not re.match(r"[^\[\]]*\]\((?:docs/)?glossary\.md#", bare[match.start() :]):
            missing.append(word)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_is_long(page):
    assert not long_sentences(page.read_text())


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_the_first_paragraph_says_what_for_whom_and_what_next(page):
    assert says_all(page.read_text())


def says_all(text: str) -> bool:
    match = re.fullmatch(r"\*\*What:\*\* .+\.\s\*\*For:\*\* .+\.\s\*\*Next:\*\* (.+)\.", first_paragraph(text), re.S)
    return match is not None and LINK.search(match[1]) is not None


@pytest.mark.parametrize("page", [*PAGES, TOP / "SECURITY.md", TOP / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not broken_links(page, page.read_text())


@pytest.mark.parametrize("page", FOR_NEWCOMERS, ids=lambda page: page.name)
def test_words_are_explained_where_they_first_stand(page):
    assert not unexplained(page.read_text())


def test_every_page_is_reached_from_the_index():
    index = (TOP / "docs" / "index.md").read_text()
    linked = {target.partition("#")[0] for _, target in LINK.findall(index)}
    assert {page.name for page in DOCS} - {"index.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_row_of_a_table_is_long(page):
    assert not long_rows(page.read_text())


def test_every_public_name_is_a_line_of_the_reference():
    """As it is read on a code host, which knows no directives; they come after all names, for the site."""
    assert public_names.PAGE.read_text() == public_names.page(), "run `make reference`"
    names, _, directives = public_names.PAGE.read_text().partition("## In full")
    assert ":::" not in names.replace("`:::`", "") and directives.count("\n::: ") > 20
    assert "| `moe_lowering.shard_experts` | Give this rank its block of the experts" in names


def test_the_checks_can_fail():
    assert long_rows(f"| {'word ' * 101}|") and not long_rows(f"| {'word ' * 99}|\n{'word ' * 200}")
    assert public_names.first_sentence("x", _documented) == "A (b. c) or `d`: e"
    page = TOP / "docs" / "index.md"
    for end in ",:;":
        assert long_sentences(f"one two{end} " * 18 + "end."), "a reader reads on"
    for end in (".", "?", "!", ".)", '."', ".**"):
        assert not long_sentences(f"one two{end} " * 18 + "end."), end
    half = "word " * 20
    assert long_sentences(half + half) and not long_sentences(half + "`" + half + "`")
    for between in (
        ":\n\n- ",
        ":\n- ",
        ":\n    - ",
        ":\n1. ",
        ":\n\n    code " + half + "\n\n",
        ":\n\n```\n" + half + "\n```\n",
    ):
        assert not long_sentences(half + between + half), between
    for within in ("- {0}\n    {0}", "1. {0}\n    {0}", "1. a\n\n    {0}{0}", "1. a\n\n        code\n\n    {0}{0}"):
        assert long_sentences(within.format(half)), f"what is indented in a list is no code: {within}"
    assert not long_sentences(f"1. a\n\n        {half}{half}"), "but twice"
    assert not long_sentences("| " + "word " * 40 + "|")
    assert not says_all("# T\n\n**What:** a. **For:** b. **Next:** nothing.\n\n")
    assert not says_all("# T\n\nA page.\n\n") and says_all("# T\n\n**What:** a. **For:** b. **Next:** [c](c.md).\n\n")
    assert broken_links(page, "# A b\n[x](no.md) [y](glossary.md#no) [z](#a-b) [w](glossary.md#ep)") == [
        "no.md",
        "glossary.md#no",
    ]
    assert unexplained("An EP group and [CANN](glossary.md#cann), [MC2](ranks.md), CANN") == ["EP", "MC2"]
