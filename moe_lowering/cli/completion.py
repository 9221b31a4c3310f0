"""Completion of ``moe-lowering`` with TAB in a shell, by argcomplete where it is installed (the extra ``completion``).

argcomplete knows commands, options and choices from the parser. Added here: names of models and SoCs, and the values of lists
with commas, of which the one behind the last comma is completed. Imports no torch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

from moe_lowering.cli.matrix.request import FORMS_OF
from moe_lowering.families.listing import families
from moe_lowering.families.records import DTYPES, SHAPES, WAYS
from moe_lowering.matrix.forms import EP_SIZES, TP_SIZES
from moe_lowering.model_configs.check import models_from
from moe_lowering.vocabulary import EXPERT_FORMATS, PROVIDER_VERSIONS, SOCS

IN_COMPLETION = "_ARGCOMPLETE"  # set while a shell asks


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks what may come next, and exit; do nothing where none asks."""
    if IN_COMPLETION not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:  # the shell asks for another program's sake, or the extra is gone
        return
    for action in _actions(parser):
        several = str(action.metavar).endswith(",...")  # as their helps show lists
        words = (_LISTS if several else _WORDS).get(action.dest)
        if action.dest == "model":
            vars(action)["completer"] = _Models(argcomplete.FilesCompleter())
        elif words is not None:
            vars(action)["completer"] = _values(words, several)
    argcomplete.autocomplete(parser)


class _Models:
    """Names of models, and files where it looks like a path or no model begins so."""

    def __init__(self, files: Callable[..., Any]) -> None:
        self._files = files

    def __call__(self, prefix: str = "", **more: Any) -> list[str]:
        names = [] if prefix[:1] in (".", "/", "~") else models_from(prefix)
        return names or list(self._files(prefix, **more))


def _values(words: Callable[[], Sequence[object]], several: bool) -> Callable[..., list[str]]:
    """The completer of an option. argcomplete drops what does not begin with what was typed, capitals included."""

    def completer(prefix: str = "", **unused: Any) -> list[str]:
        before, comma, begun = prefix.rpartition(",") if several else ("", "", prefix)
        left = [str(word) for word in words() if str(word) not in before.split(",")]
        fitting = [word for word in left if word.startswith(begun)] or [
            word.lower() for word in left if word.lower().startswith(begun)
        ]
        return [f"{before}{comma}{word}" for word in fitting]

    return completer


_SOCS = (*SOCS, *(alias for soc in SOCS.values() for alias in soc.aliases))
# By the field of the request that an option becomes: options of one value, and lists. Functions, as a shell asks rarely.
_WORDS: dict[str, Callable[[], Sequence[object]]] = {
    "soc": lambda: _SOCS,
    "provider": lambda: ("none", *(f"{name}={versions[0]}" for name, versions in PROVIDER_VERSIONS.items())),
}
_LISTS: dict[str, Callable[[], Sequence[object]]] = {
    "socs": lambda: _SOCS,
    "quants": lambda: tuple(EXPERT_FORMATS),
    "ep": lambda: EP_SIZES,
    "tp": lambda: TP_SIZES,
    "quant": lambda: tuple(EXPERT_FORMATS),
    "comm": lambda: tuple(FORMS_OF),
    "only": families,
    "ways": lambda: WAYS,
    "dtypes": lambda: DTYPES,
    "shapes": lambda: SHAPES,
}


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Of a parser and its commands."""
    actions = []
    for action in parser._actions:
        actions.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                actions += _actions(command)
    return actions
