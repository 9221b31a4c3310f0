"""Completion of ``moe-lowering`` with TAB in a shell, by argcomplete where it is installed (the extra ``completion``).

argcomplete knows commands and options from the parser; the names of models and SoCs are added here.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from moe_lowering.model_configs.presets import PRESETS
from moe_lowering.vocabulary import SOCS

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
        if action.dest in _WORDS:
            vars(action)["completer"] = _words(_WORDS[action.dest])
    argcomplete.autocomplete(parser)


_SOCS = (*SOCS, *(alias for soc in SOCS.values() for alias in soc.aliases))
_WORDS = {"model": ("moe", *PRESETS), "soc": _SOCS, "socs": _SOCS}


def _words(words: tuple[str, ...]) -> Any:
    return lambda prefix="", **unused: [word for word in words if word.startswith(prefix)]


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Of a parser and its commands."""
    actions = []
    for action in parser._actions:
        actions.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                actions += _actions(command)
    return actions
