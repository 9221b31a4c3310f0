"""What each rank does for the matrix: make a block's graph, lower it, and run what came out.

The block is written with the generic operators and this rank's part of the experts, and traced under fake tensors. A
graph serves all scenarios whose shapes are equal. Everything that is returned can be pickled.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moe_lowering import simulator
from moe_lowering.deployment import Deployment
from moe_lowering.functional import moe_experts
from moe_lowering.matrix.cells import DTYPE, EXPERTS, SCENARIOS, TOKENS, Inputs, Scenario, expert_weights
from moe_lowering.matrix.forms import FORMS, Layout, WeightForm
from moe_lowering.passes.pipeline import MoeLowering
from moe_lowering.passes.verifier import generic_nodes, repropagate


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs of one rank in one scenario. A negative control changes them.

    Attributes:
        deployment: what the pass is told.
        inputs: what the block is given.
        weights: this rank's experts, by argument of ``grouped_mlp``; ``quantisation``: their format.
    """

    deployment: Deployment
    inputs: Inputs
    weights: dict[str, list[Tensor]]
    quantisation: str


Change = Callable[[Case], Case]


@dataclasses.dataclass
class CellOutcome:
    """What came of one scenario on one rank.

    Attributes:
        comm, form: what the block was lowered to; None when it was refused.
        codes: of the rules that the implementation breaks.
        reason: the pass's words, and those of the broken rules.
        problems: what should not be: an unexpected operator, a changed graph, an exception.
        y, counts: results of the lowered graph.
        broke: it raised while it ran: other ranks may wait for this one.
    """

    comm: str | None = None
    form: str | None = None
    codes: tuple[str, ...] = ()
    reason: str = ""
    problems: tuple[str, ...] = ()
    y: Tensor | None = None
    counts: Tensor | None = None
    broke: bool = False


def setup() -> None:
    """In each process of a pool."""
    simulator.enable("A3")
    logging.getLogger("moe_lowering").setLevel(logging.CRITICAL)  # a refusal is a result of the cell, not a failure


def run(
    rank: int, axes: tuple[str, int, str], requests: Sequence[tuple[str, str, Layout]], change: Change | None = None
) -> list[CellOutcome]:
    """The outcomes of (form, scenario, layout of the weights) in order; ``axes`` are what these share: weight format, TP size
    and ``Deployment.unpermute_operator``.

    After an exception while a graph runs, ranks are out of step: the list ends there.
    """
    tracer = _Tracer()
    lowered: dict[Any, _Lowered] = {}
    outcomes: list[CellOutcome] = []
    for form, scenario, layout in requests:
        outcome = CellOutcome()
        outcomes.append(outcome)
        try:
            case = _case(rank, FORMS[form], axes, SCENARIOS[scenario], layout)
        except ValueError as error:  # there can be no such deployment
            outcome.codes, outcome.reason = ("Deployment",), str(error)
            continue
        case = case if change is None else change(case)
        key = (form, case.deployment, tracer.key(case, SCENARIOS[scenario]))
        if key not in lowered:
            gm = tracer.block(case, SCENARIOS[scenario])
            # slow, and graphs of other world sizes differ in sizes only
            check = rank == 0 and case.deployment.ep_size == 2
            operators = (*FORMS[form].operators, *FORMS[form].unpermuting(axes[2]))
            lowered[key] = _lower(FORMS[form], operators, case.deployment, gm, check)
        graph, answer = lowered[key].gm, lowered[key].outcome
        outcome = outcomes[-1] = dataclasses.replace(answer)
        if graph is None:
            continue
        try:
            outcome.y, outcome.counts = (*graph(*_flat(case)), None)[:2]
        except Exception:
            outcome.problems += (traceback.format_exc(limit=-4),)
            outcome.broke = True
            break
    return outcomes


# ------------------------------------------------------------------------------------------------------------- the case


