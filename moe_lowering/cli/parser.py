"""The parser of the command line: its errors in one line each, and the help as wide as the terminal. Imports no torch."""

from __future__ import annotations

import argparse
import itertools
import re
import textwrap
from typing import Any, NoReturn

from moe_lowering.cli.option_values import parse_buffer, parse_positive
from moe_lowering.cli.usage import UsageError
from moe_lowering.lookup import did_you_mean
from moe_lowering.model_configs.errors import write_value

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
