"""``Request`` and ``Result``, a prompt and its answer, with their checks; ``ActiveRequest``, which holds a row of the cache."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any


def integer(what: str, value: Any) -> int:
    """The int that ``value`` is; not a bool, nor a float that happens to be whole. Raises ValueError, which names it."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{what} is {value!r}; accepted: an int")


def integers(what: str, values: Any, kind: str) -> tuple[int, ...]:
    """The ints of a sequence; ``kind`` says in the error what they are."""
    try:
        numbers = tuple(values)
    except TypeError:
        raise ValueError(f"{what} is {values!r}; accepted: a sequence of {kind}") from None
    for position, value in enumerate(numbers):
        integer(f"{what}[{position}]", value)
    return tuple(operator.index(value) for value in numbers)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue, always with the likeliest token. Token ids are kept as tuples of int.

    A number that is no integer, or a bool, is a ValueError that names the argument.

    Args:
        prompt: token ids, at least one.
        max_new_tokens: how many tokens to add, at least one.
        stop_tokens: token ids after which generation ends; the one that ended it is part of the result.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "stop_tokens"):
            object.__setattr__(self, name, integers(f"Request: {name}", getattr(self, name), "token ids"))
        object.__setattr__(self, "max_new_tokens", integer("Request: max_new_tokens", self.max_new_tokens))

    def check(self, max_length: int, vocabulary: int) -> None:
        """Raises a ValueError that names the argument, its value and what is accepted."""
        if not self.prompt:
            raise ValueError("Request: prompt is empty; accepted: at least one token id")
        for name in ("prompt", "stop_tokens"):
            for token in getattr(self, name):
                if not 0 <= token < vocabulary:
                    raise ValueError(f"Request: {name} has token id {token}; accepted: 0 to {vocabulary - 1}")
        if self.max_new_tokens < 1:
            raise ValueError(f"Request: max_new_tokens is {self.max_new_tokens}; accepted: 1 or more")
        total = len(self.prompt) + self.max_new_tokens
        if total > max_length:
            raise ValueError(
                f"Request: prompt has {len(self.prompt)} tokens and max_new_tokens is {self.max_new_tokens}, together "
                f"{total}; accepted: at most max_length = {max_length} of the server"
            )


@dataclasses.dataclass(frozen=True)
class Result:
    """The answer to one request.

    Attributes:
        number: what ``Server.submit`` returned.
        tokens: the new tokens, without the prompt.
        finish: ``stop`` (the last token is a stop token), ``length``, or ``cancelled`` (``Server.cancel``).
    """

    number: int
    tokens: list[int]
    finish: str


@dataclasses.dataclass
class ActiveRequest:
    """A request that holds a row of the cache.

    Attributes:
        length: tokens whose keys and values are in the row; the position of the next one.
    """

    number: int
    request: Request
    length: int
    tokens: list[int]

    def add(self, token: int) -> Result | None:
        """Take the next token; the result when it was the last."""
        self.tokens.append(token)
        if token in self.request.stop_tokens:
            return Result(self.number, self.tokens, "stop")
        if len(self.tokens) == self.request.max_new_tokens:
            return Result(self.number, self.tokens, "length")
        return None
