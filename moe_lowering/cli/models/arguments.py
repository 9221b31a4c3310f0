"""The command line of ``moe-lowering models``: what can be checked without torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_lowering.cli.files import check_file
from moe_lowering.cli.models.request import ModelsRequest
from moe_lowering.cli.option_values import split_list
from moe_lowering.cli.parser import add_parser
from moe_lowering.cli.usage import UsageError
from moe_lowering.families.listing import families, transformers_version
from moe_lowering.families.records import DTYPES, SHAPES, WAYS, read_rows
from moe_lowering.lookup import did_you_mean
from moe_lowering.model_configs.errors import write_value

DESCRIPTION = """\
Build a small random model of every MoE family of the installed transformers, lower it, run it on the CPU, and compare each
MoE layer with the model's own: by the hook (transformers' experts interface) and from the trace of the model as it is, in
bfloat16 and float32, with static and dynamic shapes."""

EXAMPLES = """\
examples:
  moe-lowering models
      everything; an hour on two cores, a line on stderr for each family
  moe-lowering models --only qwen3_moe,deepseek_v3 --ways hook
      some of it
  moe-lowering models --resume models.json
      go on where an interrupted command stopped: what models.json has is not tried again, what it lacks is added to it
  moe-lowering models --only llama4 --resume models.json --again
      try one family anew, in a file that has it
  moe-lowering models --resume models.json --write docs/models.md
      write the page of the table

A family is a folder of transformers' models whose code has a class of experts. Each is tried in a process of its own.

exit code: 0 nothing is wrong: all layers lowered have the model's own result; 1 one has not; 2 wrong usage
"""


def add_command(commands: Any) -> None:
    """Add ``models`` to the commands of a parser."""
    parser = add_parser(
        commands,
        "models",
        ModelsRequest,
        help="try every MoE family of the installed transformers, and print the table",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--only", type=_names, action="extend", default=[], metavar="FAMILY,...", help="these families (default all)")
    for option, values, what in (
        ("--ways", WAYS, "ways"),
        ("--dtypes", DTYPES, "dtypes"),
        ("--shapes", SHAPES, "shapes"),
    ):
        accepted = f"{what}, of {', '.join(values)} (default both)"
        add(option, type=_some(values), default=values, metavar="NAME,...", help=accepted)
    add("--json", dest="json_file", type=Path, metavar="FILE", help="write the records to this file")
    add("--resume", type=Path, metavar="FILE", help="keep what this file has, and add to it after each family")
    add("--again", action="store_true", help="with --resume: try what the file has, too")
    add("--write", type=Path, metavar="FILE", help="write the page of the table, in Markdown, to this file")


def check(request: ModelsRequest) -> None:
    """Refuse what is certain to be wrong.

    Raises:
        UsageError: no transformers, an unknown family, files that cannot be written, ``--again`` alone.
    """
    known = families()
    if not known:
        raise UsageError(
            "transformers is not installed, or has no MoE families; accepted: an installed one: "
            "pip install 'moe-lowering[transformers]'"
        )
    for name in request.only:
        if name not in known:
            hint = did_you_mean(name, known, most=3)
            raise UsageError(
                f"argument --only: has {write_value(name)}{hint}; accepted: the {len(known)} families of transformers with "
                f"MoE layers, listed in docs/models.md"
            )
    if request.again and request.resume is None:
        raise UsageError("argument --again: is given without --resume; accepted: with it")
    for option, path in (("json", request.json_file), ("resume", request.resume), ("write", request.write)):
        if path is not None:
            check_file(option, str(path))
    if request.resume is not None:
        try:
            read_rows(request.resume, transformers_version())
        except ValueError as error:
            raise UsageError(f"argument --resume: {error}") from error


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.lower().replace("-", "_") for name in split_list(text)))
    if not all(names):
        raise argparse.ArgumentTypeError(f"is {write_value(text)}; accepted: names of families, with commas")
    return names


def _some(accepted: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Parser of a list with commas, in the order of ``accepted``."""

    def parse(text: str) -> tuple[str, ...]:
        names = [name.lower() for name in split_list(text)]
        for name in names:
            if name not in accepted:
                hint = did_you_mean(name, accepted, cutoff=0.4)
                raise argparse.ArgumentTypeError(
                    f"has {write_value(name)}{hint}; accepted: of {','.join(accepted)}, with commas"
                )
        return tuple(name for name in accepted if name in names)

    return parse
