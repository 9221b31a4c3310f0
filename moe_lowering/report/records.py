"""The records of a report: what a lowering did with each block and why, what it did not recognise, what cannot be captured.

The pass makes them, ``report.text`` and the command line show them. They hold sizes as expressions until the user's names of
symbols are known; ``to_json`` gives numbers as numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moe_lowering.deployment_detection import Detected
from moe_lowering.limits import TokenRange, Violation
from moe_lowering.limits.wording import Names
from moe_lowering.report.block_costs import BlockCost
from moe_lowering.report.deployment_text import deployment_json
from moe_lowering.report.graphs import GraphNode, graph_text
from moe_lowering.report.leftovers import ForeignMoe, NotCapturable
from moe_lowering.report.module_names import names
from moe_lowering.report.schemas import SCHEMA_VERSION, json_fields, json_value
from moe_lowering.report.sizes import Sizes, fields_of

if TYPE_CHECKING:
    from moe_lowering.deployment import Deployment

# Makes the text of a report. ``report.text`` puts its own here: it reads these records, so that they cannot import it.
renderers: list[Callable[[LoweringReport], str]] = []


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether one implementation is legal for one block, and if not, every rule it breaks.

    ``form`` is the way of writing it down that the verdict is about, e.g. which fused operator. ``ruled_out`` has the
    forms that the deployment alone excludes, and those that would have been preferred to a legal one, by name, with the
    rules that they break; they count for nothing else.
    """

    implementation: str
    violations: tuple[Violation, ...] = ()
    form: str = ""
    ruled_out: tuple[tuple[str, tuple[Violation, ...]], ...] = ()

    @property
    def legal(self) -> bool:
        return not self.violations

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"legal": self.legal, "form": self.form, "violations": _json(self.violations)}
        if self.ruled_out:
            record["ruled_out"] = {form: _json(violations) for form, violations in self.ruled_out}
        return record

    def named(self, names: Names) -> Verdict:
        """The same with the user's names of the symbols."""

        def name(violations: tuple[Violation, ...]) -> tuple[Violation, ...]:
            return tuple(violation.named(names) for violation in violations)

        ruled_out = tuple((form, name(violations)) for form, violations in self.ruled_out)
        return dataclasses.replace(self, violations=name(self.violations), ruled_out=ruled_out)


def _json(violations: tuple[Violation, ...]) -> list[dict[str, Any]]:
    return [violation.to_json() for violation in violations]


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """One MoE block: its name and sizes, its implementation or the reason why it was left, and all verdicts.

    Attributes:
        name: the block's place in the model, e.g. ``model.layers.0.mlp.experts``.
        comm: the implementation it was rewritten to (``allgather``, ``alltoall``, ``mc2``, ``fused_mc2``), None when left alone.
        reason: why this choice, or why the block was left alone.
        ops_before, ops_after: operator names of the block in graph order, e.g. ``moe_lowering.dispatch``.
        verdicts: by implementation name.
        notes: risks and costs that the user should know, e.g. a limit that no device check enforces.
        enforced: the range of T outside of which the lowered graph refuses to run, None when every T is fine.
        sizes: capacity, receive bound and the like of a lowered block; None of one that was left alone.
        count: works out ``costs``; None of a block of which nothing is legal.
        raised_from: the form of other operators that the block was written in, e.g. ``grouped_mm``; "" for the generic ones.
        nodes_before, nodes_after: the block's nodes, in graph order; of one that was left alone, ``nodes_after`` is empty.
    """

    name: str
    comm: str | None
    reason: str
    ops_before: tuple[str, ...]
    ops_after: tuple[str, ...]
    verdicts: dict[str, Verdict]
    notes: tuple[str, ...] = ()
    enforced: TokenRange | None = None
    sizes: Sizes | None = None
    raised_from: str = ""
    count: Callable[[], tuple[BlockCost, ...]] | None = dataclasses.field(default=None, compare=False, repr=False)
    nodes_before: Sequence[GraphNode] = dataclasses.field(default=(), compare=False, repr=False)
    nodes_after: Sequence[GraphNode] = dataclasses.field(default=(), compare=False, repr=False)

    @property
    def costs(self) -> tuple[BlockCost, ...]:
        """What each legal implementation costs, the chosen one first. Counted when it is asked for."""
        costs = () if self.count is None else self.count()
        return tuple(sorted(costs, key=lambda cost: cost.implementation != self.comm))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "comm": self.comm,
            "reason": self.reason,
            "ops_before": list(self.ops_before),
            "ops_after": list(self.ops_after),
            "verdicts": {name: verdict.to_json() for name, verdict in self.verdicts.items()},
            "notes": list(self.notes),
            "enforced": None if self.enforced is None else fields_of(self.enforced),
            "sizes": None if self.sizes is None else self.sizes.to_json(),
            "costs": [cost.to_json() for cost in self.costs],
            "raised_from": self.raised_from,
        }


