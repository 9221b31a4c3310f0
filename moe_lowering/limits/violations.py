"""Which rules a call breaks, and what to tell about each."""

from __future__ import annotations

import dataclasses
import functools
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from moe_lowering.limits.prover import Prover
from moe_lowering.limits.row import Limit
from moe_lowering.limits.sources import Citation
from moe_lowering.limits.table import Versions, freeze_versions, limits_of
from moe_lowering.limits.versions import in_words, subject

MOST_BUFFER_MB = 65535  # HCCL_BUFFSIZE must fit 16 bits (vllm-ascend 182b75ea, tiling of dispatch_ffn_combine)
# What needed_mb shows where no setting is enough.
UNBOUNDED, TOO_MANY = "unboundedly many", f"more than {MOST_BUFFER_MB}"
# What a bound on the HCCL window advises instead of its own advice, which names a setting.
NO_SETTING = {
    UNBOUNDED: "T has no upper bound, so no HCCL_BUFFSIZE is enough: declare Deployment.max_tokens, or the range of T "
    "with mark_dynamic(..., min=..., max=...)",
    TOO_MANY: f"HCCL_BUFFSIZE is {MOST_BUFFER_MB} MB at most: lower T (Deployment.max_tokens, or max of mark_dynamic)",
}


@dataclasses.dataclass(frozen=True)
class Violation:
    """Why something is not legal: a stable code, the rule, the actual value, and what would be accepted.

    ``source`` says in one line where the rule comes from, ``sources`` the same as records. ``versions`` names what the rule is
    about certain versions of (``Limit.versions``).
    """

    code: str
    operator: str
    value: str
    limit: str
    source: str
    message: str
    advice: str = ""
    versions: tuple[str, ...] = ()
    sources: tuple[Citation, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What a reader is told."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if name != "versions"}
        return {**found, "sources": list(found["sources"])}

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}"


def check(
    operator: str,
    soc: str,
    quantities: Mapping[str, Any],
    prover: Prover | None = None,
    versions: Mapping[str, str] | None = None,
) -> list[Violation]:
    """Every rule of ``operator`` on ``soc`` that these quantities break, in table order.

    Args:
        operator: the operator's name, e.g. ``npu_moe_distribute_dispatch_v2``.
        soc: ``A2``, ``A3``, ``A5`` or ``310P``; rules read it as the quantity ``soc``.
        quantities: values by name; sizes may be SymInts. A rule that reads a quantity which is not given, or is None,
            does not apply.
        prover: proves limits on symbolic sizes; the default knows only what the ShapeEnv knows.
        versions: by name (``versions.NAMES``), as ``Deployment.versions`` gives them. Rules for certain versions apply
            also when the version is not known.
    """
    prover = prover or Prover()
    given = {name: value for name, value in quantities.items() if value is not None}
    given["soc"] = soc
    rows = _applicable(operator, soc, freeze_versions(versions), frozenset(given))
    return [v for row in rows if (v := _violation(row, given, prover, versions))]


@functools.lru_cache(maxsize=4096)
def _applicable(operator: str, soc: str, versions: Versions, given: frozenset[str]) -> tuple[Limit, ...]:
    """The rows that read nothing but what is given."""
    return tuple(row for row in limits_of(operator, soc, versions) if row.names <= given)


def _violation(
    row: Limit, quantities: Mapping[str, Any], prover: Prover, versions: Mapping[str, str] | None
) -> Violation | None:
    if row.when is not None and not row.when(quantities):
        return None
    value = row.value(quantities)
    if row.holds(value, quantities, prover):
        return None
    accepted = row.accepted(quantities)
    sizes = _buffer_sizes(row, value, quantities, prover) if row.bounds_buffer else {}
    shown = {**quantities, "value": value, "version": subject(row.versions, versions or {}), **sizes}
    only, declare = in_words(row.versions, versions or {})
    advice = NO_SETTING.get(sizes.get("needed_mb", "")) or row.advice.format_map(shown)
    return Violation(
        code=row.code,
        operator=row.operator,
        value=str(value),
        limit=accepted,
        source=row.source,
        message=_message(row, value, accepted, shown) + only,
        advice="; ".join(filter(None, (advice, declare))),
        versions=tuple(constraint.name for constraint in row.versions),
        sources=row.sources,
    )


def _message(row: Limit, value: Any, accepted: str, shown: Mapping[str, Any]) -> str:
    if row.says:
        return f"{row.operator}: {row.says.format_map(shown)}"
    text = row.value.text
    what = f"{text} is {value}" if text in shown else f"value is {value} ({text})"
    return f"{row.operator}: {what}; accepted: {accepted}"


def _buffer_sizes(row: Limit, value: Any, quantities: Mapping[str, Any], prover: Prover) -> dict[str, str]:
    """HCCL_BUFFSIZE as it is, and the smallest that is enough for every value of the symbols, in MB; or in words, none."""
    needed = needed_buffer_mb(row, prover.bounds(value)[1], quantities)
    words = UNBOUNDED if needed is None else TOO_MANY if needed > MOST_BUFFER_MB else str(needed)
    return {"buffer_mb": f"{quantities['buffer_bytes'] / 2**20:g}", "needed_mb": words}


def needed_buffer_mb(row: Limit, most: int | None, quantities: Mapping[str, Any]) -> int | None:
    """The smallest HCCL_BUFFSIZE in MB for which a rule on the window (``Limit.bounds_buffer``) accepts ``most`` bytes.

    ``MOST_BUFFER_MB + 1`` when none does, None when ``most`` is None (no bound).
    """
    if most is None:
        return None
    assert row.max is not None
    bound = row.max
    return 1 + bisect_left(
        range(1, MOST_BUFFER_MB + 1), True, key=lambda mb: bound({**quantities, "buffer_bytes": mb * 2**20}) >= most
    )
