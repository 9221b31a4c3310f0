"""What a lowered graph still needs before torchair's GE mode can convert it: edits of the FX graph.

1. ``split_all_to_all``: GE knows all-to-all only as ``npu_define.all_to_all_single_npu``. AOTAutograd decomposes a
   model's own calls to it (torchair's decomposition table), which comes too early for those that the lowering emits.
2. ``place_token_checks``: ``assert_tokens`` looks at a shape on the host. GE has no host, so the check moves to where
   torchair prepares the inputs of a call (see ``ge_converters``).
3. ``keep_communication``: the engine drops what no output needs, collectives too; a rank that skips one hangs the others.
4. ``compare_in_one_type``: GE compares values of one type; torchair's converters of comparisons do not cast.
5. ``simplify_fused``: what surrounds a fused operator becomes ATen, as torchair can tell the engine the shapes of an
   operator that it does not know only if its converter makes little else.

``finish`` does all of it or nothing: on an error the graph is as the lowering left it, and the error passes on, since without
any of these a graph may hang or compute something else. Reads stay where they were: nothing is moved past a write. Operators
that GE cannot take are looked for afterwards (``ge_missing``).

Sources: wheel.ge_converters: experimental/hcom_alltoall.py; wheel.fx2ge: _parse_node_internal, get_or_auto_gen_converter;
wheel.ge_graph_pass.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.printers import PythonPrinter

from moe_lowering.backends import ge_converters
from moe_lowering.backends.ge_missing import GeConversionError
from moe_lowering.custom_ops import assert_tokens
from moe_lowering.custom_ops.sizes import show, token_count
from moe_lowering.groups import process_group
from moe_lowering.passes.graph.arguments import arguments, explicit_arguments, input_node
from moe_lowering.passes.graph.communication import communicates
from moe_lowering.passes.graph.edit_log import EditLog

LOW_HALF = 0xFFFFFFFF
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


# ------------------------------------------------------------------------------------------------------------ all-to-all


def finish(edits: EditLog) -> None:
    """All edits of a graph for GE, or none. Raises what they raise."""
    with edits.step():
        split_all_to_all(edits)
        place_token_checks(edits)
        keep_communication(edits.graph)
        simplify_fused(edits)
        compare_in_one_type(edits)


def split_all_to_all(edits: EditLog) -> None:
    """``_c10d_functional.all_to_all_single`` to ``npu_define.all_to_all_single_npu``.

    Before: rows per rank, and a group name. After: elements per rank, where each rank's part begins, and the group's tag
    and ranks. Sizes may be symbolic. The value, and ``wait_tensor`` after it, stay.

    Raises:
        GeConversionError: the part of a row is symbolic, or the group does not exist in this process.
    """
    graph = edits.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.all_to_all_single.default):
        x, received, sent, group = node.args
        tag, ranks = _group(node, group)
        with graph.inserting_before(node):
            counts = []
            for splits in (sent, received):
                sizes = [_times(graph, size, _row_elements(node)) for size in splits]
                counts += [sizes, _starts(graph, sizes)]
            new = graph.call_function(
                torch.ops.npu_define.all_to_all_single_npu.default, (x, *counts, tag, ranks, len(ranks))
            )
        new.meta = {**node.meta}
        edits.replace_uses(node, new)
        edits.erase([node])


def _group(node: Node, name: Any) -> tuple[str, list[int]]:
    """Tag and ranks of a process group."""
    from torch.distributed import distributed_c10d as c10d

    try:
        handle = process_group(name)
    except Exception as error:
        raise GeConversionError(
            f"{node.name}: group {name!r} names no process group here; GE needs its ranks"
        ) from error
    return c10d._get_group_tag(handle), list(c10d.get_process_group_ranks(handle))


def _row_elements(node: Node) -> int:
    """Elements of one row of the tensor that is sent."""
    shape = input_node(node).meta["val"].shape
    row = token_count((*shape[1:], 1))
    if not isinstance(row, int):
        raise GeConversionError(f"{node.name}: rows of shape {show(shape[1:])}; accepted for GE: a size that is known")
    return row


def _times(graph: Graph, size: Any, factor: int) -> Any:
    return size if factor == 1 else _calculate(graph, operator.mul, size, factor)


def _starts(graph: Graph, sizes: Sequence[Any]) -> list[Any]:
    """Where each part begins: [0, s0, s0 + s1, ...]."""
    return [0, *itertools.accumulate(sizes[:-1], lambda a, b: _calculate(graph, operator.add, a, b))]


def _calculate(graph: Graph, op: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """An int, or a node when one of the two is a node."""
    values = [v.meta["val"] if isinstance(v, Node) else v for v in (a, b)]
    if not isinstance(a, Node) and not isinstance(b, Node):
        return op(a, b)
    node = graph.call_function(op, (a, b))
    node.meta["val"] = op(*values)
    return node


# ---------------------------------------------------------------------------------------------------------- token checks


def place_token_checks(edits: EditLog) -> None:
    """``assert_tokens(x, lo, hi)``: evaluated where T is known, else to ``ge_assert_tokens`` with T's source.

    The source is Python over ``args``, the inputs of the compiled graph, such as ``args[3].shape[0]``.

    Raises:
        RuntimeError: T is known and outside of the range: the graph must not run.
        GeConversionError: T cannot be computed from the inputs' shapes.
    """
    for node in edits.graph.find_nodes(op="call_function", target=torch.ops.moe_lowering.assert_tokens.default):
        x, low, high = node.args
        tokens = token_count(x.meta["val"].shape)
        if isinstance(tokens, int):
            # not the operator, which only propagates under fake tensors
            assert_tokens._real(x.meta["val"], low, high, **node.kwargs)
        else:
            _place_check(edits.graph, node, tokens)
        edits.erase([node])


def _place_check(graph: Graph, node: Node, tokens: Any) -> None:
    """``ge_assert_tokens`` for one ``assert_tokens`` of a symbolic T, unless x has that check already."""
    x = input_node(node)
    target, args = torch.ops.moe_lowering.ge_assert_tokens.default, (*node.args, _source(graph, node, tokens))
    if any(user.target is target and user.args == args for user in x.users):
        return
    with graph.inserting_before(node):
        graph.call_function(target, args, node.kwargs)


def _source(graph: Graph, node: Node, tokens: Any) -> str:
    """Python that computes a symbolic T from ``args``."""
    expression = tokens.node.expr
    known = dict(_sizes(graph))
    missing = sorted(str(s) for s in expression.free_symbols if s not in known)
    named = expression.xreplace({s: sympy.Symbol(known[s]) for s in expression.free_symbols if s in known})
    source = PythonPrinter().doprint(named)
    if missing or "math." in source or "torch." in source:
        what = f"{', '.join(missing)} is no size of an input" if missing else "that takes more than integer arithmetic"
        raise GeConversionError(f"{node.name}: T is {expression}, and {what}: GE mode cannot check it on every call")
    return source


def _sizes(graph: Graph) -> Iterator[tuple[Any, str]]:
    """Symbols that are an input or a dimension of one, and how to read them. The later ones win: dimensions, as some
    inputs are not tensors in exported graphs."""
    for index, placeholder in enumerate(graph.find_nodes(op="placeholder")):
        value = placeholder.meta.get("val")
        if isinstance(value, torch.SymInt):
            yield value.node.expr, f"args[{index}]"
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                yield size.node.expr, f"args[{index}].shape[{dim}]"


# --------------------------------------------------------------------------------------------------------- communication


def keep_communication(graph: Graph) -> None:
    """Mark communication that no output needs with ``ge_keep``, so that the engine does not drop it."""
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed:
            needed.update(node.all_input_nodes)
    for node in list(graph.nodes):
        if node in needed or not communicates(node) or _keeps_itself(node):
            continue
        result, value = node, node.meta["val"]
        if isinstance(value, (tuple, list)):
            with graph.inserting_after(node):
                result = graph.call_function(operator.getitem, (node, 0))
            result.meta = {**node.meta, "val": value[0]}
        with graph.inserting_after(result):
            graph.call_function(torch.ops.moe_lowering.ge_keep.default, (result,))


def _keeps_itself(node: Node) -> bool:
    """What has no result is there for its effect, and the converters of this package's operators keep theirs."""
    target: Any = node.target
    has_results = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(node.meta["val"]))
    return target.namespace == "moe_lowering" or not has_results


