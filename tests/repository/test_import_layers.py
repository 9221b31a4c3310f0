"""Which part of the package imports which: the table and the picture of docs/architecture.md, no more and no less, and no circle.

A part is a folder or a file of ``moe_lowering``. Imports within functions count; those for type checkers (``if TYPE_CHECKING``)
do not, and neither do the lazy public names of ``moe_lowering/__init__.py``, which nothing in the package may use.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "moe_lowering"
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
    for path in (ROOT / PACKAGE).rglob("*.py")
}


def statements(node):
    """Every import statement under a node that is executed."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from statements(child)


@functools.cache
def imports(text):
    """(module, name of it, or "") of everything that a source imports."""
    found = []
    for statement in statements(ast.parse(text)):
        assert not getattr(statement, "level", 0), f"a relative import: {ast.unparse(statement)}"
        for alias in statement.names:
            whole = isinstance(statement, ast.Import)
            found.append((alias.name, "") if whole else (statement.module, alias.name))
    return found


def module_graph(sources):
    """Which modules import which; a name that is a module is that one, and any other its module's."""
    graph = {}
    for importer, text in sources.items():
        targets = {f"{module}.{name}" if f"{module}.{name}" in sources else module for module, name in imports(text)}
        graph[importer] = (targets & sources.keys()) - {importer}
    return graph


def part(module):
    return module.split(".")[1] if "." in module else "__init__"


def arrows(sources):
    """(part, part that it imports): an example."""
    graph = module_graph(sources)
    return {
        (part(a), part(b)): f"{a} imports {b}" for a in sorted(graph) for b in sorted(graph[a]) if part(a) != part(b)
    }


def circle(sources):
    try:
        graphlib.TopologicalSorter(module_graph(sources)).prepare()
    except graphlib.CycleError as error:
        return " -> ".join(error.args[1])
    return ""


