"""Version constraints of limit rows, such as ``cann<8.5``.

A row with constraints applies unless a version is known and rules it out: what is not known is taken as the stricter.
A pre-release (``8.2.RC1``, ``0.20.2rc1``) may lie on either side of its release, so against that very number nothing is
known of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence

from moe_lowering.vocabulary import PROVIDERS

NAMES = ("cann", "torch_npu", *PROVIDERS)

_COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}
_CONSTRAINT = re.compile(r"(\w+?)\s*(<=|>=|==|<|>)\s*(\d+(?:\.\d+)*)")
_RELEASE = re.compile(r"v?(\d+(?:\.\d+)*)(.*)", re.DOTALL)
_PRE_RELEASE = re.compile(r"[._-]?(rc|a|b|alpha|beta|dev|pre)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Constraint:
    """``name operator number``, e.g. cann < (8, 5).

    Raises:
        ValueError: by ``parse``, when the text is not a constraint or names something that has no version here.
    """

    text: str
    name: str
    operator: str
    number: tuple[int, ...]

    @staticmethod
    def parse(text: str) -> Constraint:
        match = _CONSTRAINT.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"version constraint {text!r}; accepted: a name, one of {', '.join(_COMPARE)}, dotted numbers"
            )
        name, comparison, number = match.groups()
        if name not in NAMES:
            raise ValueError(f"version constraint {text!r}: {name} has no version here; known: {', '.join(NAMES)}")
        return Constraint(text, name, comparison, _numbers(number))

    def excludes(self, version: str) -> bool:
        """Whether this version is known not to satisfy the constraint."""
        match = _RELEASE.fullmatch(version.strip())
        if match is None:
            return False
        release, rest = _numbers(match[1]), match[2]
        a, b = _same_length(release, self.number)
        if a == b and _PRE_RELEASE.match(rest):
            return False
        return not _COMPARE[self.operator](a, b)


def do_constraints_apply(constraints: Sequence[Constraint], versions: Mapping[str, str]) -> bool:
    """Whether a rule with these constraints applies; versions that are not given are not known."""
    return not any(c.excludes(versions.get(c.name, "")) for c in constraints)


def name_subject(constraints: Sequence[Constraint], versions: Mapping[str, str]) -> str:
    """What a rule is about: each name with its version, ``vllm_ascend 0.26.0rc1``; where none is known, ``vllm_ascend>=0.24``."""
    known = {c.name: f"{c.name} {versions[c.name]}" for c in constraints if versions.get(c.name)}
    return ", ".join(dict.fromkeys(known.get(c.name, c.text) for c in constraints))


def compare_versions(a: str, b: str) -> int:
    """-1, 0 or 1 as a version is older than another, as new, or newer; by their numbers, and a pre-release as its release.

    Raises:
        ValueError: one does not begin with dotted numbers.
    """
    numbers = []
    for version in (a, b):
        match = _RELEASE.fullmatch(version.strip())
        if match is None:
            raise ValueError(f"version {version!r}; accepted: dotted numbers, and what may follow")
        numbers.append(_numbers(match[1]))
    first, second = _same_length(*numbers)
    return (first > second) - (first < second)


def describe_versions(constraints: Sequence[Constraint], versions: Mapping[str, str]) -> tuple[str, str]:
    """(to which versions a rule belongs, what to declare when they are not known)."""
    if not constraints:
        return "", ""
    unknown = sorted({c.name for c in constraints if not versions.get(c.name)})
    texts = ", ".join(c.text for c in constraints)
    return f" (a rule for {texts})", f"declare the version of {' and '.join(unknown)}" if unknown else ""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _same_length(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pairs = list(itertools.zip_longest(a, b, fillvalue=0))
    return tuple(x for x, _ in pairs), tuple(y for _, y in pairs)
