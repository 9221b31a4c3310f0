"""Sizes of a lowered block for the report, as expressions in T, with the largest value that each may have.

They are read from what the block was judged with and from the limit rows of its calls, so that the report cannot show
another number than the one that was proven.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from moe_lowering.deployment import Deployment
from moe_lowering.limits import Limit, limits_for, needed_buffer_mb
from moe_lowering.limits.wording import as_value
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.context import received_rows
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.implementations.tensor_parallel import tokens_per_rank
from moe_lowering.passes.legality import Judgement, judged_calls
from moe_lowering.report.sizes import Size, Sizes, Window


def block_sizes(spec: BlockSpec, deployment: Deployment, comm: str, judgement: Judgement) -> Sizes:
    """The sizes of a block that was lowered to ``comm``."""
    prover, tokens = judgement.prover, judgement.tokens
    low, high = prover.bounds(tokens)

    def size(value: Any) -> Size:
        return Size(as_value(value), prover.bounds(value)[1])

    form = IMPLEMENTATIONS[comm].form(judgement.form(comm), deployment)
    received = received_rows(spec, tokens)
    if form.keeps_max_rows and spec.max_rows:
        received = torch.sym_min(received, spec.max_rows)
    return Sizes(
        tokens=size(judgement.tokens),
        low=low or 0,
        high=high,
        bound=spec.max_tokens or high,
        capacity=size(tokens_per_rank(spec.max_tokens or tokens, spec)),
        received=size(received),
        exchanged=None if form.lines is None else size(form.lines(spec, tokens)),
        max_output_size=None if form.told_rows is None else form.told_rows(spec, deployment, judgement.premises),
        windows=tuple(
            Window(row.code, needed := size(value), limit, row.unit, needed_buffer_mb(row, needed.most, quantities))
            for row, value, limit, quantities in _window_rules(spec, deployment, comm, judgement)
        ),
        buffer_bytes=deployment.hccl_buffer_bytes,
        tp_size=spec.tp_size,
    )


def _window_rules(
    spec: BlockSpec, deployment: Deployment, comm: str, judgement: Judgement
) -> Iterator[tuple[Limit, Any, int, Mapping[str, Any]]]:
    """(rule, bytes needed, bytes accepted, quantities) of every rule on the HCCL window that depends on the block, once."""
    form = IMPLEMENTATIONS[comm].form(judgement.form(comm), deployment)
    keys: set[tuple[Any, int]] = set()
    for call in judged_calls(comm, form, spec, deployment):
        rows = [row for row in limits_for(call.operator, deployment.soc, deployment.versions) if row.bounds_buffer]
        if not rows:
            continue
        merged = {**judgement.quantities(call, deployment), "soc": deployment.soc}
        known = {name: value for name, value in merged.items() if value is not None}
        for row in rows:
            assert row.max is not None
            if not row.value.names or not row.names <= known.keys() or (row.when is not None and not row.when(known)):
                continue
            value, limit = row.value(known), row.max(known)
            key = as_value(value), limit
            if key not in keys:  # both ends of an exchange have the same rule
                keys.add(key)
                yield row, value, limit, known
