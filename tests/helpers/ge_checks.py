"""What a converted GE graph must be like, implementation by implementation: from the dump, against the deployment."""

from moe_lowering.simulator.ge import GeGraph
from moe_lowering.vocabulary import FINALIZE_ROUTING


def one(graph: GeGraph, kind: str):
    [node] = graph.of_type(kind)
    return node


def attributes(node, **expected):
    assert {name: node.attributes[name] for name in expected} == expected


def group_text(deployment) -> str:
    """How torchair names the group of a CPU backend."""
    return f"rank_list={','.join(map(str, range(deployment.ep_size)))}"


def matmuls(graph: GeGraph, rows: str, counts: str, y: str, weights=("DT_BF16", "DT_BF16")) -> None:
    """``rows`` > matmul > SwiGLU > matmul > ``y``, both with ``counts``, one weight each, and rows in one output."""
    first, second = graph.of_type("GroupedMatmul")
    assert first.edge("x0") == rows
    activation = one(graph, "SwiGlu")
    assert activation.edge("x") == first.output("y0") and second.edge("x0") == activation.output("y")
    assert second.output("y0") == y
    for matmul, weight in zip((first, second), weights, strict=True):
        assert matmul.edge("group_list") == counts
        assert graph.producer(matmul.edge("weight0")).type == "Data" and graph.dtype(matmul.edge("weight0")) == weight
        attributes(matmul, split_item=2, group_type=0, group_list_type=1)
    fitting(graph, first.edge("weight0"), second.edge("weight0"))


def fitting(graph: GeGraph, first: str, second: str) -> None:
    """Shapes [E_local, H, 2I] and [E_local, I, H], which only differ where they are exchanged."""
    w13, w2 = (graph.producer(edge).outputs[0][2] for edge in (first, second))
    assert w13[-1] == 2 * w2[-2] and w13[-2] == w2[-1] and w13[0] == w2[0]


def inferred(node) -> bool:
    """Whether torchair gave the engine a rule for shapes and types of an operator that it does not know."""
    return '"shape"' in node.attributes.get("_inference_rule", "")


def combined(graph: GeGraph, y: str, absent: str = ""):
    """(the node that selects each token's rows, the edge of its weights) of: select, multiply in float32, sum over k.

    ``absent`` is the row index where it may be -1: what was selected then is set to zero.
    """
    total = graph.producer(graph.origin(y))
    assert total.type == "ReduceSum" and graph.dtype(total.edge("x")) == "DT_FLOAT"
    product = graph.producer(graph.origin(total.edge("x")))
    assert product.type == "Mul" and {graph.dtype(product.edge(n)) for n in ("x1", "x2")} == {"DT_FLOAT"}
    selected = graph.producer(graph.origin(product.edge("x1")))
    if absent:
        assert selected.type == "MaskedFill"
        compared = graph.producer(graph.origin(selected.edge("mask")))
        assert compared.type == "Less" and graph.origin(compared.edge("x1")) == absent
        selected = graph.producer(graph.origin(selected.edge("x")))
    assert selected.type in ("GatherV2", "Gather")
    return selected, product.edge("x2")


def finalized(graph: GeGraph, y: str, index: str) -> str:
    """The rows of the one operator that brings them back by ``index``, -1 among it, with weights of their dtype."""
    node = graph.producer(graph.origin(y))
    assert node.type == "MoeFinalizeRoutingV2" and node.edge("expanded_row_idx") == index
    attributes(node, drop_pad_mode=3)
    assert {graph.dtype(node.edge(name)) for name in ("expanded_x", "scales")} == {"DT_BF16"}
    assert not {"x1", "x2", "bias", "expert_idx"} & {name for name, edge in node.inputs if edge}
    rows = graph.producer(node.edge("expanded_x"))
    assert rows.type == "Unsqueeze", rows.type
    assert not graph.of_type("MaskedFill"), "nobody but the operator masks rows"
    return graph.origin(rows.edge("x"))


def gathered(graph: GeGraph, deployment, experts: int, top_k: int, y: str) -> None:
    """Tokens of all ranks > rows of this rank's experts > MLP > ``y``, the sums over these experts."""
    routing, gating = one(graph, "MoeInitRoutingV3"), one(graph, "MoeGatingTopK")
    local = experts // deployment.ep_size
    first = deployment.ep_rank * local
    attributes(
        routing, active_num=-1, quant_mode=-1, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[first, first + local],
    )  # fmt: skip
    attributes(gating, k=top_k)
    ids = gating.output("expert_idx")
    if deployment.ep_size > 1:
        gathers = graph.of_type("HcomAllGather")
        assert len(gathers) == 3
        for gather in gathers:
            attributes(gather, rank_size=deployment.ep_size)
            assert group_text(deployment) in gather.attributes["group"]
        assert ids in {gather.edge("x") for gather in gathers}
        assert graph.producer(graph.origin(routing.edge("expert_idx"))).edge("x") == ids
    else:
        assert routing.edge("expert_idx") == ids
    index = routing.output("expanded_row_idx")
    if deployment.unpermute_operator == FINALIZE_ROUTING:
        rows = finalized(graph, y, index)
    else:
        selected, _ = combined(graph, y, index if deployment.ep_size > 1 else "")
        assert index in _edges_behind(graph, selected.edge("indices"))
        rows = graph.origin(selected.edge("x"))
    counts = routing.output("expert_tokens_count_or_cumsum")
    matmuls(graph, routing.output("expanded_x"), counts, rows)


