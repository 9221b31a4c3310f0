"""What a converted GE graph must be like, implementation by implementation: from the dump, against the deployment."""

from moe_lowering.simulator.ge import GeGraph


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


def allgather(graph: GeGraph, deployment, experts: int, top_k: int) -> None:
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
        scatter = one(graph, "HcomReduceScatter")
        attributes(scatter, rank_size=deployment.ep_size, reduction="sum")
        assert group_text(deployment) in scatter.attributes["group"]
        y = scatter.edge("x")
    else:
        assert routing.edge("expert_idx") == ids
        y = one(graph, "NetOutput").inputs[0][1]
    # combine: select, multiply in float32, sum over k
    total = graph.producer(graph.origin(y))
    assert total.type == "ReduceSum" and graph.dtype(total.edge("x")) == "DT_FLOAT"
    product = graph.producer(graph.origin(total.edge("x")))
    assert product.type == "Mul" and {graph.dtype(product.edge(n)) for n in ("x1", "x2")} == {"DT_FLOAT"}
    selected = graph.producer(graph.origin(product.edge("x1")))
    assert selected.type in ("GatherV2", "Gather")
    rows = selected.edge("x")
    if deployment.ep_size > 1:  # undefined rows are zero first
        assert graph.producer(rows).type == "SelectV2"
        rows = graph.producer(rows).edge("then")
    assert routing.name in graph.ancestors(graph.producer(selected.edge("indices")).name) | {routing.name}
    matmuls(graph, routing.output("expanded_x"), routing.output("expert_tokens_count_or_cumsum"), rows)


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


def alltoall(graph: GeGraph, deployment, experts: int, top_k: int) -> None:
    exchanges = graph.of_type("HcomAllToAll", "HcomAllToAllV")
    assert exchanges
    for exchange in exchanges:
        assert group_text(deployment) in exchange.attributes["group"]
    first, second = graph.of_type("GroupedMatmul")
    assert first.edge("group_list") == second.edge("group_list")
    net = one(graph, "NetOutput")
    behind = graph.ancestors(net.name)
    assert {exchange.name for exchange in exchanges} <= behind
    # there and back: rows come from an exchange, and an exchange brings the results home
    assert any(e.name in graph.ancestors(first.name) for e in exchanges)
    assert any(second.name in graph.ancestors(e.name) for e in exchanges)


CHECKS = {"allgather": allgather, "mc2": mc2, "fused_mc2": fused_mc2, "alltoall": alltoall}
