"""A block's replacement, emitted for counting: by the implementation's own ``emit``, into a graph that nobody compiles.

Tensors are on device meta, so that ATen's own functions give views in a few microseconds; what they are slow at comes
from ``aten_results``, what Ascend operators give from ``operator_results``, so that neither torch_npu nor an NPU is
needed. What is counted is the same on every rank: the block as a rank with routed experts sees it, with names of groups
that no process has.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_lowering.custom_ops.combine import CombineCall
from moe_lowering.custom_ops.dispatch import DispatchCall
from moe_lowering.custom_ops.grouped_mlp import GroupedMlpCall
from moe_lowering.deployment import Deployment
from moe_lowering.limits import Prover
from moe_lowering.limits.calls.schemas import complete, schema
from moe_lowering.passes.blocks import Block, BlockSpec
from moe_lowering.passes.costs.aten_results import ATEN_RESULTS
from moe_lowering.passes.costs.operator_results import IN_A_LIST, RESULTS, collective_result
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.implementations.base import Form
from moe_lowering.passes.operands import ExpertOperands, Operand, Operands
from moe_lowering.passes.operator_calls import Premises
from moe_lowering.report.graph_costs import read_traffic

OPS = torch.ops.moe_lowering


class CountedOperator:
    """An Ascend operator by its name, as the target of a node: what ``graph_costs`` reads of an overload, and its results."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self._schema = schema(name)
        self.namespace = str(self._schema.name).split("::")[0]
        self._parameters = [argument.name for argument in self._schema.arguments]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = complete(self.__name__, {**dict(zip(self._parameters, args, strict=False)), **kwargs})
        outputs = [_empty(shape, dtype) for shape, dtype in RESULTS[self.__name__](bound)]
        if self.__name__ in IN_A_LIST:
            return outputs
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


@functools.cache
def _counted(name: str) -> CountedOperator:
    return CountedOperator(name)


