"""Options that several commands have: their parsers, the types of their values, and the machine that is assumed when none is
described. Imports no torch.
"""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from moe_lowering.cli.usage import UsageError
from moe_lowering.model_configs.check import LARGEST
from moe_lowering.model_configs.errors import write_value
from moe_lowering.prices.rows import MeasuredError, Row, require_rows
from moe_lowering.providers import declarable
from moe_lowering.vocabulary import PROVIDERS

DTYPES = ("float32", "float16", "bfloat16")

# What `lower` and `explain` assume of a machine that is not described.
ASSUMED_PROVIDERS = (("vllm_ascend", "0.23.0"),)
HCCL_BUFFER_MB = 1024  # enough for MC2 with the published sizes at 64 tokens per rank; CANN's own default is 200
WEIGHT_FORMAT = "nz"


class Parser(argparse.ArgumentParser):
    """Errors as one line, with the same prefix for every command."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def add_parser(commands: Any, name: str, request: type, *, help: str, description: str, examples: str) -> Any:
    """Add a command to a parser; its arguments become the fields of ``request``."""
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(request=request)
    return parser


def add_provider(add: Any) -> None:
    """Add ``--provider`` to a command."""
    assumed = "=".join(ASSUMED_PROVIDERS[0])
    add(
        "--provider",
        type=_provider,
        action="append",
        metavar="NAME=VERSION",
        help=f"installed library with fused operators, once for each, or none (default {assumed})",
    )


def add_prices(add: Any) -> None:
    """Add what prices depend on to a command."""
    add(
        "--ranks-per-node",
        type=parse_positive,
        default=0,
        metavar="N",
        help="ranks of a node, for prices (default the SoC's)",
    )
    add("--measured", metavar="FILE", default="", help="CSV file of measured rows, in place of constants of prices")


def read_measured(path: str, soc: str) -> tuple[Row, ...]:
    """The rows of ``--measured``.

    Raises:
        UsageError: the file is wrong.
    """
    try:
        return require_rows("argument --measured:", path, soc)
    except MeasuredError as error:
        raise UsageError(str(error)) from error


def provider_packages(assumed: list[tuple[str, str]] | None) -> tuple[tuple[str, str], ...]:
    """The providers of a command; the assumed ones when none was named.

    Raises:
        UsageError: ``none`` beside others, or one that is named twice.
    """
    if assumed is None:  # of the assumed providers, the installed version where there is one
        return tuple((name, dict(declarable()).get(name, version)) for name, version in ASSUMED_PROVIDERS)
    names = [name for name, _ in assumed]
    if "none" in names and len(names) > 1:
        raise UsageError("argument --provider: is none and others; accepted: none alone, or each library once")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"argument --provider: {twice} is given twice; accepted: none alone, or each library once")
    return () if names == ["none"] else tuple(assumed)


def _provider(text: str) -> tuple[str, str]:
    name, _, version = text.partition("=")
    if text != "none" and not (name in PROVIDERS and re.fullmatch(r"\d+(\.\w+)*", version)):
        raise argparse.ArgumentTypeError(
            f"is {text!r}; accepted: NAME=VERSION, e.g. vllm_ascend=0.23.0, or none; names: {', '.join(PROVIDERS)}"
        )
    return name, version


def parse_positive(text: str) -> int:
    """An option's value as an integer from 1 to ``LARGEST``."""
    value = parse_digits(text)
    if value is None or not 1 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"is {write_value(text)}; accepted: an integer from 1 to {LARGEST}")
    return value


def parse_digits(text: str) -> int | None:
    """Digits as an integer; None for anything else, and for more digits than any option takes."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else None
