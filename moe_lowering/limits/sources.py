"""Citations: ``sources.toml`` declares every document that a rule rests on once; rows, docstrings and tests cite it by key.

A key is ``collection.document``, e.g. ``op_plugin.grouped_matmul``: the collection gives title, version and link, the document
its path. A citation is ``KEY`` or ``KEY: note``, or several keys with one note: ``KEY, KEY: note``. The note says where in the
document it stands, or what it says. A docstring or comment has ``Source: `` or ``Sources: `` before citations, up to the end
of its paragraph, with ``; `` between them. ``here`` is this repository: its documents are the proof of a rule that this project
derived or measured itself, and have no link.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from moe_lowering.limits.toml import loads

FILE = "sources.toml"
OWN = "here"  # the collection of this repository's own files
COLLECTION = frozenset({"title", "version", "link", "documents"})
DOCUMENT = frozenset({"version", "link", "path"})  # what a document may say otherwise than its collection
_KEY = re.compile(r"[a-z0-9_]+\.[a-z0-9_]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")  # ten digits of it are enough to read
_NOT_PUBLIC = re.compile(r"\bfacts/|\bDESIGN\b")


@dataclasses.dataclass(frozen=True)
class Citation:
    """One document, in one version, and where in it or what of it is meant (``note``).

    ``link`` leads to the document; it is empty for files of this repository, whose ``path`` begins at its root.
    """

    key: str
    title: str
    version: str
    link: str
    path: str
    note: str = ""

    @property
    def document(self) -> str:
        """Title, version and path, e.g. ``op-plugin, torch_npu documentation (04f78679), docs/.../x.md``."""
        version = f" ({self.version[:10] if _COMMIT.fullmatch(self.version) else self.version})" if self.version else ""
        return f"{self.title}{version}" if self.path in self.title else f"{self.title}{version}, {self.path}"


def render_citations(citations: Iterable[Citation]) -> str:
    """Citations as one line of text; documents with the same note share it."""
    parts = []
    for note, alike in itertools.groupby(citations, key=lambda citation: citation.note):
        documents = " and ".join(citation.document for citation in alike)
        parts.append(f"{documents}: {note}" if note else documents)
    return "; ".join(parts)


def declare_sources(name: str, text: str) -> dict[str, Citation]:
    """The documents that a file declares, by key, each as a citation without a note.

    Raises:
        ValueError: a collection or document lacks a field, or has one that is unknown or empty; the message names it.
    """
    declared: dict[str, Citation] = {}
    for collection, raw in loads(text).items():
        where = f"{name}, {collection}"
        if not isinstance(raw, dict) or not {"title", "documents"} <= raw.keys() <= COLLECTION or not all(raw.values()):
            entry = sorted(raw) if isinstance(raw, dict) else raw
            raise ValueError(f"{where}: has {entry}; accepted: title, documents, link, version, none of them empty")
        for document, value in raw["documents"].items():
            citation = _declare_document(f"{collection}.{document}", raw, value, where)
            declared[citation.key] = citation
    return declared


def _declare_document(key: str, collection: dict[str, Any], value: Any, where: str) -> Citation:
    """The document of one key; ``value`` is its path, or a table of ``DOCUMENT`` with its path.

    Raises:
        ValueError: the key is not lower case, the table is malformed, or link or version is missing.
    """
    own = {"path": value} if isinstance(value, str) else value
    if not _KEY.fullmatch(key) or not {"path"} <= own.keys() <= DOCUMENT or not all(own.values()):
        raise ValueError(f"{where}: document {key} is {value!r}; accepted: a path, or a table of {sorted(DOCUMENT)}")
    fields = {**collection, **own}
    version, path = fields.get("version", ""), fields["path"]
    if not (version and fields.get("link")) and not key.startswith(f"{OWN}."):
        raise ValueError(f"{where}: document {key} has no link or no version; only files of {OWN!r} need none")
    return Citation(
        key=key,
        title=fields["title"].format(version=version, path=path),
        version=version,
        link=fields.get("link", "").format(version=version, path=path),
        path=path,
    )


def cite(raw: Any, declared: Mapping[str, Citation]) -> tuple[Citation, ...]:
    """The citations of a row's ``source``: a text, or a list of texts.

    Raises:
        ValueError: a text cites no key, a key that is not declared, or names a file that is not public.
    """
    citations: list[Citation] = []
    for text in [raw] if isinstance(raw, str) else raw:
        keys, _, note = text.partition(": ")
        if private := _NOT_PUBLIC.search(text):
            raise ValueError(f"source {text!r} names {private.group()}, which is not public")
        for key in keys.split(", "):
            if key not in declared:
                raise ValueError(
                    f"source {text!r}: {key!r} is not declared in {FILE}; accepted: KEY, or KEY: note "
                    "(docs/adding.md, A limit, step 2: declare the document)"
                )
            citations.append(dataclasses.replace(declared[key], note=note))
    return tuple(citations)


@functools.lru_cache(maxsize=1)
def load_sources() -> dict[str, Citation]:
    """All documents of ``sources.toml``, by key.

    Raises:
        ValueError: as ``declare_sources``.
    """
    return declare_sources(FILE, resources.files("moe_lowering.limits").joinpath(FILE).read_text("utf-8"))
