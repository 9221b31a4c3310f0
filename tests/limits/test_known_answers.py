"""``check`` evaluates no row twice for the same plain quantities, and takes nothing else for the same."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_lowering.limits import check, limits_for, violations
from moe_lowering.limits.violations import _rules

SOC = "A3"


def quantities_of(operator: str, soc: str) -> dict[str, Any]:
    """Something for every quantity that the rows of an operator read."""
    return {name: 3 for row in limits_for(operator, soc) for name in row.names if name != "soc"}


def rows_evaluated(operator: str, soc: str, quantities: dict[str, Any], versions: Any = None) -> tuple[int, list[str]]:
    with mock.patch.object(violations, "_violation", wraps=violations._violation) as evaluated:
        broken = check(operator, soc, quantities, versions=versions)
    return evaluated.call_count, [violation.code for violation in broken]


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    _rules.cache_clear()


@pytest.mark.parametrize("operator", ["npu_moe_distribute_dispatch_v2", "deployment", "npu_grouped_matmul"])
def test_the_same_quantities_are_answered_without_a_row(operator: str) -> None:
    quantities = quantities_of(operator, SOC)
    first, broken = rows_evaluated(operator, SOC, quantities)
    assert first > 0
    assert broken
    again, same = rows_evaluated(operator, SOC, dict(quantities))
    assert (again, same) == (0, broken)


def change(quantities: dict[str, Any]) -> dict[str, dict[str, Any]]:
    name = next(iter(quantities))
    return {
        "another value": {**quantities, name: 4},
        "another type": {**quantities, name: True},
        "absent": {key: value for key, value in quantities.items() if key != name},
        "None": {**quantities, name: None},
    }


@pytest.mark.parametrize("how", ["another value", "another type", "absent", "None"])
def test_other_quantities_are_evaluated(how: str) -> None:
    quantities = dict.fromkeys(quantities_of("npu_grouped_matmul", SOC), 1)
    rows_evaluated("npu_grouped_matmul", SOC, quantities)
    assert rows_evaluated("npu_grouped_matmul", SOC, change(quantities)[how])[0] > 0


def test_another_soc_operator_or_version_is_evaluated() -> None:
    quantities = quantities_of("npu_grouped_matmul", SOC)
    rows_evaluated("npu_grouped_matmul", SOC, quantities)
    assert rows_evaluated("npu_grouped_matmul", "A5", quantities)[0] > 0
    assert rows_evaluated("npu_grouped_matmul", SOC, quantities, {"cann": "8.5"})[0] > 0


def test_what_is_proven_of_a_symbol_is_asked_again() -> None:
    """It depends on what the ShapeEnv knows, which a guard changes."""
    env = ShapeEnv()
    quantities = {**quantities_of("npu_moe_distribute_dispatch_v2", SOC), "tokens": env.create_unbacked_symint()}
    first, _ = rows_evaluated("npu_moe_distribute_dispatch_v2", SOC, quantities)
    assert rows_evaluated("npu_moe_distribute_dispatch_v2", SOC, quantities)[0] == first > 0
    assert isinstance(quantities["tokens"], torch.SymInt)


def test_an_answer_belongs_to_who_asked() -> None:
    quantities = quantities_of("deployment", SOC)
    check("deployment", SOC, quantities).clear()
    assert check("deployment", SOC, quantities)


def test_no_more_than_so_many_answers_are_kept() -> None:
    with mock.patch.object(violations, "_MOST_KNOWN", 2):
        for number in range(4):
            check("deployment", SOC, {**quantities_of("deployment", SOC), "ep_size": number})
    assert len(_rules("deployment", SOC, ()).known) == 2
