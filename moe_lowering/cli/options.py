"""Options that several commands have: their parsers, the types of their values, and the machine that is assumed when none is
described. Imports no torch.
"""

from __future__ import annotations

import argparse
import itertools
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from moe_lowering.cli.usage import UsageError
from moe_lowering.lookup import did_you_mean
from moe_lowering.model_configs.check import LARGEST
from moe_lowering.model_configs.errors import write_value
from moe_lowering.prices.rows import MeasuredError, Row, require_rows
from moe_lowering.providers import VERSIONS, declarable, is_version
from moe_lowering.vocabulary import (
    AUTO,
    FIXED,
    IMPLEMENTATION_FORMS,
    MOST_BUFFER_MB,
    POLICIES,
    PROVIDER_VERSIONS,
    PROVIDERS,
    SOCS,
    TOKEN_UNPERMUTE,
    UNPERMUTE_OPERATORS,
    WEIGHT_FORMATS,
    WHEEL_BUILDS,
    soc_named,
)

DTYPES = ("float32", "float16", "bfloat16")

# What `lower` and `explain` assume of a machine that is not described.
ASSUMED_PROVIDERS = (("vllm_ascend", PROVIDER_VERSIONS["vllm_ascend"][0]),)
HCCL_BUFFER_MB = 1024  # enough for MC2 with the published sizes at 64 tokens per rank; CANN's own default is 200
CANN_BUFFER_MB = 200
WEIGHT_FORMAT = "nz"

WIDEST_HELP = 100  # columns


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Paragraphs as wide as the terminal, up to 100 columns; examples, which are to be copied, stay on lines of their own, and
    longer ones go on after a backslash."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for is_paragraph, part in itertools.groupby(text.splitlines(), lambda line: line[:1].strip() != ""):
            if is_paragraph:
                lines += self._wrap(" ".join(part), width, indent)
            else:
                for line in part:
                    own = line[: len(line) - len(line.lstrip())]
                    is_command = line.startswith("  moe-lowering ") or not line.strip()
                    text = line.strip()
                    lines += (
                        self._command(text, width, indent + own)
                        if is_command
                        else self._wrap(text, width, indent + own)
                    )
        return "\n".join(lines)

    def _command(self, text: str, width: int, indent: str) -> list[str]:
        words = re.split(r" (?=--)", text)  # an option and its value stay together
        lines = [indent + words[0]]
        for word in words[1:]:
            fits = len(lines[-1]) + 1 + len(word) <= min(width, WIDEST_HELP) - len(" \\")
            lines[-1] += f" {word}" if fits else " \\"
            lines += [] if fits else [f"{indent}    {word}"]
        return lines

    def _wrap(self, text: str, width: int, indent: str) -> list[str]:
        width = min(width, WIDEST_HELP)
        return textwrap.wrap(
            text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
        )


class Parser(argparse.ArgumentParser):
    """Errors as one line, with the same prefix for every command and the same words in every version of Python."""

    _typed = ""  # the text of the last value

    def error(self, message: str) -> NoReturn:
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            message = f"argument {missing}: is missing; accepted: {self._accepted(missing)}"
        without_value = message.removesuffix(": expected one argument").removesuffix(": expected at least one argument")
        if without_value != message:
            option = without_value.removeprefix("argument ").split("/")[0]
            message = f"{without_value}: is given without a value; accepted: {self._with_value(option)}"
        raise UsageError(message)

    def _with_value(self, option: str) -> str:
        """An option as the help has it, with the name of its value and what that is."""
        action = self._option_string_actions.get(option)
        if action is None or not action.help:
            return f"what {self.prog} --help says of it"
        value = action.metavar or f"{{{','.join(map(str, action.choices or ()))}}}"
        return f"{option} {value} ({action.help})"

    def _accepted(self, metavar: str) -> str:
        """What the help of an argument says of it."""
        texts = [action.help for action in self._actions if action.metavar == metavar and action.help]
        return texts[0] if texts else f"what {self.prog} --help says of it"

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """argparse's own, which knows no lists: where one value is wanted, several are refused as that."""
        self._typed = text
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError as error:
            if "," not in text or action.type not in (int, parse_positive, parse_buffer):
                raise
            accepted = "one integer" if action.choices is None else f"one of {', '.join(map(str, action.choices))}"
            message = f"is {write_value(text)}; accepted: {accepted}{self._lists()}"
            raise argparse.ArgumentError(action, message) from error

    def _lists(self) -> str:
        """Which options do take lists, of a command that has such: they are shown with dots."""
        names = [action.option_strings[0] for action in self._actions if str(action.metavar).endswith(",...")]
        return f" (only {', '.join(names[:-1])} and {names[-1]} take lists)" if len(names) > 1 else ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's own check of ``choices``, which says it otherwise from Python 3.12 on."""
        if action.choices is not None and value not in action.choices:
            accepted = ", ".join(map(str, action.choices))
            if isinstance(value, str) and value == self._typed.lower():
                value = self._typed  # before it was made lower case
            if "," in str(value):
                accepted = f"one of {accepted}{self._lists()}"
            command = isinstance(action, argparse._SubParsersAction)
            hint = did_you_mean(str(value), action.choices) if command else ""  # the others have few choices
            raise argparse.ArgumentError(action, f"is {write_value(value)}{hint}; accepted: {accepted}")


