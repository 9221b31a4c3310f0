"""What a captured graph must not hold: operators that need the host, sizes that depend on data, uneven exchanges.

Contract. Reads the graph, never edits it, adds no guard; returns a record for each finding, in graph order. It looks at
what the graph holds after lowering, so at the model's own operators and at ours. Rules, reasons and advice are the rows of
the pseudo-operator ``capture`` (``limits/data/capture.toml``). On a machine without an NPU it is the only one to say so
before the graph runs, and on one with an NPU the only one to name the line.

Not found: operators on CPU tensors, copies from the host (a constant's is folded), and what a kernel does by itself.

Cost: the graph's own index by target gives the targets that occur, and each is classified once per process; all nodes are
walked only where the compile has made a size that depends on data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from moe_lowering.deployment import Deployment
from moe_lowering.limits import bind, check
from moe_lowering.limits.calls.tensors import data_dependent
from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.find_blocks import module_path
from moe_lowering.passes.graph.arguments import argument
from moe_lowering.report.leftovers import NotCapturable
from moe_lowering.source_lines import innermost


def is_captured(deployment: Deployment, config: Any) -> bool:
    """Whether the compiler that runs the pass will capture: as the deployment declares, unless the compiler's options
    have ``force_eager``."""
    return may_be_captured(deployment) and not bool(getattr(config, "force_eager", False))


def may_be_captured(deployment: Deployment) -> bool:
    """Whether the deployment declares that its graphs are captured; without an NPU they are compiled and not captured."""
    return deployment.capture and deployment.mode == "npugraph_ex"


def not_capturable(graph: Graph, shape_env: Any, deployment: Deployment) -> list[NotCapturable]:
    """Everything in the graph that keeps it from being captured, in graph order.

    Args:
        shape_env: of the graph's fake values; None when there is none.
    """
    causes: dict[Node, str] = {}
    for (op, target), nodes in list(graph._find_nodes_lookup_table.table.items()):
        # No nodes: a look-up in the graph's index leaves an empty entry for its target
        looks = _look(target) if nodes and op == "call_function" else None
        if looks is not None:
            quantity, holds = looks
            causes.update((node, quantity) for node in nodes if holds(node))
    if _has_unbacked(shape_env):
        for node in _with_new_sizes(graph):
            causes.setdefault(node, "data_dependent_size")
    return [_record(node, causes[node], deployment) for node in sorted(causes)]


_Look = tuple[str, Callable[[Node], bool]]


@functools.lru_cache(maxsize=4096)
def _look(target: Any) -> _Look | None:
    """(quantity of the rules, whether a node of this target has it); None for targets of no interest."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    named = _BY_NAME.get(target._schema.name)
    if named is not None:
        return named
    if torch.Tag.data_dependent_output in target.tags:
        return "gives_host_value", lambda node: True
    if torch.Tag.dynamic_output_shape in target.tags:
        return "data_dependent_size", lambda node: _depends_on_data(node.meta.get("val"))
    return None


def _to_host(node: Node) -> bool:
    """Of a copy: from a device to the CPU. Other values than the first argument's do not count."""
    source = argument(node, "src") if node.target in _COPIES_SRC else node.args[0]
    before, after = (n.meta.get("val") if isinstance(n, Node) else None for n in (source, node))
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return after.device.type == "cpu" != before.device.type


def _is_uneven(node: Node) -> bool:
    """Of an all-to-all: not one number for every rank, or numbers that depend on what tensors hold."""
    target: Any = node.target
    bound = bind(target, node.args, node.kwargs)
    for name in ("input_split_sizes", "output_split_sizes", "send_counts", "recv_counts"):
        sizes = [n.meta.get("val", n) if isinstance(n, Node) else n for n in bound.get(name) or ()]
        if len({size_key(size) for size in sizes}) > 1 or data_dependent(sizes):
            return True
    return False


_COPIES_SRC = (torch.ops.aten.copy.default, torch.ops.aten.copy_.default)  # into the first argument
_BY_NAME: dict[str, _Look] = {
    **dict.fromkeys(("aten::_to_copy", "aten::copy", "aten::copy_", "prims::device_put"), ("copies_to_host", _to_host)),
    "moe_lowering::alltoall_experts": ("exact_splits", lambda node: True),
    **dict.fromkeys(
        ("_c10d_functional::all_to_all_single", "npu_define::all_to_all_single_npu"), ("uneven_splits", _is_uneven)
    ),
}


def _has_unbacked(shape_env: Any) -> bool:
    """Whether the compile made any size that depends on data, e.g. by an operator without a tag."""
    return shape_env is not None and bool(shape_env.unbacked_symint_counter)


def _with_new_sizes(graph: Graph) -> Iterator[Node]:
    """Nodes that bring a size which depends on data into the graph: operators, and inputs that have one."""
    for node in graph.nodes:
        new = node.meta.get("unbacked_bindings")
        if new or (node.op == "placeholder" and _depends_on_data(node.meta.get("val"))):
            yield node


def _depends_on_data(value: Any) -> bool:
    return any(
        isinstance(leaf, (torch.Tensor, torch.SymInt)) and bool(free_unbacked_symbols(leaf))
        for leaf in pytree.tree_leaves(value)
    )


def _record(node: Node, quantity: str, deployment: Deployment) -> NotCapturable:
    target = node.target
    called = target._schema.name if isinstance(target, torch._ops.OpOverload) else f"{node.op} {node.name}"
    (violation,) = check("capture", deployment.soc, {quantity: True, "called": called}, versions=deployment.versions)
    line = innermost(node.meta.get("stack_trace") or "")
    return NotCapturable(
        place=module_path(node),
        line="" if line is None else str(line),
        operator=called,
        code=violation.code,
        reason=violation.fault,
        advice=violation.advice,
    )
