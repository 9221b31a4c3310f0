"""Emits ``assert_agreement`` in front of a graph's first exchange, and makes the records that it compares between ranks.

The record holds all that a decision, an exchange or the result depends on. Some fields matter to a decision only
(``TOLERATED``: where the counts are read, how weights are laid out): they may differ as long as the decisions and the
exchanges are the same, so that one rank may log the load of its experts. A mask may differ likewise if it stays on its own
rank; AllGather and static AllToAll write masked ids as experts past the last one, which the other ranks must expect
(``Form.sends_masks``). With unequal token counts neither T nor what follows from it is in the record; with equal ones a T that
the graph knows is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node

from moe_lowering._versions import installed_version, sources_digest
from moe_lowering.custom_ops import assert_agreement
from moe_lowering.deployment import Deployment
from moe_lowering.identity import identity
from moe_lowering.limits.calls.schemas import LIBRARIES, loaded_libraries
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.costs.cost_model import Cost
from moe_lowering.passes.emission.emitter import COPIED_META
from moe_lowering.passes.graph.arguments import argument, arguments
from moe_lowering.passes.graph.communication import communicates
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.passes.legality import torch_npu_is_loaded
from moe_lowering.passes.operands import Operands
from moe_lowering.report.records import BlockReport

if TYPE_CHECKING:
    from moe_lowering.passes.pipeline import MoeLowering

ASSERT_AGREEMENT = torch.ops.moe_lowering.assert_agreement.default
DISPATCH = torch.ops.moe_lowering.dispatch.default
SHORT = 12  # digits of a digest that are shown
# Fields that differ between ranks (of tensors the device's index, strides), or that the record has in another form. Every
# other field of a block is compared.
OWN = frozenset({"tokens", "key", "ep_group", "tp_group", "on_shared_rank", "collective_groups", "tensors"})
# Fields that may differ as long as the decision and the exchange are the same.
TOLERATED = frozenset(
    {
        "has_mask",  # unless its rows are sent: masked_rows_are_sent
        "stacked",
        "weights_contiguous",
        "counts_are_read",
        "counts_read_before_combine",
        "counts_read_before_weights",
        "scopes_differ",
        "scale_dims",
        "mixed_forms",
    }
)


def settings_record(deployment: Deployment, lowering: MoeLowering | None, ep_group: bool = False) -> dict[str, Any]:
    """What decisions depend on beside the blocks, see ``agreement_records``.

    Args:
        ep_group: the ranks that compare are those of one EP group, so that its name is the same on each. Names of other
            groups are local to a group of ranks: of them only whether there is one.
    """
    fields = deployment.invariant_fields()
    for name in ("mc2_group", "ep_communicator", *(() if ep_group else ("ep_group",))):
        fields[name] = bool(fields[name])
    return {
        "deployment": fields,
        "misplaced": deployment.misplaced,
        "settings": _settings(lowering) if lowering else {},
        "torch_npu": torch_npu_is_loaded(),
        "libraries": sorted(f"{LIBRARIES[name]}::{name}" for name in loaded_libraries()),
        "version": _versions_text(),
        "code": sources_digest()[:SHORT],
        "limits": sources_digest((".toml",))[:SHORT],
    }


def _versions_text() -> str:
    """Of this package, and of what registers the operators that it emits."""
    torch_npu = installed_version("torch_npu")
    return (
        f"{installed_version('moe-lowering')} with torch {torch.__version__}{torch_npu and f', torch_npu {torch_npu}'}"
    )


def _settings(lowering: MoeLowering) -> dict[str, str]:
    policy = lowering.policy
    flags = {name: str(getattr(lowering, name)) for name in ("strict", "overlap", "raise_foreign")}
    return {"comm": policy.comm, "policy": policy.name, "cost": _cost(policy.cost), **flags}


def _cost(cost: Cost | None) -> str:
    """A cost function as text: what it does and holds, where that can be compared between processes."""
    if cost is None:
        return "the package's own prices"
    name = f"{cost.__module__}.{getattr(cost, '__qualname__', type(cost).__name__)}"
    text = identity(cost)
    return name if "unique(" in text else f"{name} ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def first_exchange(graph: Graph) -> tuple[Node, dict[str, Any]] | None:
    """The x of the first ``dispatch`` that exchanges tokens with other ranks, and the call's source metadata.

    None when none does, or the graph has the check already.
    """
    if graph.find_nodes(op="call_function", target=ASSERT_AGREEMENT):
        return None  # the pass has run on this graph before
    for node in graph.find_nodes(op="call_function", target=DISPATCH):
        if _exchanges(node):
            return argument(node, "x"), source_meta(node)
    return None


def source_meta(node: Node) -> dict[str, Any]:
    """What says where in the model a node comes from."""
    return {key: node.meta[key] for key in COPIED_META if key in node.meta}


def emit_check(
    graph: Graph,
    first: tuple[Node, dict[str, Any]],
    group: str,
    timeout: float | str,
    settings: dict[str, Any],
    blocks: dict[str, Any],
) -> Node:
    """The new node, right after the x of ``first`` and before every node of the block that reads it.

    Args:
        first: what ``first_exchange`` found.
        timeout: seconds, or ``auto``.
    """
    x, source = first
    position = x.next
    while position.op == "placeholder":
        position = position.next
    texts = (json.dumps(settings, sort_keys=True), json.dumps(blocks, sort_keys=True))
    seconds = assert_agreement.PATIENT if isinstance(timeout, str) else float(timeout)
    with graph.inserting_before(position):
        node = graph.call_function(ASSERT_AGREEMENT, (x, group, seconds, *texts))
    node.meta.update(source, val=None)
    assert_agreement.expect(group, *texts)
    return node


@dataclasses.dataclass(frozen=True)
class BlockOutcome:
    """What became of one block.

    Attributes:
        block, report: the block, and what is said of it.
        created: the nodes that a lowered block consists of.
        refuses: the graph refuses to run for its sake.
    """

    block: Block
    report: BlockReport
    created: Sequence[Node]
    refuses: bool


def blocks_record(
    outcomes: Iterable[BlockOutcome], left: Iterable[Node], untouched: Iterable[BlockReport], deployment: Deployment
) -> dict[str, Any]:
    """The blocks of one graph that exchange tokens, in order, then the generic operators that belong to no block, then
    layers that others wrote and that are left."""
    kinds: dict[str, int] = {}
    written: list[dict[str, Any]] = []
    indices: dict[Any, int] = {}
    order: list[int] = []
    refuses = ""
    for outcome in outcomes:
        if outcome.block.spec.ep_size == 1:
            continue
        key = (outcome.block.spec, outcome.report.comm, outcome.report.reason, outcome.refuses)
        if key not in indices:
            indices[key] = _add(kinds, written, _outcome_record(outcome, deployment))
        order.append(indices[key])
        refuses = refuses or (outcome.report.reason if outcome.refuses else "")
    order += [_add(kinds, written, _left_record(node)) for node in left if _exchanges(node)]
    # once each: with such layers alone, a graph break on one rank changes no exchange
    order += dict.fromkeys(_add(kinds, written, _untouched_record(report)) for report in untouched)
    return {
        "equal_tokens": deployment.equal_tokens,
        "kinds": written,
        "order": [[index, len(list(run))] for index, run in itertools.groupby(order)],
        "refuses": refuses,
    }


def _add(kinds: dict[str, int], written: list[dict[str, Any]], kind: dict[str, Any]) -> int:
    """The index of a kind, by what must be the same on every rank."""
    text = json.dumps(kind["strict"], sort_keys=True)
    if text not in kinds:
        kinds[text] = len(written)
        written.append(kind)
    return kinds[text]


def _outcome_record(outcome: BlockOutcome, deployment: Deployment) -> dict[str, Any]:
    spec, report = outcome.block.spec, outcome.report
    fields = {f.name: _as_json(getattr(spec, f.name)) for f in dataclasses.fields(spec) if f.name not in OWN}
    strict = {name: value for name, value in fields.items() if name not in TOLERATED}
    tolerated = {name: value for name, value in fields.items() if name in TOLERATED}
    computed = [f.name for f in dataclasses.fields(spec.tensors) if not _are_stored(getattr(spec.tensors, f.name))]
    tolerated |= {"computed_by_the_graph": computed}
    strict["masked_rows_are_sent"] = spec.has_mask and _sends_masks(report, deployment)
    tolerated |= {"name": report.name, "reason": report.reason, "collectives": _other_collectives(spec, deployment)}
    if report.comm is not None:
        form = report.verdicts[report.comm].form
        strict["implementation"] = report.comm if form in ("", report.comm) else f"{report.comm} ({form})"
        strict["exchange"] = [_operator(node) for node in outcome.created if communicates(node)]
    else:
        strict["implementation"] = "none: the graph refuses to run" if outcome.refuses else "none: left generic"
        strict["exchange"] = []
    if deployment.equal_tokens:
        strict["T"] = spec.tokens if isinstance(spec.tokens, int) else str(report.enforced or "any")
    return {"strict": strict, "told": tolerated}


def _are_stored(tensors: Operands) -> bool:
    return all(kind.stored for kind in tensors.kinds)


def _left_record(node: Node) -> dict[str, Any]:
    """The record of a generic operator that belongs to no block: its numbers and words, without the names of groups
    that are local."""
    values = arguments(node).items()
    strict = {name: v for name, v in values if isinstance(v, (bool, int, float, str)) and not name.endswith("_group")}
    strict.pop("on_shared_rank", None)
    return {"strict": {**strict, "exchange": [_operator(node)]}, "told": {"name": node.name}}


def _untouched_record(report: BlockReport) -> dict[str, Any]:
    """The record of a layer that others wrote, whose exchange is the model's own."""
    strict = {"implementation": "none: left as it was written", "exchange": []}
    return {"strict": strict, "told": {"name": report.name, "reason": report.reason}}


