"""HTML as text: elements with their text escaped, tables, lists, bars, colours, and a document that loads nothing."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from moe_lowering.vocabulary import IMPLEMENTATION_FORMS

# Dark enough for white text, and apart for who sees few colours.
PALETTE = ("#4477aa", "#117733", "#882255", "#aa4400", "#332288", "#66600f", "#993399", "#0f6066")
COLOURS: dict[str | None, str] = {None: "#777777", **dict(zip(IMPLEMENTATION_FORMS, PALETTE, strict=False))}
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;padding:16px 24px;max-width:1180px;color:#1a1a1a;background:#fff}
h1{font-size:22px}h2{font-size:17px;margin-top:28px;border-bottom:1px solid #ccc}h3{font-size:15px}
table{border-collapse:collapse;margin:8px 0;font-size:13px}th,td{border:1px solid #ccc;padding:3px 8px;text-align:left;
vertical-align:top}td.number{text-align:right;white-space:nowrap}th{background:#f2f2f2}code{font-size:12px;overflow-wrap:anywhere}
td ul{margin:0;padding-left:16px}td p{margin:0 0 4px}
.wide{overflow-x:auto}.wide>svg{min-width:720px}@media(max-width:600px){.sides{flex-direction:column}}
.sides{display:flex;gap:24px;align-items:flex-start}.sides>div{flex:1;min-width:0}svg{max-width:100%;height:auto}
.key{display:inline-block;width:12px;height:12px;margin:0 4px 0 12px;vertical-align:-1px}.bar{display:block;height:5px;
background:#4477aa;margin-top:2px}ul{padding-left:20px}.note{color:#555;font-size:13px}h3 code,h4 code{font-size:1em}
"""


class Markup(str):
    """Text that is HTML already; any other is escaped where it is put in."""


def escape(value: object) -> Markup:
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def element(name: str, *children: object, **attributes: object) -> Markup:
    """An element; ``class_`` stands for class, an underscore within a name for a dash, and None for no attribute."""
    attribute_text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{attribute_text}>{''.join(map(escape, children))}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    return Markup("\n".join(map(escape, parts)))


def table(titles: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table; numbers stand at the right of their cells. In a window that is too narrow for it, it is scrolled by itself."""
    head = element("tr", *(element("th", title) for title in titles))
    return wide(element("table", head, *(element("tr", *map(_cell, row)) for row in rows)))


def wide(content: object) -> Markup:
    """What keeps its width in a narrow window: it is scrolled, the page is not."""
    return element("div", content, class_="wide")


def _cell(value: object) -> Markup:
    is_number = isinstance(value, (int, float)) or (isinstance(value, str) and value[:1].isdigit())
    return element("td", f"{value:,}" if isinstance(value, int) else value, class_="number" if is_number else None)


def items(texts: Iterable[object]) -> Markup:
    """A list; empty without texts."""
    entries = [element("li", text) for text in texts]
    return element("ul", *entries) if entries else Markup()


def bar(value: float, most: float) -> Markup:
    """A bar of a length that compares with others."""
    share = 100 * value / most if most > 0 else 0.0
    return element("span", class_="bar", style=f"width:{share:.1f}%")


def key(names: Iterable[str | None]) -> Markup:
    """What the colours stand for."""
    marks = (
        join((element("span", class_="key", style=f"background:{COLOURS[name]}"), name or "none legal"))
        for name in names
    )
    return element("p", *marks)


def page(title: str, parts: Iterable[object]) -> str:
    """The whole file."""
    head = element(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width">'),
        element("title", title),
        Markup(f"<style>{STYLE}</style>"),
    )
    body = element("body", element("h1", title), *parts)
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