@dataclasses.dataclass(frozen=True)
class RouterReport:
    """One router of MoE blocks: what it was and what it became.

    Attributes:
        place: the module of the model, or the node's name.
        line: the model's line, ``file:line in function: text``; "" when it is not known.
        was: ``moe_lowering.route``, ``aten`` of a router in the model's own operators, or the operator that it is written with.
        became: the operator, ``aten``, or None of a router that was left as it was.
        reason: why; of one that was left with a code, ``[router.*]`` or that of a limit.
        notes: what is equal to the model's router within rounding only.
    """

    place: str
    line: str
    was: str
    became: str | None
    reason: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.place}: {self.says()}"

    def says(self) -> str:
        """What became of it, why, and the model's line, in words."""
        became = (
            "left as it was"
            if self.became is None
            else f"{_router_words(self.was)} became {_router_words(self.became)}"
        )
        line = f"; at {self.line}" if self.line else ""
        return f"{became}: {self.reason}{line}"

    def to_json(self) -> dict[str, Any]:
        return json_fields(self)


def _router_words(name: str) -> str:
    return "ATen operators" if name == "aten" else name


@dataclasses.dataclass(frozen=True)
class LoweringReport:
    """One run of the pass over one graph.

    Attributes:
        blocks: every MoE block that was recognised, in graph order.
        unrecognised: (place, why) of generic operators that are not part of a recognised block.
        foreign: MoE layers that are not written with the generic operators, one record per layer.
        nodes_before, nodes_after: nodes of the whole graph, and of the graphs inside of it.
        pass_ms: wall time of the pass in milliseconds.
        not_capturable: what keeps the graph from being captured; empty where the deployment does not capture.
        detected: fields of the deployment that were found and not given, and where.
        deployment: what the pass was told of ranks, sizes and versions; None where nothing was run. It takes no part in equality.
        routers: the routers of the blocks, but for those outside of the graph. One that was left costs time and nothing else:
            ``fully_lowered`` does not ask for it, and strict mode does not raise.
    """

    blocks: tuple[BlockReport, ...]
    unrecognised: tuple[tuple[str, str], ...]
    nodes_before: int
    nodes_after: int
    pass_ms: float
    not_capturable: tuple[NotCapturable, ...] = ()
    foreign: tuple[ForeignMoe, ...] = ()
    detected: tuple[Detected, ...] = ()
    routers: tuple[RouterReport, ...] = ()
    deployment: Deployment | None = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        """The report for a person."""
        return renderers[0](self)

    @property
    def graph_before(self) -> str:
        """The nodes of each block before the pass, one a line below the block's name."""
        return graph_text([(block.name, block.nodes_before) for block in self.blocks])

    @property
    def graph_after(self) -> str:
        """The nodes that each block is now; of one that was left alone, those that it was."""
        kept = [
            (b.name, b.nodes_after if b.comm is not None and b.nodes_after else b.nodes_before) for b in self.blocks
        ]
        return graph_text(kept)

    def to_json(self) -> dict[str, Any]:
        """What ``report/schemas/report.json`` describes."""
        fields: dict[str, Any] = json_value(
            {
                "schema_version": SCHEMA_VERSION,
                "blocks": [block.to_json() for block in self.blocks],
                "unrecognised": self.unrecognised,
                "foreign": [layer.to_json() for layer in self.foreign],
                "nodes_before": self.nodes_before,
                "nodes_after": self.nodes_after,
                "pass_ms": self.pass_ms,
                "not_capturable": [finding.to_json() for finding in self.not_capturable],
                "deployment": self.deployment_json(),
                "detected": [dataclasses.asdict(field) for field in self.detected],
                "routers": [router.to_json() for router in self.routers],
            }
        )
        return fields

    def deployment_json(self) -> dict[str, Any] | None:
        """The deployment's fields; None where there is none."""
        return None if self.deployment is None else deployment_json(self.deployment)

    @property
    def fully_lowered(self) -> bool:
        """Whether every MoE layer that the pass can recognise was lowered. True for a graph without any."""
        return not self.unlowered and all(block.comm is not None for block in self.blocks)

    @property
    def unlowered(self) -> list[tuple[str, str]]:
        """(place, why) of all that is MoE and no recognised block; equal foreign layers once, with all their places."""
        alike: dict[ForeignMoe, list[str]] = {}
        for layer in self.foreign:
            why = layer.not_raised and dataclasses.replace(layer.not_raised, node="")
            alike.setdefault(dataclasses.replace(layer, place="", not_raised=why), []).append(layer.place)
        reasons = [
            (names(places), layer.why + (f"; at {layer.line}" if layer.line else "")) for layer, places in alike.items()
        ]
        return [*self.unrecognised, *reasons]
