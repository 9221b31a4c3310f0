"""Blocks of one rank by older operators: ``npu_moe_init_routing`` (version 1) and ``npu_moe_token_permute``.

    npu_moe_init_routing > npu_moe_compute_expert_tokens > experts > npu_moe_finalize_routing (drop_pad_mode 0)
    npu_moe_token_permute, counts in ATen > experts > npu_moe_token_unpermute or npu_moe_finalize_routing (drop_pad_mode 2)

Proven beside what ``match_npu_mlp`` proves of the experts:
1. every slot has a row: active_num is T or more, num_out_tokens all or none;
2. row_idx numbers slots by column, choice * T + token, as finalize_routing reads its index in mode 0: it is the third result of
   ``npu_moe_gating_top_k_softmax``, or such a table written with ``arange``;
3. the matmuls' groups are prefix sums or counts of the same ids, by the operator or by rules of ATen (``rules_of_counts``);
4. the way back takes these rows and the places of this routing; nothing of it is read elsewhere, but the counts.
Sources: ops_transformer.init_routing_v1, ops_transformer.expert_tokens, ops_transformer.token_permute,
op_plugin.finalize_routing: what they compute.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import size_key
from moe_lowering.passes.graph.arguments import argument, input_node
from moe_lowering.passes.graph.operator_names import call_name
from moe_lowering.passes.graph.walks import stock_name_of
from moe_lowering.passes.raise_foreign.chain_walk import (
    Walk,
    is_operator,
    require,
    same_sizes,
    same_value_before,
    value_of,
)
from moe_lowering.passes.raise_foreign.group_lists import COUNTS, PREFIX_SUMS
from moe_lowering.passes.raise_foreign.match_int8_experts import FUSED, FUSED_V2
from moe_lowering.passes.raise_foreign.match_npu_mlp import match_npu_experts
from moe_lowering.passes.raise_foreign.match_routing_chain import BY_ROW, FINALIZE, check_weights, way_back
from moe_lowering.passes.raise_foreign.meanings import as_ids
from moe_lowering.passes.raise_foreign.npu_chain import Chain
from moe_lowering.passes.raise_foreign.npu_matmuls import MATMUL, QUANTISE
from moe_lowering.passes.raise_foreign.read_meanings import Reader
from moe_lowering.passes.raise_foreign.records import NotThisForm
from moe_lowering.passes.raise_foreign.rules_of_layout import order_of
from moe_lowering.passes.raise_foreign.terms import Counts, Ends

ROUTE_V1, TOKENS, PERMUTE = "npu_moe_init_routing", "npu_moe_compute_expert_tokens", "npu_moe_token_permute"
SOFTMAX = "npu_moe_gating_top_k_softmax"
_NUMBERS = (torch.int32, torch.int64)
BY_COLUMN = 0  # drop_pad_mode of finalize_routing
aten = torch.ops.aten


def match_routing_v1(route: Node, deployment: Deployment) -> Chain:
    """The chain that begins with a first version of init_routing.

    Raises:
        NotThisForm: it is none that the generic operators say.
    """
    ids = argument(route, "expert_idx")
    _check_start(route, ids, deployment)
    numbers = _require_by_column(route, argument(route, "row_idx"), ids)
    _require_all_rows(route, argument(route, "active_num"), value_of(argument(route, "x")).shape[0], "active_num")
    walk = Walk()
    rows, places, sorted_ids = walk.results(route, 3)
    sums, experts_in_all, counting = _prefix_sums(walk, route, sorted_ids)
    experts = match_npu_experts(walk, rows, None, sums, PREFIX_SUMS, route)
    back, rows_back = walk.onward(experts.result, "the experts' result")
    walk.add(back)
    weights, added = way_back(walk, back, rows_back, places, BY_COLUMN)
    # way_back reads them for biases, of which there are none
    walk.read_by(sorted_ids, "the sorted experts", counting, back)
    check_weights(ids, back, weights)
    sent = {"x": argument(route, "x"), "x_scale": None, "ids": ids, "mask": None, "num_experts": experts_in_all}
    _check_types(route, sent["x"], experts.result)
    return Chain("routing_v1", "", walk, route, experts, back, sent, weights, added=added, read_before=numbers)


def match_permute(permute: Node, deployment: Deployment) -> Chain:
    """The chain that begins with a permutation of tokens.

    Raises:
        NotThisForm: it is none that the generic operators say.
    """
    ids, x = argument(permute, "indices"), argument(permute, "tokens")
    _check_start(permute, ids, deployment, x)
    require(permute, {"padded_mode": (False,)})
    slots = value_of(ids).shape[0] * value_of(ids).shape[1]
    _require_all_rows(permute, argument(permute, "num_out_tokens") or slots, slots, "num_out_tokens")
    walk = Walk()
    rows, places = walk.results(permute, 2)
    groups, kind = _groups_of(rows, permute)
    experts_in_all, source = _counted(groups, kind, ids, permute)
    experts = match_npu_experts(walk, rows, None, groups, kind, permute)
    back, rows_back = walk.onward(experts.result, "the experts' result")
    walk.add(back)
    weights, added = way_back(walk, back, rows_back, places, BY_ROW)
    check_weights(ids, back, weights)
    counting = _add_counting(walk, groups, source)
    sent = {"x": x, "x_scale": None, "ids": ids, "mask": None, "num_experts": experts_in_all}
    _check_types(permute, x, experts.result)
    return Chain("permute", "", walk, permute, experts, back, sent, weights, added=added, read_before=counting)


def _check_start(node: Node, ids: Any, deployment: Deployment, x: Node | None = None) -> None:
    if deployment.ep_size != 1:
        seen = f"{node.name} has all experts on this rank, and ep_size is {deployment.ep_size}"
        raise NotThisForm(node, "raise.other_group", seen, "ep_size 1")
    value = value_of(ids)
    accepted = (torch.int32,) if x is None else (torch.int32, torch.int64)
    if value.dim() != 2 or value.dtype not in accepted:
        seen = f"{node.name}: ids are {value.dtype} {tuple(value.shape)}"
        raise NotThisForm(node, "raise.dtype", seen, f"{' or '.join(map(str, accepted))} [T, k]")


def _check_types(first: Node, x: Node, result: Node) -> None:
    tokens, output = value_of(x), value_of(result)
    if tokens.dim() != 2 or tokens.dtype != output.dtype or not tokens.dtype.is_floating_point:
        raise NotThisForm(
            first, "raise.dtype", f"x is {tokens.dtype} {tuple(tokens.shape)}, the experts' result {output.dtype}",
            "[T, H], both of one floating dtype",
        )  # fmt: skip


def _require_all_rows(node: Node, number: Any, every: Any, name: str) -> None:
    number = number.meta.get("val") if isinstance(number, Node) else number
    if number is None or not (size_key(number) == size_key(every) or statically_known_true(number >= every)):
        raise NotThisForm(node, "raise.rows", f"{node.name}: {name} is {number}", f"{every} or more: no row is dropped")


def _require_by_column(route: Node, row_idx: Any, ids: Node) -> tuple[Node, ...]:
    """Slot (t, j) has number j * T + t; the nodes that say so."""
    node = same_value_before(row_idx)
    if same_sizes(value_of(node), value_of(ids)):
        source = node.args[0] if node.target is operator.getitem and node.args[1] == 2 else None
        if is_operator(source, SOFTMAX):
            return (row_idx, node)
        table = _table_by_column(node)
        if table:
            return (row_idx, *table)
    seen = f"{route.name}: row_idx is {row_idx}, in which order is not known"
    raise NotThisForm(
        route, "raise.index", seen, f"the third result of npu.{SOFTMAX}, or arange(k * T).view(k, T) transposed"
    )


def _table_by_column(node: Node) -> tuple[Node, ...]:
    """``arange(k * T).view(k, T).t()``, in whatever copies and casts: its nodes, () where it is another table."""
    turned, path = False, list[Node]()
    while node.op == "call_function" and node.args:
        if node.target is aten.clone.default or _is_exact_cast(node):
            pass
        elif stock_name_of(node) in ("t", "transpose", "permute") and value_of(node).dim() == 2:
            turned = turned != (order_of(node) == [1, 0])
        elif node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default) and turned:
            return (*path, node) if _counts_up(node.args[0]) else ()
        else:
            return ()
        path.append(node)
        node = input_node(node)
    return ()


def _is_exact_cast(node: Node) -> bool:
    """A cast that keeps every number: in 8 or 16 bits a large table would not be one."""
    return node.target is aten._to_copy.default and value_of(node).dtype in _NUMBERS


def _counts_up(node: Any) -> bool:
    """0, 1, 2, ..."""
    while isinstance(node, Node) and _is_exact_cast(node):
        node = node.args[0]
    if not isinstance(node, Node) or stock_name_of(node) != "arange" or value_of(node).dtype not in _NUMBERS:
        return False
    args: list[Any] = list(node.args)
    return len(args) == 1 or (args[0] == 0 and (len(args) == 2 or args[2] == 1))


def _prefix_sums(walk: Walk, route: Node, sorted_ids: Node | None) -> tuple[Node, int, Node]:
    """(what the matmuls are given as groups, the number of experts, who counts) from the experts of the sorted rows."""
    if sorted_ids is None:
        raise NotThisForm(route, "raise.unused", f"the sorted experts of {route.name} are not read", f"npu.{TOKENS}")
    readers = [node for node in walk.readers(sorted_ids) if not is_operator(node, FINALIZE)]
    if len(readers) != 1 or not is_operator(readers[0], TOKENS):
        names = ", ".join(f"{node.name} ({call_name(node)})" for node in readers) or "nothing that counts"
        raise NotThisForm(sorted_ids, "raise.counts", f"the sorted experts go to {names}", f"npu.{TOKENS} alone")
    (node,) = readers
    walk.add(node)
    cast, _ = walk.onward(node, "prefix sums")
    if cast.target is not aten._to_copy.default or value_of(cast).dtype != torch.int64:
        raise NotThisForm(cast, "raise.counts", f"prefix sums go to {call_name(cast)}", "a cast to int64")
    walk.add(cast)
    return cast, int(argument(node, "num_expert")), node


def _groups_of(rows: Node | None, permute: Node) -> tuple[Node, int]:
    """(group_list, its kind) of the matmul that takes the rows, which may be quantised before it."""
    look, node = Walk(), rows
    for _ in range(2):
        if node is None:
            break
        reader, _ = look.ways(node, "rows")[0]
        groups = argument(reader, "group_list") if is_operator(reader, MATMUL, FUSED, FUSED_V2) else None
        if isinstance(groups, Node):
            return groups, PREFIX_SUMS if is_operator(reader, FUSED) else argument(reader, "group_list_type")
        node = look.results(reader, 2)[0] if is_operator(reader, QUANTISE) else None
    raise NotThisForm(
        permute, "raise.operation_between", f"rows of {permute.name} go to no grouped matmul", f"npu.{MATMUL}"
    )


def _counted(groups: Node, kind: int, ids: Node, permute: Node) -> tuple[int, Node]:
    """(the number of experts, the ids) of counts or prefix sums that are those of the permutation's ids."""
    reader = Reader([permute])
    counted, own = reader.value(groups), reader.value(ids)
    term = None if counted is None else counted.term
    mine = None if own is None else as_ids(own)
    means_it = (kind == COUNTS and isinstance(term, Counts)) or (kind == PREFIX_SUMS and isinstance(term, Ends))
    if not means_it or not isinstance(term, (Counts, Ends)) or mine is None or term.ids != mine[1]:
        raise NotThisForm(
            permute, "raise.counts", f"{groups.name} as group_list of type {kind}",
            "counts (type 1) or prefix sums (type 0) of the ids that the permutation takes",
        )  # fmt: skip
    return term.experts, term.ids.node


def _add_counting(walk: Walk, groups: Node, ids: Node) -> tuple[Node, ...]:
    """The nodes that count; those that do it for the chain alone go with it."""
    found, pending = {groups}, [groups]
    while pending:
        for node in pending.pop().all_input_nodes:
            if node is not ids and node > ids and node not in found and node.op == "call_function":
                found.add(node)
                pending.append(node)
    for node in sorted(found, reverse=True):
        if all(user in walk.interior for user in node.users):
            walk.add(node)
    return tuple(found)
