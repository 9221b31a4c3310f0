"""Hand-written chains on the ranks of a pool: run as they are, compiled with the pass, and a reference."""

from __future__ import annotations

from typing import Any

import npu_chain_layers as chains
import npu_chain_variants as variants
import torch
import torch.distributed as dist
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
