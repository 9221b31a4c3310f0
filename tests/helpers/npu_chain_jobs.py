"""Hand-written chains on the ranks of a pool: run as they are, compiled with the pass, and a reference."""

from __future__ import annotations

from typing import Any

import npu_chain_layers as chains
import npu_chain_variants as variants
import torch
import torch.distributed as dist
from graph_edits import values
from rank_jobs import setup  # noqa: F401  (of the pool)

from moe_lowering import Deployment, MoeLowering
from moe_lowering.backends.aot import lowering_backend

_groups: dict[str, str] = {}
COUNTS = {"returned": lambda rows, scale, counts, out: counts + 0}


def deployment(rank: int, **fields: Any) -> Deployment:
    """Over all ranks; the chains communicate in the EP group itself, as production code does."""
    size = dist.get_world_size()
    if "mc2" not in _groups:
        _groups["mc2"] = dist.new_group(range(size)).group_name
    name = dist.group.WORLD.group_name
    return Deployment(
        ep_size=size, ep_rank=rank, ep_group=name, ep_communicator=name, mc2_group=_groups["mc2"],
        **{"providers": (("vllm_ascend", "0.23.0"),), "weight_format": "nz", "hccl_buffer_mb": 1024, **fields},
    )  # fmt: skip


def shared_tokens(rank: int) -> dict[str, Any]:
    """The fields of a deployment in which all ranks have the same tokens."""
    return {"tp_size": dist.get_world_size(), "tp_rank": rank, "tp_group": dist.group.WORLD.group_name}


def layer_of(rank: int, case: dict[str, Any], twin: str = "") -> chains.Mc2:
    import test_match_npu_chains as tables

    given = {**case, **(tables.TWINS[twin][1] if twin else {})}
    if given.pop("counts_read", False):
        given.update(COUNTS)
    group = given.pop("group", dist.group.WORLD.group_name)
    return given.pop("kind_of", chains.Mc2)(
        group,
        given.pop("quantisation", "none"),
        given.pop("activation", "swiglu"),
        rank,
        dist.get_world_size(),
        **given,
    )


def raise_and_run(
    rank: int, case: dict[str, Any], comm: str, tokens: tuple[int, ...] = (6,), twin: str = ""
) -> dict[str, Any]:
    """Compile this rank's chain; its results, those of the chain as it is, those of the reference, and the report."""
    case = dict(case)
    where = deployment(rank, **(shared_tokens(rank) if case.pop("same_tokens", False) else {}))
    if case.get("kind_of") is variants.Sharded:  # each rank has all experts, and nobody to exchange tokens with
        where = Deployment(soc="A3", installed=(), weight_format="nz")
    layer = layer_of(rank, case, twin)
    lowering = MoeLowering(where, comm)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=lowering_backend(lowering), fullgraph=True, dynamic=len(tokens) > 1)
    found: dict[str, Any] = {"lowered": [], "written": [], "reference": []}
    with torch.no_grad():
        for count in tokens:
            x, ids, weights = inputs_of(layer, rank, count)
            found["lowered"].append(getattr(layer, "joined", chains.same)(compiled(x, ids, weights)))
            # no CPU kernels of the first versions and of the one with a norm: nothing to compare with but the reference
            first = isinstance(layer, (variants.First, variants.Normed))
            found["written"].append(found["lowered"][-1] if first else layer(x, ids, weights))
            found["reference"].append(reference_of(layer, x, ids, weights) + shared_of(layer, x))
    report = lowering.reports[0]
    found["blocks"] = [(b.comm, b.reason, b.raised_from, b.ops_before, b.ops_after, b.notes) for b in report.blocks]
    found["foreign"] = [str(layer.not_raised) for layer in report.foreign if layer.not_raised is not None]
    return found


