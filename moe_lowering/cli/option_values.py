"""Values of options: a text becomes a value, or an error that says what is accepted. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from moe_lowering.lookup import did_you_mean
from moe_lowering.model_configs.check import LARGEST
from moe_lowering.model_configs.errors import write_value
from moe_lowering.providers import VERSIONS, is_version
from moe_lowering.vocabulary import MOST_BUFFER_MB, PROVIDERS, SOCS, soc_named


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


def parse_file(text: str) -> str:
    """A name, which is not empty; whether the file is there is looked at later."""
    if not text:
        raise argparse.ArgumentTypeError("is ''; accepted: a file")
    return text


def parse_version(text: str) -> str:
    """A version as the limit tables have them."""
    if not is_version(text):
        raise argparse.ArgumentTypeError(f"is {write_value(text)}; accepted: {VERSIONS}")
    return text


def parse_provider(text: str) -> tuple[str, str]:
    """(name, version) of NAME=VERSION; ("none", "") of none."""
    name, _, version = text.partition("=")
    if text != "none" and not (name in PROVIDERS and is_version(version)):
        hint = "" if name in PROVIDERS else did_you_mean(name, PROVIDERS)
        raise argparse.ArgumentTypeError(
            f"is {write_value(text)}{hint}; accepted: NAME=VERSION, e.g. vllm_ascend=0.23.0, or none; names: "
            f"{', '.join(PROVIDERS)}"
        )
    return name, version


def parse_word(accepted: Sequence[str]) -> Callable[[str], str]:
    """The parser of one of some words, in upper or lower case."""

    def parse(text: str) -> str:
        if text.lower() not in accepted:
            raise argparse.ArgumentTypeError(f"is {write_value(text)}; accepted: {', '.join(accepted)}")
        return text.lower()

    return parse


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


def split_list(text: str) -> list[str]:
    """The values of a list with commas; spaces around them, which a quoted list may have, are not of them."""
    return [part.strip() for part in text.split(",")] if text.strip() else [text]


def _empty_value(text: str) -> str:
    return f"is {write_value(text)}, with nothing beside a comma; accepted: values with commas between them, e.g. A,B"


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
