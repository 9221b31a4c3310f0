"""The citations of docstrings and comments: what follows ``Source: `` or ``Sources: ``, up to the end of the paragraph."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping

from moe_lowering.limits.sources import Citation, cite

_PARAGRAPH = re.compile(r"(?<!`)\bSources?:(.*?)(?:\n\s*\n|\Z)", re.DOTALL)


def read_texts(code: str) -> Iterator[str]:
    """The docstrings of a module's source, and its comments, lines that follow each other as one."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    lines: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            if lines and token.start[0] != last + 1:
                yield "\n".join(lines)
                lines = []
            lines.append(token.string.lstrip("# "))
            last = token.start[0]
    yield "\n".join(lines)


def read_citations(text: str, declared: Mapping[str, Citation]) -> list[Citation]:
    """The citations of one docstring or comment.

    Raises:
        ValueError: as ``cite``; so does a source that begins with no key.
    """
    found: list[Citation] = []
    for paragraph in _PARAGRAPH.findall(text):
        for part in " ".join(paragraph.split()).rstrip(".").split("; "):
            found += cite(part, declared)
    return found


def find_unused(declared: Mapping[str, Citation], cited: list[Citation]) -> list[str]:
    """The keys that nothing cites."""
    return sorted(declared.keys() - {citation.key for citation in cited})
