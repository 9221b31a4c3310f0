"""Draws for ``graph_strategies``: hypothesis's words over numbers of a plain generator, and smaller cases where one fails.

Hypothesis took 5 to 25 ms for a case, a tenth to a quarter of what its check takes. A strategy is a function of
``Choices``; every choice is a number below a bound, and 0 stands for the simplest. So a case is its list of numbers, and
the shrinking of it works on that list alone.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

Strategy = Callable[["Choices"], Any]


class Choices:
    """Numbers, each below a bound: those of ``first``, and then of ``generator``; zeros where there is none."""

    def __init__(self, first: Sequence[int] = (), generator: random.Random | None = None) -> None:
        self._first, self._generator = first, generator
        self.made: list[int] = []

    def below(self, bound: int) -> int:
        index = len(self.made)
        if index < len(self._first):
            number = min(self._first[index], bound - 1)
        else:
            number = self._generator.randrange(bound) if self._generator else 0
        self.made.append(number)
        return number


def sampled_from(values: Sequence[Any]) -> Strategy:
    return lambda choices: values[choices.below(len(values))]


def booleans() -> Strategy:
    return lambda choices: choices.below(2) == 1


def integers(low: int, high: int) -> Strategy:
    return lambda choices: low + choices.below(high - low + 1)


def just(value: Any) -> Strategy:
    return lambda choices: value


def lists(elements: Strategy, *, min_size: int = 0, max_size: int) -> Strategy:
    return lambda choices: [elements(choices) for _ in range(min_size + choices.below(max_size - min_size + 1))]


def sets(elements: Strategy, *, max_size: int) -> Strategy:
    return lambda choices: {elements(choices) for _ in range(choices.below(max_size + 1))}


def dictionaries(keys: Strategy, values: Strategy, *, min_size: int = 0, max_size: int) -> Strategy:
    """A key that is drawn twice has the later value, so that there may be fewer than ``min_size``, and one at least."""
    return lambda choices: {
        keys(choices): values(choices) for _ in range(min_size + choices.below(max_size - min_size + 1))
    }


def composite(function: Callable[..., Any]) -> Callable[..., Strategy]:
    """``function(draw, ...)`` as a maker of strategies."""

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Strategy:
        return lambda choices: function(lambda strategy: strategy(choices), *args, **kwargs)

    return make


def simplest(strategy: Strategy, choices: Sequence[int], fails: Callable[[Any], bool], seconds: float) -> list[int]:
    """Choices of a case that still fails, with as many zeros as ``seconds`` allow to find; ``choices`` fail."""
    best, end = list(choices), time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for index in range(len(best)):
            for number in (0, best[index] // 2) if index < len(best) and best[index] else ():
                if time.monotonic() > end:
                    return best
                tried = Choices([*best[:index], number, *best[index + 1 :]])
                case = strategy(tried)
                # a smaller number may lead to more choices after it: all of them are zeros then
                if tried.made != best and fails(case):
                    best, smaller = tried.made, True
                    break
    return best


def rarely(draw: Any, usual: Any, *others: Any) -> Any:
    """The usual value three times in four."""
    return draw(sampled_from((usual,) * 3 * len(others) + others)) if others else usual