def add_parser(commands: Any, name: str, request: type, *, help: str, description: str, examples: str) -> Any:
    """Add a command to a parser; its arguments become the fields of ``request``."""
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=examples,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(request=request, called=name)
    return parser


def assumed_differences(request: Any) -> list[str]:
    """What a command did not say of the machine and was taken to be so, other than a ``Deployment`` takes it."""
    assumptions = []
    if request.buffer_mb is None:
        assumptions.append(
            f"HCCL_BUFFSIZE is {HCCL_BUFFER_MB} MB (where it is not set, CANN and a Deployment take {CANN_BUFFER_MB})"
        )
    if request.weight_format is None:
        assumptions.append(f"the expert weights are in format {WEIGHT_FORMAT} (a Deployment's default is nd)")
    if request.provider is None:
        assumptions += [
            f"{name} {version} is installed (a Deployment's default is none)" for name, version in request.providers
        ]
        assumptions += [
            f"{name} is built from source for {request.soc} (its wheels are {wheel} builds); --provider none answers without it"
            for name, _ in request.providers
            if (wheel := WHEEL_BUILDS.get(name, request.soc)) != request.soc and name not in dict(declarable())
        ]
    return assumptions


class SocAction(argparse.Action):
    """Keeps SoCs by their own names: one, or where it takes ``several`` some with commas; ``taken_as`` says which word was
    taken as which."""

    def __init__(self, *args: Any, several: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.several = several

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, text: Any, option: str | None = None) -> None:
        words = split_list(str(text)) if self.several else [str(text)]
        if len(words) > 1 and "" in words:
            raise argparse.ArgumentError(self, _empty_value(text))
        socs = [soc_named(word) for word in words]
        names = [soc.name for soc in socs if soc is not None]
        if len(names) < len(words):
            word = next(word for word, soc in zip(words, socs, strict=True) if soc is None)
            accepted = ", ".join(f"{soc.name} ({', '.join(soc.aliases)})" for soc in SOCS.values())
            if "," in word:
                accepted = f"one SoC (explain takes lists): {accepted}"
            raise argparse.ArgumentError(self, f"is {write_value(word)}; accepted: {accepted}")
        if len(set(names)) < len(names):
            raise argparse.ArgumentError(self, f"is {write_value(text)}, with a SoC twice; accepted: each SoC once")
        setattr(namespace, self.dest, tuple(names) if self.several else names[0])
        pairs = zip(words, names, strict=True)
        namespace.taken_as = tuple(f"SoC {word} is taken as {name}" for word, name in pairs if word != name)


def split_list(text: str) -> list[str]:
    """The values of a list with commas; spaces around them, which a quoted list may have, are not of them."""
    return [part.strip() for part in text.split(",")]


def _empty_value(text: str) -> str:
    return f"is {write_value(text)}, with nothing beside a comma; accepted: values with commas between them, e.g. A,B"


