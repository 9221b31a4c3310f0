"""``examine``: every rule that applies to a call, with the value that it looked at and whether it holds.

``violations.check`` returns the broken ones only; this is for ``explain --why``, which also shows why something is legal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_lowering.limits.prover import Prover
from moe_lowering.limits.row import Limit
from moe_lowering.limits.table import limits_for
from moe_lowering.limits.wording import Accepted, Value, as_value


@dataclasses.dataclass(frozen=True)
class Finding:
    """One rule, the value that it looked at, what it accepts, and whether it holds."""

    limit: Limit
    value: Value
    accepted: Accepted
    holds: bool


def examine(
    operator: str,
    soc: str,
    quantities: Mapping[str, Any],
    prover: Prover | None = None,
    versions: Mapping[str, str] | None = None,
) -> list[Finding]:
    """The rules that ``violations.check`` looks at for the same arguments, in table order, broken or not."""
    prover = prover or Prover()
    known = {**{name: value for name, value in quantities.items() if value is not None}, "soc": soc}
    findings = []
    for row in limits_for(operator, soc, versions):
        if row.names <= known.keys() and (row.when is None or row.when(known)):
            value = row.value(known)
            findings.append(Finding(row, as_value(value), row.accepted(known), row.holds(value, known, prover)))
    return findings