def table():
    """(the parts on the ground; parts above it from the top floor down, each with the parts above the ground that it imports)."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## What may import what")[1].split("\n## ")[0]
    rows = [
        re.findall(r"`(\w+)`", cell) for cell in re.findall(r"^\| (.+) \| (.+) \|$", section, re.M)[1:] for cell in cell
    ]
    ground, above = rows[-2], rows[:-2]
    return set(ground), {name: set(may) for (name,), may in zip(above[::2], above[1::2], strict=True)}


def differences(sources):
    """What the table does not say of the imports, or says and is not so."""
    ground, above = table()
    floors = list(above)
    found = []
    real = arrows(sources)
    for (a, b), example in real.items():
        if b not in ground and (a in ground or b not in above.get(a, ())):
            found.append(f"{example}: not in the table")
    for a, may in above.items():
        found += [f"{a} imports {b}, says the table, and no module does" for b in sorted(may) if (a, b) not in real]
        found += [f"{a} imports {b}: upwards" for b in sorted(may & above.keys()) if floors.index(b) <= floors.index(a)]
    parts = {part(module) for module in sources} - {"__init__"}
    return found + [f"{name}: in one of the table and the package" for name in sorted(parts ^ ground ^ above.keys())]


def picture():
    """(the parts of the picture, the arrows of the picture), of the first mermaid block."""
    text = (ROOT / "docs" / "architecture.md").read_text().split("```mermaid\n")[1].split("```")[0]
    lines = [line.strip() for line in text.splitlines()[1:]]
    drawn = set()
    for line in lines:
        start, arrow, ends = line.partition(" --> ")
        if arrow:
            drawn |= {(start, end) for end in ends.split(" & ")}
        else:
            assert re.fullmatch(r'\w+\["[^"]+"\]', line), f"neither an arrow nor the label of a part: {line}"
    labelled = {line.split("[")[0] for line in lines if " --> " not in line}
    return labelled | {name for ends in drawn for name in ends}, drawn


def direct_arrows(sources):
    """The arrows above the ground that do not follow from others: the transitive reduction, which is unique without circles."""
    ground, _ = table()
    below = {}
    for a, b in arrows(sources):
        if not {a, b} & (ground | {"__init__"}):
            below.setdefault(a, set()).add(b)

    def reached_from(start):
        """All parts below one, also where parts import each other in a circle."""
        reached, waiting = set(), [start]
        while waiting:
            next_parts = below.get(waiting.pop(), set()) - reached
            reached |= next_parts
            waiting += next_parts
        return reached

    reached = {name: reached_from(name) for name in below}
    return {(a, b) for a, bs in below.items() for b in bs if not any(b in reached.get(c, ()) for c in bs - {b})}


def picture_differences(sources):
    """What the picture shows and the imports are not, and the reverse; parts on the ground are not in it."""
    ground, _ = table()
    names, drawn = picture()
    real = direct_arrows(sources)
    parts = {part(module) for module in sources} - {"__init__"} - ground
    return [
        *(f"the picture lacks {a} --> {b}" for a, b in sorted(real - drawn)),
        *(f"the picture has {a} --> {b}, which is no import, or follows from others" for a, b in sorted(drawn - real)),
        *(f"{name}: in one of the picture and the package" for name in sorted(names ^ parts)),
    ]


def new(sources):
    """The differences that the package as it is does not have."""
    return [difference for difference in differences(sources) if difference not in differences(SOURCES)]


def test_nothing_imports_in_a_circle():
    assert circle(SOURCES) == ""


def test_the_table_is_what_the_imports_are():
    assert differences(SOURCES) == []


def test_the_picture_is_what_the_imports_are():
    assert picture_differences(SOURCES) == []


def test_the_lazy_names_are_for_users():
    assert [a for a, found in module_graph(SOURCES).items() if PACKAGE in found] == []


def test_what_reads_and_edits_graphs_knows_nothing_of_layers():
    graph = f"{PACKAGE}.passes.graph"
    found = {b for a, used in module_graph(SOURCES).items() if a.startswith(graph) for b in used}
    assert found
    assert [b for b in found if b.startswith(f"{PACKAGE}.passes") and not b.startswith(graph)] == []


def test_who_uses_the_simulator_and_what_it_uses():
    """Beside the table, which could be changed in passing."""
    real = arrows(SOURCES)
    ground, _ = table()
    assert {a for a, b in real if b == "simulator"} == {"testing", "matrix", "cli"}
    assert {b for a, b in real if a == "simulator"} - ground == {"limits"}


@pytest.mark.parametrize(("text", "says"), [
    ("from toy import b", "toy.a -> toy.b -> toy.a"),
    ("import toy.b", "toy.a -> toy.b -> toy.a"),
    ("def f():\n    from toy.b import name", "toy.a -> toy.b -> toy.a"),
    ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import toy.b", ""),
    ("'import toy.b'", ""),
])  # fmt: skip
def test_a_circle_is_seen(text, says):
    found = circle({"toy": "", "toy.a": text, "toy.b": "from toy.a import name"})
    assert sorted(found.split(" -> ")[1:]) == sorted(says.split(" -> ")[1:])


@pytest.mark.parametrize(("module", "text", "says"), [
    ("moe_lowering.limits", "def f():\n    from moe_lowering.passes import blocks", "not in the table"),
    ("moe_lowering.simulator", "import moe_lowering.passes.pipeline", "not in the table"),
    ("moe_lowering.vocabulary", "from moe_lowering.deployment import Deployment", "not in the table"),
    ("moe_lowering.upstairs", "", "upstairs: in one of the table and the package"),
])  # fmt: skip
def test_an_arrow_that_the_table_does_not_have_is_seen(module, text, says):
    (found,) = new({**SOURCES, module: f"{SOURCES.get(module, '')}\n{text}"})
    assert says in found


def test_an_arrow_that_only_the_table_has_is_seen():
    assert new({**SOURCES, "moe_lowering.matrix.runner": ""}) == [
        "matrix imports testing, says the table, and no module does"
    ]


@pytest.mark.parametrize(("module", "text", "says"), [
    ("moe_lowering.custom_ops", "import moe_lowering.simulator", ["the picture lacks custom_ops --> simulator"]),
    ("moe_lowering.limits", "import moe_lowering.simulator", ["the picture lacks limits --> simulator"]),
    ("moe_lowering.limits", "from moe_lowering.providers import Package", ["the picture lacks limits --> providers"]),
    ("moe_lowering.matrix.runner", "from moe_lowering.limits import check", []),
    ("moe_lowering.limits", "from moe_lowering.vocabulary import SOCS", []),
    ("moe_lowering.upstairs", "", ["upstairs: in one of the picture and the package"]),
])  # fmt: skip
def test_what_the_picture_does_not_have_is_seen(module, text, says):
    """An arrow that follows from others, or ends on the ground, is not drawn."""
    differences = picture_differences({**SOURCES, module: f"{SOURCES.get(module, '')}\n{text}"})
    assert [line for line in differences if "lacks" in line or "in one of" in line] == says


def test_what_only_the_picture_has_is_seen():
    assert picture_differences({**SOURCES, "moe_lowering.experts": ""}) == [
        "the picture has experts --> layers, which is no import, or follows from others"
    ]
