"""Forms of torch_npu chains whose graphs are edited at random: over the ranks of a pool, and of one rank."""

from __future__ import annotations

from typing import Any

import npu_chain_first as first
import npu_chain_jobs as jobs
import npu_chain_layers as chains
import npu_chain_spellings as spelled
import npu_chain_variants as variants
import torch
from edit_outcomes import outcomes
from raise_graphs import compiled_graph, trace

from moe_lowering import Deployment

# form: what its graphs are to become, and how ``npu_chain_jobs.layer_of`` makes it
OF_RANKS: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16": ("allgather", {}),
    "W8A8": ("mc2", {"quantisation": "w8a8", "shared": "argument"}),
    "gathered": ("mc2", {"kind_of": variants.Gathered}),
    "W8A8, smooth scales": ("allgather", {"quantisation": "w8a8", "smooth": "both"}),
    "W4A16": ("alltoall", {"quantisation": "w4a16"}),
    "W4A8": ("allgather", {"quantisation": "w4a8"}),
    "W4A8, clipped": ("allgather", {"quantisation": "w4a8", "clipped": True}),
    "clamps before silu": ("allgather", {"activation": "swiglu_clamp"}),
    "bfloat16, fused": ("fused_mc2", {}),
    "GEGLU": ("alltoall", {"activation": "gelu_tanh", "shared": ""}),
    "gathered, finalize, W8A8": (
        "allgather", {"kind_of": variants.Gathered, "quantisation": "w8a8", "masked": "mul", "back": "finalize"}
    ),
    "reduced": ("mc2", {"kind_of": variants.Reduced, "same_tokens": True}),
    "reduced, finalize": ("alltoall", {"kind_of": variants.Reduced, "same_tokens": True, "back": "finalize"}),
    "zero experts": ("mc2", {"kind_of": variants.Special, "zero": 4, "shared": "argument"}),
    "zero and copy experts": ("allgather", {"kind_of": variants.Special, "zero": 2, "copies": 3}),
    "copies that a router chooses": ("allgather", {"kind_of": variants.Chosen, "copies": 4, "written": "aten"}),
    "first versions": ("mc2", {"kind_of": variants.First}),
    "first versions, W8A8": ("fused_mc2", {"kind_of": variants.First, "quantisation": "w8a8"}),
    "a norm": ("mc2", {"kind_of": variants.Normed}),
    "a norm, the sum alone": ("fused_mc2", {"kind_of": variants.Normed, "read": (2,)}),
    "prefix sums of dispatch": ("fused_mc2", {"kind_of": spelled.PrefixSums, "shared": "", "quantisation": "w8a8"}),
    "slots that are off": ("mc2", {"kind_of": spelled.Slots, "copies": 3, "zero": 1, "quantisation": "w8a8"}),
    "gathered in place": ("mc2", {"kind_of": spelled.InPlace}),
    "gathered in place, a table": ("alltoall", {"kind_of": spelled.InPlace, "own": "table"}),
    "gathered in place, rows dropped": ("fused_mc2", {"kind_of": spelled.InPlace, "back": "drop"}),
    "reduced in place": ("mc2", {"kind_of": spelled.InPlaceReduced, "same_tokens": True, "own": "neither"}),
}  # fmt: skip
OF_ONE: dict[str, tuple[type[chains.Layer], dict[str, Any]]] = {
    "routing_v2": (chains.Routed, {"quantisation": "w8a8", "activation": "swiglu", "back": "finalize", "shared": True}),
    "routing_v2, pairs": (
        chains.Routed, {"quantisation": "w8a8", "activation": "swiglu", "back": "finalize", "kind": 2}
    ),
    "routing_v2, unpermute": (chains.Routed, {"quantisation": "none", "activation": "swiglu_clamp", "kind": 0}),
    "routing_v2, W8A8, smooth": (chains.Routed, {"quantisation": "w8a8", "activation": "swiglu", "smooth": "tokens"}),
    "routing_v2, W4A8, clipped": (chains.Routed, {"quantisation": "w4a8", "activation": "swiglu", "clipped": True}),
    "routing_v1": (first.FirstRouting, {}),
    "routing_v1, numbered by the router": (first.FirstRouting, {"numbering": "softmax", "shared": True}),
    "permute": (first.Permuted, {}),
    "permute, prefix sums": (first.Permuted, {"kind": 0, "counting": "one_hot"}),
    "permute, W8A8": (first.Permuted, {"quantisation": "w8a8"}),
}  # fmt: skip
SPELLED: dict[str, tuple[type[chains.Layer], dict[str, Any]]] = {  # of one rank, in other operators
    **{f"groups: {name}": (spelled.Spelled, {"groups": groups}) for name, groups in spelled.GROUPS.items()},
    **{
        f"activation: {name}": (spelled.Spelled, {"activation": activation, "act": act})
        for name, (activation, act) in spelled.ACTIVATIONS.items()
    },
    "fused first matmul": (spelled.Spelled, {"quantisation": "w8a8", "fused": "first"}),
    "fused first matmul, counts": (spelled.Spelled, {"quantisation": "w8a8", "fused": "counts", "back": 2}),
    "zero experts, masked": (spelled.Spelled, {"zero": 3}),
    "rows dropped": (spelled.Spelled, {"back": 3}),
    "slots by column": (spelled.FirstVersion, {"table": spelled.by_column}),
}


def edited(rank: int, case: dict[str, Any], comm: str, seeds: list[str]) -> list[tuple[str, str]]:
    """What became of a chain's graphs with random edits, the same on each rank: (outcome, what is wrong or "")."""
    case = dict(case)
    where = jobs.deployment(rank, **(jobs.shared_tokens(rank) if case.pop("same_tokens", False) else {}))
    layer = jobs.layer_of(rank, case)
    return outcomes(*graph_of(layer, rank), where, comm, seeds)


def edited_alone(name: str, seeds: list[str]) -> list[tuple[str, str]]:
    """The same of a form of one rank, in this process."""
    kind, given = (OF_ONE | SPELLED)[name]
    where = Deployment(soc="A3", installed=(), weight_format="nz")
    return outcomes(*graph_of(kind(**given), 0), where, "allgather", seeds)


def graph_of(
    layer: Any, rank: int, of_ids: torch.dtype = torch.int32, **more: torch.Tensor
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The graph of a layer as the pass gets it, and its inputs; ``more`` stand behind x, ids and weights."""
    x, ids, weights = jobs.inputs_of(layer, rank)
    given = {"x": x, "ids": ids.to(of_ids), "weights": weights, **more}
    made = {**given, **dict(layer.named_buffers())}

    def function(**tensors: Any) -> Any:
        buffers = {name: tensor for name, tensor in tensors.items() if name not in given}
        return torch.func.functional_call(layer, buffers, tuple(tensors[name] for name in given))

    if isinstance(layer, spelled.InPlace):  # its collectives are functional in graphs of torch.compile alone
        gm, inputs = compiled_graph(function, **made)
        return gm, {str(at): tensor for at, tensor in enumerate(inputs)}
    return trace(function, made), made