def allgather(graph: GeGraph, deployment, experts: int, top_k: int) -> None:
    y = one(graph, "NetOutput").inputs[0][1]
    if deployment.ep_size > 1:
        scatter = one(graph, "HcomReduceScatter")
        attributes(scatter, rank_size=deployment.ep_size, reduction="sum")
        assert group_text(deployment) in scatter.attributes["group"]
        y = scatter.edge("x")
    gathered(graph, deployment, experts, top_k, y)


def alltoall(graph: GeGraph, deployment, experts: int, top_k: int) -> None:
    """As AllGather, but for the last step: sums to the ranks of their tokens, and added there."""
    exchange = one(graph, "HcomAllToAllV")
    assert group_text(deployment) in exchange.attributes["group"]
    total = graph.producer(graph.origin(one(graph, "NetOutput").inputs[0][1]))
    assert total.type == "ReduceSum" and graph.dtype(total.edge("x")) == "DT_FLOAT"
    assert graph.origin(total.edge("x")) == exchange.output("recv_data")
    tokens = next(node.outputs[0][2] for node in graph.of_type("Data") if node.outputs[0][2][0] in (-1, 24))
    equal_splits(graph, exchange, lambda t: t * tokens[1], (24, 40) if tokens[0] < 0 else (24,))
    gathered(graph, deployment, experts, top_k, exchange.edge("send_data"))


def mc2(graph: GeGraph, deployment, experts: int, top_k: int) -> None:
    dispatch, combine = one(graph, "MoeDistributeDispatchV2"), one(graph, "MoeDistributeCombineV2")
    gating = one(graph, "MoeGatingTopK")
    attributes(gating, k=top_k)
    for node in (dispatch, combine):
        attributes(
            node, group_ep=deployment.mc2_group, ep_world_size=deployment.ep_size, ep_rank_id=deployment.ep_rank,
            moe_expert_num=experts, tp_world_size=0, shared_expert_rank_num=0,
            global_bs=deployment.token_bound * deployment.ep_size,
        )  # fmt: skip
        assert node.edge("expert_ids") == gating.output("expert_idx")
    attributes(dispatch, quant_mode=0, expert_token_nums_type=1)
    # auxiliary tensors untouched
    assert combine.edge("assist_info_for_combine") == f"{dispatch.name}:2"
    assert combine.edge("ep_send_counts") == f"{dispatch.name}:4"
    assert graph.dtype(combine.edge("expert_scales")) == "DT_FLOAT"
    matmuls(graph, f"{dispatch.name}:0", f"{dispatch.name}:3", combine.edge("expand_x"))
    assert graph.producer(one(graph, "NetOutput").inputs[0][1]) == combine


def fused_mc2(graph: GeGraph, deployment, experts: int, top_k: int) -> None:
    fused, gating = one(graph, "DispatchFFNCombineBF16"), one(graph, "MoeGatingTopK")
    attributes(gating, k=top_k)
    attributes(fused, group=deployment.mc2_group, transB=False, weightNz=True)
    assert fused.attributes["M"] >= 1
    assert [name for name, _ in fused.inputs] == ["a", "w10", "w20", "expertIdx", "scale10", "scale20", "probs"]
    assert fused.edge("expertIdx") == gating.output("expert_idx")
    assert [graph.producer(fused.edge(name)).type for name in ("w10", "w20")] == ["Data", "Data"]
    fitting(graph, fused.edge("w10"), fused.edge("w20"))
    assert graph.dtype(fused.edge("probs")) == "DT_FLOAT"
    assert [kind for _, kind, _ in fused.outputs] == ["DT_BF16", "DT_INT32"]
    assert inferred(fused)
    net = one(graph, "NetOutput")
    assert net.inputs[0][1] == fused.output("out") and fused.name in net.control


def integers(graph: GeGraph, edge: str, tokens: int) -> list[int]:
    """What an integer tensor holds for T = ``tokens``: computed from the nodes that prepare it."""
    node = graph.producer(edge)
    read = {name: source for name, source in node.inputs if source}
    if node.content is not None:
        return list(node.content)
    if node.type == "Shape":
        assert graph.producer(read["x"]).type == "Data"
        return [tokens if size == -1 else size for size in graph.producer(read["x"]).outputs[0][2]]
    values = {name: integers(graph, source, tokens) for name, source in read.items()}
    if node.type == "Pack":
        return [value for name in sorted(values, key=lambda name: int(name[1:])) for value in values[name]]
    if node.type in ("Gather", "GatherV2"):
        return [values["x"][index] for index in values["indices"]]
    if node.type in ("Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze"):
        return values["x"]
    operation = {"Add": int.__add__, "Sub": int.__sub__, "Mul": int.__mul__, "Minimum": min}[node.type]
    return [operation(*pair) for pair in zip(values["x1"], values["x2"], strict=True)]


