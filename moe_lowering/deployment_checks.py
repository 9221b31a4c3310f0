"""Checks of the fields of a ``Deployment``: each a ValueError that names the field, its value and what is accepted."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any


def require_word(name: str, value: str, accepted: Collection[str]) -> None:
    """``value`` is one of some words."""
    if value not in accepted:
        raise ValueError(f"Deployment: {name} is {value!r}; accepted: {', '.join(accepted)}")


def require_least(name: str, value: int, low: int) -> None:
    """``value`` is ``low`` or more."""
    if value < low:
        raise ValueError(f"Deployment: {name} is {value}; accepted: {low} or more")


def check_shared_ranks(ep_size: int, ranks: int, experts: int) -> None:
    """The ranks with shared experts are some of the EP group, and each shared expert has as many of them."""
    if not 0 <= ranks < ep_size:
        raise ValueError(f"Deployment: shared_expert_ranks is {ranks}; accepted: 0 to ep_size - 1 = {ep_size - 1}")
    if experts < 1 or (ranks == 0 and experts != 1) or (ranks and ranks % experts):
        accepted = f"a divisor of shared_expert_ranks, {ranks}" if ranks else "1, as there are no shared_expert_ranks"
        raise ValueError(f"Deployment: shared_experts is {experts}; accepted: {accepted}")


def check_kinds(deployment: Any) -> None:
    """Every field of a dataclass that is to be an int or a bool is one, and no other kind of it."""
    accepted: dict[Any, tuple[type, str]] = {"int": (int, "an int"), "bool": (bool, "True or False")}
    for field in dataclasses.fields(deployment):
        kind, _, optional = str(field.type).partition(" | ")
        value = getattr(deployment, field.name, None)  # the field ``places`` is not set yet
        if kind not in accepted or (optional and value is None):
            continue
        if type(value) is not accepted[kind][0]:
            raise ValueError(f"Deployment: {field.name} is {value!r}; accepted: {accepted[kind][1]}")
