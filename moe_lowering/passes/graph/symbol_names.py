"""The user's names of symbolic sizes for reports: ``input_ids.shape[1]`` in place of dynamo's ``s77``."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

from moe_lowering.limits.wording import Names
from moe_lowering.report.records import BlockReport

# What dynamo calls an argument or what is in it, e.g. L['x'].size()[0], L['n'], L['batch']['n'], L['self']._modules['a'].n
_SOURCE = re.compile(r"^[LG]\['(\w+)'\](.*)$")
_MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['(\w+)'\]")
_PROPERTY = re.compile(r"\.(size|stride)\(\)\[(\d+)\]$")
_KEYWORD = re.compile(r"^kwargs\['(\w+)'\]")  # the names under which transformers' decorators pass arguments on


def dimension_names(size: Any) -> Names:
    """The user's name of each symbol in a size, as far as it comes from a named argument of the model."""
    if not isinstance(size, torch.SymInt):
        return ()
    sources = size.node.shape_env.var_to_sources
    named = {}
    for symbol in size.node.expr.free_symbols:
        candidates = [_written(str(s.name() if callable(s.name) else s.name)) for s in sources.get(symbol, ())]
        # a view has a second source, its base, which the user does not see: it comes last
        if names := sorted((name for name in candidates if name), key=lambda name: "._base" in name):
            named[str(symbol)] = names[0]
    return tuple(sorted(named.items()))


def _written(source: str) -> str | None:
    """A source as Python code of the user, None when it is not an argument's."""
    match = _SOURCE.match(source)
    if match is None:
        return None
    argument, path = match.groups()
    path = _MEMBER.sub(lambda m: f"[{m[1]}]" if m[1].isdigit() else f".{m[1]}", path)
    path = _PROPERTY.sub(lambda m: f".shape[{m[2]}]" if m[1] == "size" else f".stride({m[2]})", path)
    return _KEYWORD.sub(r"\1", argument + path)


def name_sizes(report: BlockReport, names: Names) -> BlockReport:
    """The report with the user's names of the symbols at all that holds sizes."""
    if not names:
        return report
    verdicts = {name: verdict.named(names) for name, verdict in report.verdicts.items()}
    sizes = None if report.sizes is None else report.sizes.named(names)
    return dataclasses.replace(report, verdicts=verdicts, sizes=sizes)
