"""AllToAll: results go back to the ranks whose tokens they are by all_to_all. Three forms.

``exact``    rows are exchanged, as many as there are (``alltoall_exact``): needs their numbers on the host.
``static``   equal splits, so that nothing is sized by data, by token:

    all_gather > init_routing_v2 (own experts only) > MLP > token_unpermute > all_to_all > sum over the ranks

``buffers``  equal splits by row, in buffers of ``max_rows`` lines (``alltoall_buffers``): where that is less than the rows
             that a rank may have for another one.

Why by token. With equal splits each rank sends every other one as much as it may ever have for it. By row that is a line
for each of a token's min(k, E_local) experts there; but all those lines are one token, and their results are one weighted
sum. So a rank needs M lines at most, of which any may be used: line t is token t, and no sort is needed to fill it. Then
all ranks are sent the same M lines, and the exchange is an all_gather. What comes back is the sums over the experts of
each rank, M lines again, not min(k, E_local) times as many; they are added here, and rounded once, where AllGather adds
them on the way.
Collectives that take counts get one-dimensional tensors: the kernel that torch_npu puts in their place inside graphs takes
element counts as row counts when there are more dimensions.
Sources: vllm_ascend.token_dispatcher: the exact-split form; wheel.all_to_all: the counts.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.number_words import megabytes
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.context import most_tokens
from moe_lowering.passes.emission.emitter import Emitter, aten
from moe_lowering.passes.implementations import alltoall_exact
from moe_lowering.passes.implementations.alltoall_buffers import BUFFERS, sized_by_data
from moe_lowering.passes.implementations.base import Form, Implementation, Replacement
from moe_lowering.passes.implementations.gathered import (
    Partial,
    emit_partial,
    gathered_bytes,
    gathered_calls,
    gathered_words,
)
from moe_lowering.passes.implementations.tensor_parallel import first_tokens, gather, tokens_per_rank
from moe_lowering.passes.operator_calls import OperatorCall, Premises, Rules

c10d = torch.ops._c10d_functional


def _calls(spec: BlockSpec, deployment: Deployment) -> tuple[OperatorCall | Rules, ...]:
    rules = Rules("alltoall.static", lambda premises: _static_rules(spec, deployment, premises))
    return (rules, *gathered_calls(spec, deployment))


def _static_rules(spec: BlockSpec, deployment: Deployment, premises: Premises) -> dict[str, Any]:
    return {
        "max_rows": spec.max_rows,
        "buffers_are_shorter": _buffers_are_shorter(spec, deployment, premises),
        **gathered_words(spec, deployment),
        "data_dependent_capacity": sized_by_data(spec, premises),
    }


def _buffers_are_shorter(spec: BlockSpec, deployment: Deployment, premises: Premises) -> bool:
    """Whether ``max_rows`` is less than the rows that a rank may have for another one, or may be: T has no bound.

    Not in GE mode where T varies: torchair converts no minimum of sizes.
    """
    if deployment.mode == "ge" and not spec.max_tokens and not isinstance(premises.own_tokens, int):
        return False
    if not spec.max_rows:
        return False
    most = most_tokens(spec, premises)
    return most is None or spec.max_rows < most * min(spec.top_k, spec.local_experts)


def _emit(block: Block, emit: Emitter, deployment: Deployment, premises: Premises) -> Replacement:
    partial = emit_partial(block, emit, deployment)
    with emit.at(block.combine, block.combine):
        y = _bring_home(emit, block.spec, partial, deployment)
        return Replacement(emit.like(gather(emit, block, y), block.x), partial.counts)


def _bring_home(emit: Emitter, spec: BlockSpec, partial: Partial, deployment: Deployment) -> Node:
    """This rank's own tokens [M, H], added up over the ranks that computed their experts."""
    lines = tokens_per_rank(spec.max_tokens, spec) if spec.max_tokens else emit.size(partial.own, 0)
    size = lines * spec.hidden if isinstance(lines, int) else emit.call(operator.mul, lines, spec.hidden)
    flat, splits = emit.call(aten.reshape.default, partial.y, [-1]), [size] * spec.ep_size
    swapped = emit.call(c10d.all_to_all_single.default, flat, splits, splits, spec.ep_group)
    arrived = emit.call(c10d.wait_tensor.default, swapped)
    sums = emit.call(aten.reshape.default, arrived, [spec.ep_size, lines, spec.hidden])
    if deployment.mode == "ge":  # ReduceSum of GE rounds to its input's dtype on the way
        sums = emit.cast(sums, torch.float32)
    y = emit.cast(emit.call(aten.sum.dim_IntList, sums, [0]), spec.dtype)
    return first_tokens(emit, y, partial.own) if spec.max_tokens else y


def _note(spec: BlockSpec, deployment: Deployment, tokens: int) -> str:
    """A note for the report on what equal splits cost: bytes that one rank receives and sends back, and how many of
    these are its own."""
    out, back = gathered_bytes(spec, deployment), spec.hidden * int(spec.dtype.itemsize)
    own = tokens_per_rank(spec.max_tokens or tokens, spec)
    lines = spec.ep_size * own
    return (
        f"equal splits send every token to every rank, as AllGather does: {megabytes(lines * out)} per rank to the experts "
        f"and {megabytes(lines * back)} back at {tokens} tokens, of which {megabytes(own * out)} and "
        f"{megabytes(own * back)} are its own"
    )


def _row_count(spec: BlockSpec, tokens: Any) -> Any:
    return tokens_per_rank(spec.max_tokens or tokens, spec)


STATIC = Form("static", _calls, _emit, _note, _row_count)


def _forms(deployment: Deployment) -> tuple[Form, ...]:
    return (STATIC, BUFFERS) if alltoall_exact.needs_no_host(deployment) else (alltoall_exact.EXACT, STATIC, BUFFERS)


def _forms_ruled_out(deployment: Deployment) -> tuple[Form, ...]:
    return (alltoall_exact.EXACT,) if alltoall_exact.needs_no_host(deployment) else ()


def _rules(spec: BlockSpec, deployment: Deployment) -> Rules:
    return Rules("alltoall", {"ep_size": spec.ep_size, "shared_expert_rank_num": spec.shared_expert_ranks})


ALLTOALL = Implementation("alltoall", _rules, _forms, _forms_ruled_out)
