"""Checks of the fields of a ``Deployment``: each a ValueError that names the field, its value and what is accepted."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from moe_lowering.lookup import did_you_mean
from moe_lowering.vocabulary import FUSED_MODES, GUARDS, MODES, SOCS, UNPERMUTE_OPERATORS, WEIGHT_FORMATS, soc_named

if TYPE_CHECKING:
    from moe_lowering.deployment import Deployment


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


def _check_soc(soc: str) -> None:
    """The name of a SoC; one of its other names, which commands take, says which SoC it is."""
    meant = soc_named(soc) if isinstance(soc, str) and soc not in SOCS else None
    if meant is not None:
        raise ValueError(f"Deployment: soc is {soc!r}, another name of {meant.name}; accepted: {', '.join(SOCS)}")
    require_word("soc", soc, SOCS)


def require_fields(where: str, given: Collection[str], known: Collection[str]) -> None:
    """Raises a TypeError that names a field which a deployment does not have, and those that are like it."""
    for name in given:
        if name not in known:
            near = did_you_mean(name, known) or f"; accepted: {', '.join(sorted(known))}"
            raise TypeError(f"{where}: {name} is no field of Deployment{near}")


def check_words(deployment: Deployment) -> None:
    """Every field that is one of some words is one of them."""
    _check_soc(deployment.soc)
    require_word("weight_format", deployment.weight_format, WEIGHT_FORMATS)
    require_word("guards", deployment.guards, GUARDS)
    require_word("mode", deployment.mode, MODES)
    require_word("unpermute_operator", deployment.unpermute_operator, UNPERMUTE_OPERATORS)
    if deployment.fused_mode not in FUSED_MODES:
        raise ValueError(
            f"Deployment: fused_mode is {deployment.fused_mode!r}; accepted: "
            f"{', '.join(f'{mode} ({names})' for mode, names in FUSED_MODES.items())}"
        )


def check_group_sizes(deployment: Deployment) -> None:
    """Each group has ranks, its own rank is one of them, and a group of more than one has a name."""
    for kind in ("ep", "tp"):
        size, rank, group = (getattr(deployment, f"{kind}_{part}") for part in ("size", "rank", "group"))
        require_least(f"{kind}_size", size, 1)
        if rank is not None and not 0 <= rank < size:
            raise ValueError(f"Deployment: {kind}_rank is {rank}; accepted: 0 to {kind}_size - 1 = {size - 1}")
        if size > 1 and not group:
            raise ValueError(f"Deployment: {kind}_size is {size} but {kind}_group is ''; give the group's name")


def check_sizes(deployment: Deployment) -> None:
    """No size is negative, and there is a window."""
    for name in ("max_tokens", "min_tokens", "max_rows", "max_output_size", "ranks_per_node", "mc2_capacity"):
        require_least(name, getattr(deployment, name), 0)
    require_least("hccl_buffer_mb", deployment.hccl_buffer_mb, 1)


def check_groups_agree(deployment: Deployment) -> None:
    """TP groups divide the EP group, and MC2's communicator is not the EP group's own."""
    if deployment.ep_size % deployment.tp_size:
        raise ValueError(
            f"Deployment: ep_size is {deployment.ep_size}, not a multiple of tp_size {deployment.tp_size}: the ranks of a TP "
            "group are ranks of one EP group"
            if deployment.ep_size > 1
            else f"Deployment: tp_size is {deployment.tp_size} with ep_size 1: give the EP group that the TP ranks form"
        )
    if deployment.mc2_group and deployment.mc2_group in (deployment.ep_group, deployment.ep_communicator):
        raise ValueError(
            f"Deployment: mc2_group is {deployment.mc2_group!r}, the EP group itself; MC2 operators need a communicator "
            "that no other collective uses (make a second group over the same ranks)"
        )


def check_token_bounds(deployment: Deployment) -> None:
    """Where T may differ between ranks there are bounds on it."""
    if not deployment.equal_tokens and not deployment.max_tokens:
        raise ValueError("Deployment: equal_tokens is False, so max_tokens must give a bound that holds on every rank")
    if not deployment.equal_tokens and deployment.min_tokens > deployment.max_tokens:
        raise ValueError(
            f"Deployment: min_tokens is {deployment.min_tokens}; accepted: 0 to max_tokens = {deployment.max_tokens}"
        )