# ----------------------------------------------------------------------------------------------------------- comparisons


def compare_in_one_type(edits: EditLog) -> None:
    """Cast both sides of a comparison of tensors to the type in which PyTorch compares them."""
    graph = edits.graph
    for name in COMPARISONS:
        for node in graph.find_nodes(op="call_function", target=getattr(torch.ops.aten, name).Tensor):
            sides = tuple(arguments(node).values())
            dtype = torch.result_type(*(side.meta["val"] for side in sides))
            with graph.inserting_before(node):
                cast = tuple(_cast(graph, side, dtype) for side in sides)
            edits.set_arguments(node, cast, {})


def _cast(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    if node.meta["val"].dtype == dtype:
        return node
    return _emit(graph, torch.ops.aten._to_copy.default, node, dtype=dtype)


# ------------------------------------------------------------------------------------------------------- fused operators


def simplify_fused(edits: EditLog) -> None:
    """Scales of ``dispatch_ffn_combine`` to int64, and rows of masked tokens of any fused operator to zero.

    Both are what the wrappers do inside on a device; the converters leave them out.
    """
    for name in ge_converters.TYPES:
        for node in edits.graph.find_nodes(op="call_function", target=getattr(torch.ops.moe_lowering, name).default):
            _simplify(edits, name, node)


def _simplify(edits: EditLog, name: str, node: Node) -> None:
    graph, arguments = edits.graph, explicit_arguments(node)
    if name == "dispatch_ffn_combine":
        with graph.inserting_before(node):
            for scale in ("w13_scale", "w2_scale"):
                arguments[scale] = [_wide(graph, n) for n in arguments[scale]] if arguments.get(scale) else None
    edits.set_arguments(node, (), arguments)
    if arguments.get("mask") is None:
        return
    for y in [user for user in node.users if _is_output(user, node, 0)]:
        _zero_masked(edits, node, y, arguments["mask"])


def _wide(graph: Graph, scale: Node) -> Node:
    """float32 as int64 that hold its bits in the low half and nothing in the high one; int64 as it is."""
    if scale.meta["val"].dtype == torch.int64:
        return scale
    bits = _emit(graph, torch.ops.aten.view.dtype, scale, torch.int32)
    value = scale.meta["val"]
    low = _emit(graph, torch.ops.aten.full.default, [], LOW_HALF, fake=value, dtype=torch.int64, device=value.device)
    return _emit(graph, torch.ops.aten.bitwise_and.Tensor, _cast(graph, bits, torch.int64), low)


def _is_output(user: Node, node: Node, number: int) -> bool:
    """Whether a node is that output of an operator with several, counted from either end."""
    assert isinstance(node.target, torch._ops.OpOverload)
    outputs = len(node.target._schema.returns)
    return user.target is operator.getitem and user.args in ((node, number), (node, number - outputs))


def _zero_masked(edits: EditLog, fused: Node, y: Node, mask: Node) -> None:
    """Right after the operator, and not where ``y`` is: the mask may be written before that."""
    value, graph = y.meta["val"], edits.graph
    with graph.inserting_before(fused.next):
        column = _emit(graph, torch.ops.aten.unsqueeze.default, mask, 1)
        zero = _emit(graph, torch.ops.aten.full.default, [], 0.0, fake=value, dtype=value.dtype, device=value.device)
        rows = graph.call_function(operator.getitem, (fused, 0))
        selected = graph.call_function(torch.ops.aten.where.self, (column, rows, zero))
    rows.meta, selected.meta = {**y.meta}, {**y.meta}
    edits.replace_uses(y, selected)
    edits.erase([y])
    edits.take_name(selected, y)


def _emit(graph: Graph, target: Any, *args: Any, fake: Any = None, **kwargs: Any) -> Node:
    """A node with its value, before the current point. ``fake`` names the fake mode where no argument does."""
    node = graph.call_function(target, args, kwargs)
    values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
    with (values[0] if fake is None else fake).fake_mode:
        node.meta["val"] = target(*values, **kwargs)
    return node