def inputs_of(layer: chains.Layer, rank: int, tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return getattr(layer, "inputs", chains.inputs)(rank, tokens)


def reference_of(layer: chains.Layer, *tensors: torch.Tensor) -> torch.Tensor:
    own = getattr(layer, "reference", None)
    return chains.reference(layer, *tensors) if own is None else own(*tensors)


def off_by_one(span: tuple[int, int]) -> tuple[int, int]:
    return span[0], span[1] - 1


def skipped_twice(arguments: list[Any]) -> list[Any]:
    """``finalize_routing`` with its first skip as its second one, too."""
    return [*arguments[:2], arguments[1], *arguments[3:]]


def doubled(rows: torch.Tensor) -> torch.Tensor:
    return rows * 2


def maximum(operation: str) -> str:
    return "max"


def shared_of(layer: chains.Layer, x: torch.Tensor) -> Any:
    return x.double() @ layer.w_shared.double() if getattr(layer, "shared", "") else 0.0  # type: ignore[operator]


def edited(rank: int, case: dict[str, Any], comm: str, seeds: list[str]) -> list[tuple[str, str]]:
    """What became of graphs with random edits, the same on each rank: (outcome, what is wrong or "")."""
    from raise_graphs import trace

    layer, where = layer_of(rank, case), deployment(rank)
    x, ids, weights = inputs_of(layer, rank)
    names = [n for n, t in layer.named_buffers()]
    made = {"x": x, "ids": ids, "weights": weights, **dict(layer.named_buffers())}

    def function(x: Any, ids: Any, weights: Any, **buffers: Any) -> Any:
        return torch.func.functional_call(layer, buffers, (x, ids, weights))

    assert names
    return outcomes(trace(function, made), made, where, comm, seeds)


def outcomes(
    base: Any, made: dict[str, torch.Tensor], where: Deployment, comm: str, seeds: list[str]
) -> list[tuple[str, str]]:
    """What became of copies of a graph with random edits."""
    import copy
    import logging

    from npu_chain_edits import edit

    logging.disable()
    found = []
    for seed in seeds:
        gm, done = edit(base, seed)
        if not runs_everywhere(gm, made):
            found.append(("left", ""))
            continue
        lowered = copy.deepcopy(gm)
        lowering = MoeLowering(where, comm)
        lowering(lowered, agreement_timeout=None)
        blocks = lowering.reports[0].blocks
        wrong = [block.reason for block in blocks if "internal error" in block.reason or "undone" in block.reason]
        if wrong or not any(block.comm == comm for block in blocks):
            found.append(("left", f"{seed}: {done}: {wrong}" if wrong else ""))
            continue
        before, after = (run_all(each, made) for each in (gm, lowered))
        found.append(("raised", difference(before, after) and f"{seed}: {done}: {difference(before, after)}"))
    return found


class Alone(torch.fx.Interpreter):
    """Runs a graph without its collectives."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "namespace", "") == "_c10d_functional":
            return args[0].repeat(args[1], *[1] * (args[0].dim() - 1)) if "all_gather" in str(target) else args[0]
        return super().call_function(target, args, kwargs)


def runs_everywhere(gm: Any, made: dict[str, torch.Tensor]) -> bool:
    """Whether an edited graph runs on all ranks: else one waits for another. Its values are made anew, for the pass to read.

    A chain with communicating operators of torch_npu runs as it is: what it refuses, it refuses on all ranks alike.
    """
    if any(getattr(node.target, "namespace", "") == "npu" for node in gm.graph.nodes):
        return True
    try:
        values(gm)
        with torch.no_grad():
            Alone(gm).run(*(tensor.clone() for tensor in made.values()))
        ran = torch.ones(1)
    except Exception:  # an edit made a graph that does not run
        ran = torch.zeros(1)
    dist.all_reduce(ran)
    return int(ran) == dist.get_world_size()


def run_all(gm: Any, made: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        try:
            made = gm(*(tensor.clone() for tensor in made.values()))
        except Exception as error:  # an edit made a graph that does not run, alike on all ranks
            return f"{type(error).__name__}: {error}"
    return made if isinstance(made, (tuple, list)) else (made,)


def difference(before: Any, after: Any) -> str:
    """What differs by more than rounding; "" where the graph before refuses its inputs."""
    if isinstance(before, str) or isinstance(after, str):
        return "" if isinstance(before, str) else f"only the lowered graph refuses: {after}"
    for old, new in zip(before, after, strict=True):
        largest = old.double().abs().max().item() or 1.0
        error = (old.double() - new.double()).abs().max().item() / largest
        if old.dtype != new.dtype or not error <= 4e-2:  # NaN too
            return f"{old.dtype}, {new.dtype}, relative error {error}"
    return ""
