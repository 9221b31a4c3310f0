"""Code and prose of a page in Markdown, as mkdocs tells them apart."""

from __future__ import annotations

import re
import textwrap

FENCE = re.compile(r"^ *```.*?^ *```$", re.S | re.M)
ITEM = re.compile(r"([-*]|\d+\.) ")


def drop_fences(text: str) -> str:
    """Without blocks between three backticks, whose lines are empty then."""
    return FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)


def _are_code(lines: list[str]) -> list[bool]:
    """Of each line whether it is indented code: behind an empty line, by 4 spaces, or 8 in an item of a list."""
    found, in_item, may_begin = [], False, True
    for line in lines:
        indent = len(line) - len(line.lstrip(" "))
        if line.strip() and not indent:
            in_item = bool(ITEM.match(line))
        is_code = bool(line.strip()) and may_begin and indent >= (8 if in_item else 4)
        found.append(is_code)
        may_begin = is_code or not line.strip()
    return found


def drop_code(text: str) -> str:
    """Without fences and indented code, whose lines are empty then."""
    lines = drop_fences(text).split("\n")
    return "\n".join("" if is_code else line for line, is_code in zip(lines, _are_code(lines), strict=True))


def indented_code(text: str) -> dict[int, str]:
    """The text of each block of indented code, by the number of its first line; empty lines inside belong to it."""
    lines = drop_fences(text).split("\n")
    blocks: list[list[int]] = []
    for number, is_code in enumerate(_are_code(lines)):
        if is_code and blocks and not any(lines[each].strip() for each in range(blocks[-1][-1] + 1, number)):
            blocks[-1].append(number)
        elif is_code:
            blocks.append([number])
    return {block[0] + 1: textwrap.dedent("\n".join(lines[block[0] : block[-1] + 1])) + "\n" for block in blocks}