def _empty(shape: tuple[Any, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Tally(Emitter):
    """An emitter whose nodes are counted and not compiled."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, None)  # type: ignore[arg-type]  # `_value` is its own, and reads no mode

    def target(self, operator: str) -> Any:
        return _counted(operator)

    def _value(self, node: Node, target: Any, args: tuple[Any, ...]) -> Any:
        return self._compute(node)

    def _compute(self, node: Node) -> Any:
        args: Any
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        target: Any = node.target
        if getattr(target, "namespace", "") == "_c10d_functional":
            return collective_result(target._schema.name.split("::")[1], *args)
        return ATEN_RESULTS.get(target, target)(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Counted:
    """The nodes that a form emits for a block: those of every layer, and the constants that all layers share."""

    nodes: list[Node]
    constants: list[Node]


def neutral(deployment: Deployment) -> Deployment:
    """The deployment as the last rank has it, with groups that no process has: nothing of a rank's own is left."""
    return deployment.replace(
        ep_group="counted ep" if deployment.ep_size > 1 else "",
        tp_group="counted tp" if deployment.tp_size > 1 else "",
        mc2_group="counted mc2" if deployment.mc2_group else "",
        ep_rank=deployment.ep_size - 1,
        tp_rank=0,
        detected=(),
    )


def count_form(form: Form, spec: BlockSpec, deployment: Deployment, tokens: int) -> Counted:
    """Emit a form of a block at T = ``tokens``, an int.

    Args:
        deployment: ``neutral``.
    """
    spec = dataclasses.replace(spec, tokens=tokens, on_shared_rank=False)
    graph = Graph()
    block = _block(graph, spec)
    emit = Tally(graph)
    form.emit(block, emit, deployment, Premises(tokens, tokens, Prover()))
    return Counted(emit.created, [node for node in emit.made if node not in emit.created])


def _block(graph: Graph, spec: BlockSpec) -> Block:
    """A block with the record ``spec`` in an empty graph."""
    inputs = _inputs(graph, spec)
    # the arguments that both ends have
    ends: dict[str, Any] = {
        "ids": inputs["ids"],
        "mask": inputs["mask"],
        "num_experts": spec.experts,
        "ep_group": spec.ep_group,
        "ep_size": spec.ep_size,
        "tp_group": spec.tp_group,
        "tp_size": spec.tp_size,
        "max_tokens": spec.max_tokens,
        "shared_expert_ranks": spec.shared_expert_ranks,
        "shared_experts": spec.shared_experts,
        "zero_experts": spec.zero_experts,
    }
    sends = DispatchCall(
        x=inputs["x"], x_scale=inputs["x_scale"], max_rows=spec.max_rows, x_smooth=inputs["x_smooth"], **ends
    )
    experts = {field.name: _tensors(graph, field.name, spec.tensors) for field in dataclasses.fields(ExpertOperands)}
    dispatch = graph.call_function(OPS.dispatch.default, tuple(sends))
    rows, row_scale, counts, handle = (graph.call_function(operator.getitem, (dispatch, at)) for at in range(4))
    mlp = _grouped_mlp(graph, spec, {"rows": rows, "row_scale": row_scale, "counts": counts}, experts, inputs)
    back = CombineCall(rows=mlp, weights=inputs["weights"], handle=handle, **ends)
    combine = graph.call_function(OPS.combine.default, tuple(back))
    interior = (dispatch, rows, row_scale, counts, handle, mlp, combine)
    return Block("counted", dispatch, mlp, combine, counts if spec.counts_are_read else None, interior, None, spec)


def _grouped_mlp(
    graph: Graph, spec: BlockSpec, dispatched: dict[str, Any], experts: dict[str, list[Node]], inputs: dict[str, Any]
) -> Node:
    """The call of ``grouped_mlp`` on what dispatch gave; of quantisers that are not there it gets None."""
    optional: dict[str, Any] = {
        name: value or None if name.endswith(("scale", "offset", "scale_bias")) else value
        for name, value in experts.items()
    }
    call = GroupedMlpCall(
        activation=spec.activation,
        limit=spec.limit,
        alpha=spec.alpha,
        interleaved=spec.interleaved,
        quantisation=spec.quantisation,
        h_smooth=inputs["h_smooth"],
        h_clip=inputs["h_clip"],
        **dispatched,
        **optional,
    )
    return graph.call_function(OPS.grouped_mlp.default, tuple(call))


def _inputs(graph: Graph, spec: BlockSpec) -> dict[str, Any]:
    """Placeholders for what a block reads beside the experts' tensors, by the names of the operators' arguments; None for those
    that it does not have."""
    tokens, choices = spec.tokens, (spec.tokens, spec.top_k)
    smooth_h = (spec.local_experts, spec.intermediate)
    inputs: dict[str, Any] = {}
    for name, shape, dtype, is_there in (
        ("x", (tokens, spec.hidden), torch.int8 if spec.quantised_input else spec.dtype, True),
        ("x_scale", (tokens,), torch.float32, spec.quantised_input),
        ("ids", choices, torch.int32, True),
        ("weights", choices, spec.routing_dtype, True),
        ("mask", (tokens,), torch.bool, spec.has_mask),
        ("x_smooth", (spec.experts, spec.hidden), torch.float32, spec.has_x_smooth),
        ("h_smooth", smooth_h, torch.float32, spec.has_h_smooth),
        ("h_clip", (spec.local_experts,), torch.float32, spec.has_h_clip),
    ):
        inputs[name] = graph.placeholder(name) if is_there else None
        if is_there:
            inputs[name].meta["val"] = _empty(shape, dtype)
    return inputs


def _tensors(graph: Graph, name: str, experts: ExpertOperands) -> list[Node]:
    operands: Operands = getattr(experts, name)
    nodes = []
    for number, each in enumerate(operands.items):
        node = graph.placeholder(f"{name}_{number}")
        node.meta["val"] = _strided(each)
        nodes.append(node)
    return nodes


def _strided(each: Operand) -> torch.Tensor:
    return torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta")


_MEMORY = (torch.ops.aten.empty.memory_format,)  # no kernel, and memory none the less


def peak_bytes(nodes: list[Node]) -> int:
    """The most bytes that results of these nodes take at once: each lives from its node to the last one that reads it."""
    changes = [0] * (len(nodes) + 1)
    for begin, end, size in _lifetimes(nodes):
        changes[begin] += size
        changes[end + 1] -= size
    return max(0, *itertools.accumulate(changes))


def _lifetimes(nodes: list[Node]) -> list[tuple[int, int, int]]:
    """(index of the node that makes it, index of its last reader, bytes) of each piece of memory."""
    order = {node: at for at, node in enumerate(nodes)}
    ends: dict[int, int] = {}
    begins: dict[int, tuple[int, int]] = {}
    for node, at in order.items():
        last = max([at, *(order.get(user, at) for user in node.users)])
        tensors = (t for t in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(t, torch.Tensor))
        for storage in (tensor.untyped_storage() for tensor in tensors):
            memory = storage._cdata
            ends[memory] = max(last, ends.get(memory, 0))
            if memory not in begins and (node.target in _MEMORY or read_traffic(node) is not None):
                begins[memory] = at, storage.nbytes()
    return [(begin, ends[memory], size) for memory, (begin, size) in begins.items()]