def parse_several(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """The parser of a list with commas, from that of one value; a value may be there once."""

    def parse_list(text: str) -> tuple[Any, ...]:
        parts = split_list(text)
        if len(parts) > 1 and "" in parts:
            raise argparse.ArgumentTypeError(_empty_value(text))
        values = tuple(parse(part) for part in parts)
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"is {write_value(text)}, with a value twice; accepted: each value once")
        return values

    return parse_list


def parse_word(accepted: Sequence[str]) -> Callable[[str], str]:
    """The parser of one of some words, in upper or lower case."""

    def parse(text: str) -> str:
        if text.lower() not in accepted:
            raise argparse.ArgumentTypeError(f"is {write_value(text)}; accepted: {', '.join(accepted)}")
        return text.lower()

    return parse


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


def add_machine(add: Any, tokens: str) -> None:
    """Add what a command may say of the machine and of token counts; ``tokens``: the field of the bound that is declared."""
    add(
        "--max-tokens",
        dest=tokens,
        type=parse_positive,
        default=0,
        metavar="T",
        help="bound on the tokens of a rank that the deployment declares",
    )
    add("--unequal-tokens", action="store_true", help="ranks may have different T, up to --max-tokens")
    add("--buffer-mb", type=parse_buffer, metavar="MB", help=f"HCCL_BUFFSIZE (default {HCCL_BUFFER_MB})")
    add("--weight-format", choices=WEIGHT_FORMATS, help=f"of the experts on the device (default {WEIGHT_FORMAT})")
    add("--cann", type=_version, metavar="V", help="CANN version (default unknown: all rules apply)")
    add("--hierarchy", action="store_true", help="MC2 in two levels, within and between nodes")
    add_unpermute_operator(add)


def add_unpermute_operator(add: Any) -> None:
    """Add ``--unpermute-operator`` to a command."""
    add(
        "--unpermute-operator",
        choices=UNPERMUTE_OPERATORS,
        default=TOKEN_UNPERMUTE,
        metavar="OPERATOR",
        help=f"of AllGather and AllToAll: {' or '.join(UNPERMUTE_OPERATORS)} (default {TOKEN_UNPERMUTE})",
    )


def add_policy(add: Any) -> None:
    """Add ``--policy`` to a command."""
    add(
        "--policy",
        choices=POLICIES,
        default=AUTO,
        metavar="POLICY",
        help=f"how to choose among what is legal, of {', '.join(POLICIES)} (default auto: by cost; fixed: with --comm, what "
        "that asks for)",
    )


def check_policy(comm: str, policy: str) -> None:
    """Refuse a policy that does not go with ``--comm``.

    Raises:
        UsageError: see above.
    """
    if comm == AUTO and policy == FIXED:
        names = ",".join(IMPLEMENTATION_FORMS)
        raise UsageError(f"argument --policy: is {FIXED} without --comm; accepted: with --comm {{{names}}}")
    if comm != AUTO and policy not in (AUTO, FIXED):
        raise UsageError(
            f"argument --policy: is {policy} with --comm {comm}, which leaves nothing to choose; accepted: {FIXED}, or "
            "without --comm"
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
    if text != "none" and not (name in PROVIDERS and is_version(version)):
        hint = "" if name in PROVIDERS else did_you_mean(name, PROVIDERS)
        raise argparse.ArgumentTypeError(
            f"is {write_value(text)}{hint}; accepted: NAME=VERSION, e.g. vllm_ascend=0.23.0, or none; names: "
            f"{', '.join(PROVIDERS)}"
        )
    return name, version


def _version(text: str) -> str:
    if not is_version(text):
        raise argparse.ArgumentTypeError(f"is {write_value(text)}; accepted: {VERSIONS}")
    return text


def parse_positive(text: str, most: int = LARGEST) -> int:
    """An option's value as an integer from 1 to ``most``."""
    value = parse_digits(text)
    if value is None or not 1 <= value <= most:
        raise argparse.ArgumentTypeError(f"is {write_value(text)}; accepted: an integer from 1 to {most}")
    return value


def parse_buffer(text: str) -> int:
    """HCCL_BUFFSIZE in MB, as far as it goes."""
    return parse_positive(text, MOST_BUFFER_MB)


def parse_digits(text: str) -> int | None:
    """Digits as an integer; None for anything else, and for more digits than any option takes."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else None