def equal_splits(graph: GeGraph, exchange, each, tokens=(24, 40)) -> None:
    """Every rank gets and gives ``each(T)`` elements, one rank's after the other's."""
    ranks = len(integers(graph, exchange.edge("send_counts"), tokens[0]))
    for count in tokens:
        for way in ("send", "recv"):
            assert integers(graph, exchange.edge(f"{way}_counts"), count) == [each(count)] * ranks
            first = integers(graph, exchange.edge(f"{way}_displacements"), count)
            assert first == [each(count) * rank for rank in range(ranks)]


def buffers(graph: GeGraph, deployment, experts: int, top_k: int) -> None:
    """AllToAll by rows, in buffers of ``max_rows`` lines."""
    gating = one(graph, "MoeGatingTopK")
    attributes(gating, k=top_k)
    there, sort = graph.of_type("MoeInitRoutingV3")
    exchanges = graph.of_type("HcomAllToAllV")
    assert len(exchanges) == 3 and not graph.of_type("HcomAllToAll")
    local = experts // deployment.ep_size
    for exchange in exchanges:
        assert group_text(deployment) in exchange.attributes["group"]
        assert len(integers(graph, exchange.edge("send_counts"), 1)) == deployment.ep_size
    for routing, range_, number in ((there, experts, experts), (sort, local, local + 1)):
        attributes(
            routing, active_num=-1, quant_mode=-1, expert_tokens_num_type=1, expert_tokens_num_flag=True,
            active_expert_range=[0, range_], expert_num=number,
        )  # fmt: skip
    assert there.edge("expert_idx") == gating.output("expert_idx")
    tokens = graph.producer(there.edge("x"))
    assert tokens.type == "Data"
    hidden, size = tokens.outputs[0][2][1], tokens.outputs[0][2][0]
    # what is sent: counts as they are; rows from the first sort, by what the counts say; results from the second matmul
    sent = "expert_tokens_count_or_cumsum"
    (counts,) = [e for e in exchanges if e.edge("send_data") == there.output(sent)]
    (rows,) = [e for e in exchanges if _sent(graph, e) == there.output("expanded_x")]
    second = graph.of_type("GroupedMatmul")[1]
    (home,) = [e for e in exchanges if _sent(graph, e) == second.output("y0")]
    some = (size,) if size > 0 else (24, 40)
    for exchange, each in (
        (counts, lambda t: local),
        *((e, lambda t: min(t * min(top_k, local), deployment.max_rows) * hidden) for e in (rows, home)),
    ):
        equal_splits(graph, exchange, each, some)
    places = graph.producer(graph.origin(rows.edge("send_data"))).edge("indices")
    assert there.output(sent) in _edges_behind(graph, places)
    # the second sort: arrived rows, by the arrived counts
    assert graph.origin(sort.edge("x")) == rows.output("recv_data")
    behind = _edges_behind(graph, sort.edge("expert_idx"))
    assert counts.output("recv_data") in behind and rows.output("recv_data") not in behind
    matmuls(graph, sort.output("expanded_x"), sort.output(sent), second.output("y0"))
    back = _edges_behind(graph, graph.producer(graph.origin(home.edge("send_data"))).edge("indices"))
    assert sort.output("expanded_row_idx") in back and there.output("expanded_row_idx") not in back
    # combine
    selected, weights = combined(graph, one(graph, "NetOutput").inputs[0][1])
    assert graph.origin(selected.edge("x")) == home.output("recv_data")
    behind = _edges_behind(graph, selected.edge("indices"))
    assert {there.output("expanded_row_idx"), there.output(sent), gating.output("expert_idx")} <= behind
    assert sort.output("expanded_row_idx") not in behind
    assert gating.output("y") in _edges_behind(graph, weights)


def _sent(graph: GeGraph, exchange) -> str:
    """What the sent rows are selected from; "" when they are sent as they are."""
    selected = graph.producer(graph.origin(exchange.edge("send_data")))
    return selected.edge("x") if selected.type in ("GatherV2", "Gather") else ""


def _edges_behind(graph: GeGraph, edge: str) -> set[str]:
    """The edge, and every edge whose values it depends on; not those of which it knows the sizes only."""
    found: set[str] = set()
    todo = [edge]
    while todo:
        found.add(last := todo.pop())
        node = graph.producer(last)
        if node.type != "Shape":
            todo += [source for _, source in node.inputs if source and source not in found]
    return found


CHECKS = {"allgather": allgather, "mc2": mc2, "fused_mc2": fused_mc2, "alltoall": alltoall, "buffers": buffers}
