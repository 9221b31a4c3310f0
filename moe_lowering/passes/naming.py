"""Symbolic sizes by the names that a user knows: ``input_ids.shape[1]`` in place of dynamo's ``s77``."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

from moe_lowering.limits import Violation
from moe_lowering.report.records import BlockReport, Size, Sizes

# What dynamo calls an argument or what is in it, e.g. L['x'].size()[0], L['n'], L['batch']['n'], L['self']._modules['a'].n
_SOURCE = re.compile(r"^[LG]\['(\w+)'\](.*)$")
_MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['(\w+)'\]")
_PROPERTY = re.compile(r"\.(size|stride)\(\)\[(\d+)\]$")
_KEYWORD = re.compile(r"^kwargs\['(\w+)'\]")  # how transformers' decorators hand on what they were given
_SYMBOL = re.compile(r"\b[a-z]+\d+\b")


def dimension_names(size: Any) -> dict[str, str]:
    """The user's name of each symbol in a size, as far as it comes from a named argument of the model."""
    if not isinstance(size, torch.SymInt):
        return {}
    sources = size.node.shape_env.var_to_sources
    named = {}
    for symbol in size.node.expr.free_symbols:
        found = [_written(str(s.name() if callable(s.name) else s.name)) for s in sources.get(symbol, ())]
        # a view has its base for another source, which the user does not see
        if names := sorted((name for name in found if name), key=lambda name: "._base" in name):
            named[str(symbol)] = names[0]
    return named


def _written(source: str) -> str | None:
    """A source as Python code of the user, None when it is not an argument's."""
    found = _SOURCE.match(source)
    if found is None:
        return None
    argument, path = found.groups()
    path = _MEMBER.sub(lambda m: f"[{m[1]}]" if m[1].isdigit() else f".{m[1]}", path)
    path = _PROPERTY.sub(lambda m: f".shape[{m[2]}]" if m[1] == "size" else f".stride({m[2]})", path)
    return _KEYWORD.sub(r"\1", argument + path)


def in_users_words(report: BlockReport, names: dict[str, str]) -> BlockReport:
    """The report with every symbol of ``names`` in its texts replaced."""
    if not names:
        return report

    def say(text: str) -> str:
        return renamed(text, names)

    verdicts = {
        name: dataclasses.replace(
            verdict,
            violations=_broken_in_words(verdict.violations, names),
            ruled_out=tuple((form, _broken_in_words(broken, names)) for form, broken in verdict.ruled_out),
        )
        for name, verdict in report.verdicts.items()
    }
    notes = tuple(say(note) for note in report.notes)
    sizes = None if report.sizes is None else _sizes_in_words(report.sizes, names)
    return dataclasses.replace(report, reason=say(report.reason), verdicts=verdicts, notes=notes, sizes=sizes)


def _broken_in_words(violations: tuple[Violation, ...], names: dict[str, str]) -> tuple[Violation, ...]:
    return tuple(
        dataclasses.replace(
            violation,
            value=renamed(violation.value, names),
            limit=renamed(violation.limit, names),
            message=renamed(violation.message, names),
            advice=renamed(violation.advice, names),
        )
        for violation in violations
    )


def renamed(text: str, names: dict[str, str]) -> str:
    """The text with every symbol of ``names`` replaced."""
    return _SYMBOL.sub(lambda found: names.get(found.group(), found.group()), text)


def _sizes_in_words(sizes: Sizes, names: dict[str, str]) -> Sizes:
    def say(size: Size) -> Size:
        return size if isinstance(size.value, int) else Size(renamed(size.value, names), size.most)

    return dataclasses.replace(
        sizes,
        tokens=say(sizes.tokens),
        capacity=say(sizes.capacity),
        received=say(sizes.received),
        exchanged=None if sizes.exchanged is None else say(sizes.exchanged),
        windows=tuple(dataclasses.replace(window, needed=say(window.needed)) for window in sizes.windows),
    )