def _deployment(
    rank: int, form: WeightForm, tp: int, unpermute_operator: str, scenario: Scenario, layout: Layout
) -> Deployment:
    """Raises ValueError where there can be no such deployment."""
    ep = dist.get_world_size()
    groups = _groups(tp if ep % tp == 0 else 1)
    fields = form.deployment_fields(layout)
    if scenario.unequal:
        fields.update(equal_tokens=False, max_tokens=TOKENS, min_tokens=0 if scenario.idle else 1)
    if scenario.symbolic:
        fields.update(max_tokens=TOKENS, guards="forbid")  # guards would narrow the symbol, which graphs share
    if scenario.padded:
        fields.update(mask_is_prefix=True)
    return Deployment(
        ep_size=ep,
        ep_rank=rank,
        ep_group=groups["ep"] if ep > 1 else "",
        mc2_group=groups["mc2"],
        tp_size=tp,
        tp_rank=rank % tp,
        tp_group=groups.get("tp", ""),
        unpermute_operator=unpermute_operator,
        **{"installed": (), **fields},
    )


@functools.cache
def _groups(tp: int) -> dict[str, str]:
    """Names of this rank's process groups. Every rank makes all groups of all ranks, once."""
    size, rank = dist.get_world_size(), dist.get_rank()
    world = dist.group.WORLD
    assert world is not None  # these ranks were started as one group
    names = {"ep": world.group_name, "mc2": _second_group()}
    if tp > 1:
        teams = [dist.new_group(range(first, first + tp)) for first in range(0, size, tp)]
        names["tp"] = teams[rank // tp].group_name
    return names


@functools.cache
def _second_group() -> str:
    return dist.new_group(range(dist.get_world_size())).group_name


def _case(rank: int, form: WeightForm, axes: tuple[str, int, str], scenario: Scenario, layout: Layout) -> Case:
    quantisation, tp, unpermute_operator = axes
    where = _deployment(rank, form, tp, unpermute_operator, scenario, layout)
    inputs = scenario.inputs(rank // tp, where.ep_size // tp)
    return Case(where, inputs, _own_weights(layout.lists, quantisation), quantisation)


@functools.lru_cache(maxsize=2)
def _own_weights(lists: bool, quantisation: str) -> dict[str, list[Tensor]]:
    """This rank's experts, stacked or each by itself."""
    local = EXPERTS // dist.get_world_size()
    first = dist.get_rank() * local
    own = {name: tensor[first : first + local] for name, tensor in expert_weights(quantisation).items()}
    # Copies: a fake of a view takes several times as long as one of a tensor with memory of its own
    return {name: [t.clone() for t in tensor] if lists else [tensor.clone()] for name, tensor in own.items()}


# ------------------------------------------------------------------------------------------------------------ the graph


@dataclasses.dataclass
class _Lowered:
    gm: GraphModule | None
    outcome: CellOutcome


def _flat(case: Case) -> list[Tensor]:
    inputs = case.inputs
    tensors = [inputs.x, inputs.weights, inputs.ids, *_optional(inputs).values()]
    return tensors + [tensor for name in sorted(case.weights) for tensor in case.weights[name]]


def _optional(inputs: Inputs) -> dict[str, Tensor]:
    """What not every scenario has, by argument of ``moe_experts``."""
    tensors = {"mask": inputs.mask, "pertoken_scale": inputs.scale, "log2phy": inputs.log2phy}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _block(case: Case, scenario: Scenario) -> Callable[..., tuple[Tensor, ...]]:
    """The block as a function of ``_flat(case)``."""
    shapes = [(name, len(case.weights[name])) for name in sorted(case.weights)]
    names = list(_optional(case.inputs))
    options: dict[str, Any] = {"deployment": case.deployment, "quantisation": case.quantisation}
    if scenario.quantised:
        options["out_dtype"] = DTYPE
    if scenario.on_input:
        options["apply_router_weight_on_input"] = True

    def block(x: Tensor, weights: Tensor, ids: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        arguments: dict[str, Any] = {**options, **dict(zip(names, rest, strict=False))}
        left = list(rest[len(names) :])
        for name, count in shapes:
            arguments[name], left = left[:count], left[count:]
        if not scenario.counts:
            return (moe_experts(x, weights, ids, **arguments),)
        return moe_experts(x, weights, ids, **arguments, return_counts=True)[:2]

    return block


class _Tracer:
    """Graphs of the generic block. One is made for all cases whose graph is the same, and copied for each."""

    def __init__(self) -> None:
        self._traced: dict[Any, GraphModule] = {}
        self._static = FakeTensorMode()

    def block(self, case: Case, scenario: Scenario) -> GraphModule:
        key = self.key(case, scenario)
        if key not in self._traced:
            symbolic = _any_tokens(case, scenario)
            fakes = self._symbolic_inputs(case) if symbolic else map(self._static.from_tensor, _flat(case))
            self._traced[key] = make_fx(_block(case, scenario))(*fakes)
        return GraphModule(torch.nn.Module(), copy.deepcopy(self._traced[key].graph))

    def key(self, case: Case, scenario: Scenario) -> tuple[Any, ...]:
        """What of a case is in the graph of the generic block."""
        where, inputs = case.deployment, case.inputs
        weights = tuple((name, len(ts), ts[0].shape, ts[0].dtype) for name, ts in sorted(case.weights.items()))
        tokens = None if _any_tokens(case, scenario) else len(inputs.x)
        options = (scenario.counts, scenario.quantised, scenario.on_input)
        block = (tokens, tuple(_optional(inputs)), inputs.ids.shape[1], weights, *options)
        return (*block, where.ep_group, where.tp_size, where.tp_group, where.token_bound, where.max_rows)

    def _symbolic_inputs(self, case: Case) -> Iterator[Tensor]:
        """Fakes with one symbol for T, which is ``TOKENS`` in the meantime."""
        mode = FakeTensorMode(shape_env=ShapeEnv())
        per_token = 3 if case.inputs.mask is None else 4
        for at, tensor in enumerate(_flat(case)):
            sizes = [DimDynamic.STATIC] * tensor.dim()
            if at < per_token:
                sizes[0] = DimDynamic.DUCK
                tensor = tensor.new_empty((TOKENS, *tensor.shape[1:]))
            context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
            yield mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(f"input_{at}"))


def _any_tokens(case: Case, scenario: Scenario) -> bool:
    """Whether the graph is made for any T. Where a TP rank has one token at most, a guard keeps that graph from running:
    there it is made for its T alone, as dynamo would make it."""
    tp = case.deployment.tp_size
    return scenario.symbolic and (tp == 1 or len(case.inputs.x) > tp)


def _lower(form: WeightForm, expected: Sequence[str], deployment: Deployment, gm: GraphModule, check: bool) -> _Lowered:
    """The lowered graph, in which operators are ``expected``, or why there is none; ``check`` re-propagates fake tensors
    through it."""
    before, nodes = gm.code, list(gm.graph.nodes)
    tokens = nodes[0].meta["val"].shape[0]
    lowering = MoeLowering(deployment, form.comm, policy="fixed")
    lowering(gm, agreement_timeout=None)  # the outcomes of the ranks are compared here, and a refused graph with itself
    report = lowering.reports[-1]
    if len(report.blocks) != 1:
        return _Lowered(None, CellOutcome(problems=(f"not one block: {report.blocks}, {report.unrecognised}",)))
    block = report.blocks[0]
    verdict = block.verdicts.get(form.comm)
    outcome = CellOutcome(comm=block.comm, reason=block.reason)
    if block.comm is None:
        violations = () if verdict is None else verdict.violations
        outcome.codes = tuple(dict.fromkeys(v.code for v in violations))
        outcome.reason = "; ".join([block.reason, *(str(v) for v in violations)])
        if gm.code != before or list(gm.graph.nodes) != nodes:
            outcome.problems += ("refused, and the graph was changed",)
        return _Lowered(None, outcome)
    outcome.form = None if verdict is None else verdict.form
    operators = {_name(node.target) for node in gm.graph.nodes}
    outcome.problems += tuple(f"{name} is not in the graph" for name in expected if name not in operators)
    if generic_nodes(gm.graph.nodes):
        outcome.problems += ("a generic operator is left in the graph",)
    if check:
        repropagate(gm)
    if isinstance(tokens, torch.SymInt) and tokens.node.maybe_as_int() is not None:
        outcome.problems += (f"the graph for any T became one for T = {tokens}",)
    return _Lowered(gm, outcome)


def _name(target: Any) -> str:
    return target._schema.name.replace("::", ".") if isinstance(target, torch._ops.OpOverload) else ""
