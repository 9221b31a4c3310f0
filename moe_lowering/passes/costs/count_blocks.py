"""What each legal implementation of a block costs, for reports: worked out when somebody asks, never for a decision alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from moe_lowering.custom_ops.sizes import ceil_div
from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.costs.price import price_of
from moe_lowering.passes.costs.tally import peak_bytes
from moe_lowering.passes.costs.work import counted_nodes, work_of
from moe_lowering.passes.costs.workspaces import workspace_bytes
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.legality import Judgement
from moe_lowering.passes.operator_calls import Premises
from moe_lowering.passes.policy import rates_in
from moe_lowering.prices.machines import Sent
from moe_lowering.report.block_costs import BlockCost
from moe_lowering.report.graph_costs import total_cost

Forms = tuple[tuple[str, str, int | None], ...]  # (implementation, form, rows that its operator is told)


def legal_forms(judgement: Judgement, spec: BlockSpec, deployment: Deployment) -> Forms:
    """The form of each legal implementation, with the rows for all T that it was judged for: a graph for several T has room
    for the most."""
    return tuple(
        (name, verdict.form, _told_rows(name, verdict.form, spec, deployment, judgement.premises))
        for name, verdict in judgement.verdicts.items()
        if verdict.legal
    )


def _told_rows(name: str, form: str, spec: BlockSpec, deployment: Deployment, premises: Premises) -> int | None:
    told = IMPLEMENTATIONS[name].form(form, deployment).told_rows
    return None if told is None else told(spec, deployment, premises)


def costs_later(
    forms: Forms, spec: BlockSpec, deployment: Deployment, tokens: int
) -> functools.partial[tuple[BlockCost, ...]]:
    """``block_costs`` with its arguments, without what is only of this process."""
    rest: dict[str, Any] = {"tokens": None, "key": (), "on_shared_rank": False, "collective_groups": frozenset()}
    return functools.partial(block_costs, forms, dataclasses.replace(spec, **rest), deployment, tokens)


@functools.lru_cache(maxsize=64)
def block_costs(forms: Forms, spec: BlockSpec, deployment: Deployment, tokens: int) -> tuple[BlockCost, ...]:
    """Of each form at T = ``tokens``."""
    return tuple(_cost(name, form, rows, spec, deployment, tokens) for name, form, rows in forms)


def _cost(name: str, form: str, rows: int | None, spec: BlockSpec, deployment: Deployment, tokens: int) -> BlockCost:
    rates = rates_in(deployment)
    counted = counted_nodes(name, form, spec, deployment, tokens)
    layer, once = total_cost(counted.nodes), total_cost(counted.constants)
    own = ceil_div(spec.max_tokens or tokens, spec.tp_size)
    works = work_of(counted, spec, own, rates.ranks_per_node)
    sent = sum((work.sent + work.back for work in works), Sent(0, 0))
    price = price_of(name, form, spec, deployment, spec.max_tokens or tokens, rates)
    return BlockCost(
        name,
        form,
        tokens,
        layer.kernels,
        layer.collectives,
        once.kernels,
        layer.moved,
        layer.moved - layer.exchanged,
        sent.within,
        sent.between,
        peak_bytes(counted.nodes),
        workspace_bytes(form, spec, deployment, rows),
        price.us,
        price.error_us,
    )
