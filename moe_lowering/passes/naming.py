"""Symbolic sizes by the names that a user knows: ``input_ids.shape[1]`` in place of dynamo's ``s77``."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

from moe_lowering.report.records import BlockReport, Verdict

# What dynamo calls the size of an argument, e.g. L['x'].size()[0].
_SOURCE = re.compile(r"^L\['(\w+)'\](.*)\.size\(\)\[(\d+)\]$")
_SYMBOL = re.compile(r"\b[a-z]+\d+\b")


def dimension_names(size: Any) -> dict[str, str]:
    """The user's name of each symbol in a size, as far as its source is the size of a named argument."""
    if not isinstance(size, torch.SymInt):
        return {}
    sources = size.node.shape_env.var_to_sources
    named = {}
    for symbol in size.node.expr.free_symbols:
        for source in sources.get(symbol, ()):
            if found := _SOURCE.match(str(source.name() if callable(source.name) else source.name)):
                argument, path, axis = found.groups()
                named[str(symbol)] = f"{argument}{path}.shape[{axis}]"
                break
    return named


def in_users_words(report: BlockReport, names: dict[str, str]) -> BlockReport:
    """The report with every symbol of ``names`` in its texts replaced."""
    if not names:
        return report

    def say(text: str) -> str:
        return _SYMBOL.sub(lambda found: names.get(found.group(), found.group()), text)

    verdicts = {
        name: Verdict(
            verdict.implementation,
            tuple(
                dataclasses.replace(
                    v, value=say(v.value), limit=say(v.limit), message=say(v.message), advice=say(v.advice)
                )
                for v in verdict.violations
            ),
            verdict.form,
        )
        for name, verdict in report.verdicts.items()
    }
    notes = tuple(say(note) for note in report.notes)
    return dataclasses.replace(report, reason=say(report.reason), verdicts=verdicts, notes=notes)
