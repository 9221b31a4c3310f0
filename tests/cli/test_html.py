"""Pages of ``--html``: sound, self-contained, escaped, and they show what the report says.

An HTML parser and an XML parser for the pictures read them. Where Chromium is installed it reads them too, at 1 and 61 layers,
and must find the same (the name of that test says which of the two it was); the pictures were looked at by a person.
"""

from __future__ import annotations

import dataclasses
import html.parser
import itertools
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moe_lowering import cli
from moe_lowering.cli.html.choice_drawing import draw_choices
from moe_lowering.cli.html.graph_drawing import HEIGHT, ITEM, MEANINGS, draw_graph
from moe_lowering.cli.html.lower_page import lower_page
from moe_lowering.cli.html.page import COLOURS, Markup, element, escape
from moe_lowering.cli.lower.outcome import LowerOutcome
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.report.graphs import GraphNode
from moe_lowering.report.records import BlockReport, LoweringReport
from moe_lowering.vocabulary import IMPLEMENTATION_FORMS

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "br"}


class Sound(html.parser.HTMLParser):
    """Every tag is closed in its order, and nothing refers to the outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base")
        for name, value in attributes:
            assert name not in ("src", "href", "action", "data") and not name.startswith("on"), (tag, name)
            assert "url(" not in value and (name == "xmlns" or "//" not in value), (tag, name, value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        else:
            self.texts.append(data)


def read(page: str) -> Sound:
    assert page.startswith("<!DOCTYPE html>\n") and page.count("<html") == 1
    parser = Sound()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


def pictures(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]


def boxes(picture):
    """(x, y, width, height) of the rectangles of a picture."""
    found = picture.iter(f"{SVG}rect")
    return [tuple(float(rect.get(name)) for name in ("x", "y", "width", "height")) for rect in found]


def written(capfd, tmp_path, *given):
    """(exit code, the page, JSON) of a command."""
    path = tmp_path / "page.html"
    code = cli.main([*given, "--html", str(path), "--json"])
    out, err = capfd.readouterr()
    assert f"moe-lowering: wrote {path} ({path.stat().st_size // 1000} KB)\n" in err
    return code, path.read_text(), json.loads(out)


def test_lower(capfd, tmp_path):
    given = ("lower", "moe", "--fake", "--layers", "2", "--ep", "16", "--tokens", "64", "--comm", "mc2")
    code, page, found = written(capfd, tmp_path, *given)
    parser = read(page)
    assert code == 0
    text = " ".join(parser.texts)
    assert "layers.{0-1}" in text and "mc2 was asked for and is legal" in text
    strip, before, after, choices = pictures(page)
    assert len(boxes(strip)) == 2
    assert [node.text for node in before.iter(f"{SVG}text")] == ["dispatch", "grouped_mlp", "combine"]
    operators = [name.rpartition(".")[2] for name in found["blocks"][1]["ops_after"]]
    assert sorted(node.text for node in after.iter(f"{SVG}text")) == sorted(operators)
    assert all(meaning in text for meaning in MEANINGS), "what the colours of boxes mean"
    assert {rect.get("fill") for rect in choices.iter(f"{SVG}rect")} <= set(COLOURS.values())


def test_what_is_refused_stands_on_the_page(capfd, tmp_path):
    code, page, found = written(
        capfd, tmp_path, "lower", "moe", "--fake", "--layers", "1", "--ep", "16", "--tokens", "600", "--comm", "mc2"
    )
    text = " ".join(read(page).texts)
    assert code == 1 and "left as it was" in text and "as it was" in text
    for violation in found["blocks"][0]["verdicts"]["mc2"]["violations"]:
        assert f"[{violation['code']}]" in text and violation["message"] in text


def test_explain(capfd, tmp_path):
    code, page, found = written(capfd, tmp_path, "explain", "qwen3_235b", "--ep", "16", "--tokens", "600")
    text = " ".join(read(page).texts)
    assert code == 0 and found["reason"] in text
    assert all(change["text"] in text for changes in found["changes"].values() for change in changes)
    assert all(assumption in text for assumption in found["assumptions"])
    (picture,) = pictures(page)
    assert len([node for node in picture.iter(f"{SVG}text") if node.text.startswith("EP ")]) == 7


def test_a_table_has_a_field_for_each_row_and_says_what_sets_each_boundary(capfd, tmp_path):
    _, page, found = written(
        capfd, tmp_path, "explain", "qwen3_235b", "--soc", "A2,A3", "--ep", "16,64", "--tokens", "1..700"
    )
    text = " ".join(read(page).texts)
    drawn = pictures(page)
    assert len(drawn) == 2 and sum(len(boxes(picture)) for picture in drawn) == len(found["rows"])
    for row in found["rows"]:
        assert all(f"[{code}] {why}" in text for code, why in zip(row["boundary"], row["because"], strict=True))
    assert "EP 64, T 1: allgather ends because of [cost] at 1 token allgather (" in text
    scrolled = '<div class="wide">'  # by themselves, in a narrow window
    assert page.count(f"{scrolled}<table") == page.count("<table") == 1
    assert page.count(f"{scrolled}<svg") == len(drawn)
    for picture in drawn:
        lines: dict[float, list[tuple[float, float]]] = {}
        for x, y, width, _ in boxes(picture):
            lines.setdefault(y, []).append((x, x + width))
        for fields in lines.values():
            assert all(a[1] <= b[0] + 0.2 for a, b in itertools.pairwise(fields)), "in order, none over another"


# ------------------------------------------------------------------------------------------------------------- drawings


def test_a_graph_has_each_node_below_what_it_reads_and_none_over_another():
    nodes = [
        GraphNode("a", "npu.first", ("outside",)), GraphNode("a0", ITEM, ("a",)), GraphNode("a1", ITEM, ("a",)),
        GraphNode("b", "aten.left", ("a0",)), GraphNode("c", "aten.right", ("a1", "a0")),
        GraphNode("d", "_c10d_functional.all_to_all_single", ("b", "c", "a")),
    ]  # fmt: skip
    picture = ElementTree.fromstring(draw_graph(nodes))
    labels = [node.text for node in picture.iter(f"{SVG}text")]
    assert labels == ["first", "left", "right", "all_to_all_single"], "outputs of an operator are part of it"
    places = dict(zip(labels, boxes(picture), strict=True))
    assert places["first"][1] < places["left"][1] == places["right"][1] < places["all_to_all_single"][1]
    assert places["left"][0] + places["left"][2] < places["right"][0]
    assert len(list(picture.iter(f"{SVG}path"))) == 5, "a to b, a to c once, and three to d"
    width, height = (float(picture.get(name)) for name in ("width", "height"))
    assert all(x >= 0 and x + w <= width and y + h <= height and h == HEIGHT for x, y, w, h in places.values())
    crossed = [path.get("d").count("C") for path in picture.iter(f"{SVG}path")]
    assert sorted(crossed) == [1, 1, 1, 1, 2], "from a to d through a lane in the row of b and c"
    for path in picture.iter(f"{SVG}path"):
        for x, y in re.findall(r"L([\d.]+),([\d.]+)", path.get("d")):
            assert not any(
                left < float(x) < left + w and top < float(y) < top + h for left, top, w, h in boxes(picture)
            )
    (lane,) = (path.get("d") for path in picture.iter(f"{SVG}path") if path.get("d").count("C") == 2)
    crossing = float(re.findall(r"L([\d.]+),", lane)[1])
    assert all(not left <= crossing <= left + w for left, top, w, _ in places.values() if top == places["left"][1])
    assert next(node.text for node in picture.iter(f"{SVG}title")) == "%a = npu.first(%outside)"
    assert "no nodes" in draw_graph([])


def test_a_row_stands_in_the_order_of_what_it_reads():
    nodes = [GraphNode("p", "npu.p", ()), GraphNode("q", "npu.q", ()), GraphNode("c", "npu.reads_q", ("q",)),
             GraphNode("d", "npu.reads_p", ("p",))]  # fmt: skip
    picture = ElementTree.fromstring(draw_graph(nodes))
    places = dict(zip((node.text for node in picture.iter(f"{SVG}text")), boxes(picture), strict=True))
    assert places["p"][0] < places["q"][0] and places["reads_p"][0] < places["reads_q"][0], "no edges cross"


def report_of(layers: int, comm: str | None = "mc2") -> LoweringReport:
    nodes = (GraphNode("x", "npu.x", ()),)
    block = BlockReport("", comm, "a reason", ("x",), ("x",), {}, nodes_before=nodes, nodes_after=nodes)
    blocks = [dataclasses.replace(block, name=f"model.layers.{at}.mlp") for at in range(layers)]
    return LoweringReport(tuple(blocks), (), 10, 10, 1.0)


@pytest.mark.parametrize("layers", [1, 61])
def test_equal_layers_are_drawn_once(layers):
    page = lower_page(LowerOutcome(LowerRequest("moe"), "moe", [report_of(layers)], [], None, []), ())
    read(page)
    strip, *graphs = pictures(page)
    assert len(boxes(strip)) == layers and len(graphs) == 2
    assert (f" x{layers}" in page) == (layers > 1) and len(page) < 20_000
    other = dataclasses.replace(report_of(layers).blocks[0], name="other", comm="alltoall")
    report = dataclasses.replace(report_of(layers), blocks=(*report_of(layers).blocks, other))
    two = lower_page(LowerOutcome(LowerRequest("moe"), "moe", [report], [], None, []), ())
    assert len(pictures(two)) == 5, "the twin: another kind of block is drawn by itself"


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SCREEN = (1280, 2400)


def opened(browser: str, page: str, folder: Path) -> tuple[str, bytes]:
    """(the document, a picture of it as PNG), as a browser has it."""
    (folder / "page.html").write_text(page)
    options = (
        "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars --dump-dom"
    )
    command = [
        *(browser, *options.split(), f"--user-data-dir={folder / 'profile'}", f"--screenshot={folder / 'page.png'}"),
        *(f"--window-size={SCREEN[0]},{SCREEN[1]}", (folder / "page.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, (folder / "page.png").read_bytes()


def blank_page() -> str:
    return "<!DOCTYPE html>\n<html><head><title>t</title></head><body></body></html>\n"


@pytest.mark.parametrize("browser", [BROWSER], ids=["by Chromium" if BROWSER else "by the parsers alone"])
def test_a_page_is_read_as_it_was_written(browser, tmp_path):
    nothing = b"" if browser is None else opened(browser, blank_page(), tmp_path)[1]
    for layers in (1, 61):
        page = lower_page(LowerOutcome(LowerRequest("moe"), "moe", [report_of(layers)], [], None, []), ())
        document, picture = page, None
        if browser is not None:
            document, picture = opened(browser, page, tmp_path)
        seen = read(document if document.startswith("<!DOCTYPE html>\n") else document.replace(">", ">\n", 1))
        tags = [tag for tag in seen.tags if tag != "tbody"]  # a browser adds it
        assert tags == read(page).tags and "".join(seen.texts).split() == "".join(read(page).texts).split()
        assert [len(boxes(each)) for each in pictures(document)] == [layers, 1, 1]
        if picture is not None:
            assert picture.startswith(b"\x89PNG") and struct.unpack(">II", picture[16:24]) == SCREEN
            assert len(picture) > 1.5 * len(nothing), "the twin: a page with nothing on it is a smaller picture"


def test_everything_is_escaped():
    assert escape("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;" and escape(Markup("<b>")) == "<b>"
    assert element("a", "<", title='"') == '<a title="&quot;">&lt;</a>'
    report = dataclasses.replace(report_of(1), unrecognised=(("<script>alert(1)</script>", "<img src=x>"),))
    parser = read(lower_page(LowerOutcome(LowerRequest("moe"), "<i>", [report], [("m", "<u>")], None, []), ()))
    assert "<script>alert(1)</script>: <img src=x>" in "".join(parser.texts)


def test_each_implementation_has_a_colour_of_its_own():
    assert set(COLOURS) == {*IMPLEMENTATION_FORMS, None} and len(set(COLOURS.values())) == len(COLOURS)
    assert draw_choices  # its fields take them by name


@pytest.mark.parametrize("command", [["lower", "moe"], ["explain", "moe"]])
@pytest.mark.parametrize("where", ["", "missing/page.html"])
def test_a_file_that_cannot_be_is_refused_before_anything_starts(capfd, tmp_path, command, where):
    assert cli.main([*command, "--html", str(tmp_path / where)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "argument --html: is " in err and "accepted: a file in a folder that exists" in err
    assert not list(tmp_path.iterdir())
