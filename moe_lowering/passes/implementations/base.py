"""What an implementation of a block is: its forms, the calls whose limits bind each, and how each is emitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import Node

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.emitting import Emitter


@dataclasses.dataclass(frozen=True)
class Replacement:
    """The nodes that stand for a block's results: y, and the counts when something else reads them."""

    y: Node
    counts: Node | None


@dataclasses.dataclass(frozen=True)
class Call:
    """One operator that a form would call, or a set of rules without one, such as ``alltoall.static``.

    ``given`` holds the quantities of this call where they are not the block's own (``quantities.block_quantities``);
    None takes one away, which no rule then reads.
    """

    operator: str
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to write an implementation down.

    Attributes:
        name: its name in verdicts and reports.
        calls: the calls that it would make for a block; their rows in ``limits/data`` are judged.
        emit: emits the replacement. The last argument are the quantities that the block was judged with.
        note: what the user should know of its cost at a number of tokens, for the report.
        sends_masks: other ranks get something of this rank's mask, so that all must have one or none. Without it the rows of
            masked tokens stay on their rank.
        keeps_max_rows: it has room for ``max_rows`` rows and no more; the others for every row that could arrive.
    """

    name: str
    calls: Callable[[BlockSpec, Deployment], tuple[Call, ...]]
    emit: Callable[[Block, Emitter, Deployment, dict[str, Any]], Replacement]
    note: Callable[[BlockSpec, Deployment, int], str] | None = None
    sends_masks: bool = True
    keeps_max_rows: bool = False


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to communicate.

    Attributes:
        name: its name in configuration, report and tests.
        forms: in order of preference, for a deployment; at least one. The first legal one is taken.
        ruled_out: forms that the deployment alone excludes: never taken, judged for the reason.
        is_one_operator: it hides its communication and its matmuls in one operator, beside which nothing can be run.
    """

    name: str
    forms: Callable[[Deployment], tuple[Form, ...]]
    ruled_out: Callable[[Deployment], tuple[Form, ...]] = lambda deployment: ()
    is_one_operator: bool = False

    def form(self, name: str, deployment: Deployment) -> Form:
        """The form of that name."""
        return next(form for form in self.forms(deployment) if form.name == name)


def result_quantities(spec: BlockSpec, **more: Any) -> dict[str, Any]:
    """Quantities of a call on rows in the dtype of the block's result, which x need not have (int8 with scales)."""
    return {"x_dtype": str(spec.dtype).removeprefix("torch."), **more}


def unpermute_call(spec: BlockSpec) -> Call:
    """``npu_moe_token_unpermute``, which gets the routing weights in the dtype of the rows."""
    return Call(
        "npu_moe_token_unpermute", result_quantities(spec, weights_dtype=str(spec.dtype).removeprefix("torch."))
    )


def stage_after(block: Block, node: Node) -> Node:
    """The first stage of the block at which ``node`` exists. Anywhere between two stages another scope may be open."""
    return next(stage for stage in (block.dispatch, block.mlp, block.combine) if node < stage)