def _exchanges(node: Node) -> bool:
    """Whether a node is a generic operator that exchanges tokens with other ranks."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "moe_lowering":
        return False
    return bool(arguments(node).get("ep_size", 1) != 1)


def _other_collectives(spec: BlockSpec, deployment: Deployment) -> list[str]:
    """Which of the deployment's groups other collectives of the graph use."""
    names = ("ep_group", "mc2_group", "tp_group")
    return [name for name in names if getattr(deployment, name) in spec.collective_groups]


def _operator(node: Node) -> str:
    """Name and dtype of what is sent, e.g. ``_c10d_functional.all_gather_into_tensor bfloat16``."""
    values: Iterator[Any] = (a.meta.get("val") for a in node.all_input_nodes)
    sent = next((v for v in values if isinstance(v, torch.Tensor)), None)
    name = str(node.target).removesuffix(".default")
    return name if sent is None else f"{name} {_as_json(sent.dtype)}"


def _as_json(value: Any) -> Any:
    """As JSON holds it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (tuple, list)):
        return [_as_json(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _sends_masks(report: BlockReport, deployment: Deployment) -> bool:
    """Whether others get something of a rank's mask; the generic operators, which are left, send none."""
    if report.comm is None:
        return False
    return IMPLEMENTATIONS[report.comm].form(report.verdicts[report.comm].form, deployment).sends_masks
