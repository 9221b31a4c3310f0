"""A byte-and-launch model of what an implementation costs on one rank, in microseconds. It orders; it does not predict.

    T = launches + bytes / (bandwidth * efficiency) + compute,   fused: max of communication and compute

Launches are those of ``docs/costs.md`` for 16-bit weights. Figures of a machine stand in ``vocabulary.Soc``. A user's own
function with the signature of ``estimate`` takes its place.
Sources: msmodeling.device: static costs per operator and efficiencies, marked to be confirmed by their authors;
sgl_kernel_npu.deepep, msmodeling.device: the fixed cost of dispatch is what is measured there less what is modelled here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from moe_lowering.lookup import look_up
from moe_lowering.vocabulary import SOCS, Soc

MATMUL_US, VECTOR_US, COLLECTIVE_US = 5.0, 2.0, 10.0
# Quantisation, routing sort and flags inside the MC2 operators (the byte model alone gives half of the measured 132 us).
DISPATCH_FIXED_US = 66.0
COMM_EFFICIENCY, COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY = 0.7, 0.7, 0.6


@dataclasses.dataclass(frozen=True)
class Load:
    """What is to be done: one block on one rank. ``tokens`` are those that it works on.

    ``width`` is the bytes of one element of a row, averaged over both ways; ``weight_width`` those of a weight.
    """

    soc: str
    ep_size: int
    tokens: int
    hidden: int
    intermediate: int
    top_k: int
    local_experts: int
    width: float
    weight_width: float


def estimate(implementation: str, load: Load) -> float:
    """Estimated time in microseconds, with tokens spread evenly over experts.

    Raises:
        ValueError: for an implementation that the model does not know.
    """
    machine = look_up(SOCS, load.soc, "cost: soc")
    cost = look_up(_COSTS, implementation, "cost: implementation")
    return cost(load, machine, _compute(load, machine))


def _allgather(load: Load, machine: Soc, compute: float) -> float:
    local = 3 * VECTOR_US + 2 * MATMUL_US
    if load.ep_size == 1:
        return local + compute
    moved = 2 * (load.ep_size - 1) * load.tokens * load.hidden * load.width
    return 4 * COLLECTIVE_US + 5 * VECTOR_US + local + compute + _transfer(moved, machine)


def _alltoall(load: Load, machine: Soc, compute: float) -> float:
    """Every token to every rank and sums back, as AllGather, whose last exchange adds them up; here that is a kernel more.

    Other forms cost the same here: a ``Load`` does not say which it is. By exact splits it moves less.
    """
    return _allgather(load, machine, compute) + VECTOR_US


def _mc2(load: Load, machine: Soc, compute: float) -> float:
    launches = 2 * COLLECTIVE_US + 2 * MATMUL_US + VECTOR_US + DISPATCH_FIXED_US
    return launches + compute + _transfer(_sent_to_experts(load), machine)


def _fused_mc2(load: Load, machine: Soc, compute: float) -> float:
    return COLLECTIVE_US + DISPATCH_FIXED_US + max(compute, _transfer(_sent_to_experts(load), machine))


# By implementation: the load, its machine, the time of its matmuls.
_COSTS: dict[str, Callable[[Load, Soc, float], float]] = {
    "allgather": _allgather,
    "alltoall": _alltoall,
    "mc2": _mc2,
    "fused_mc2": _fused_mc2,
}


def _sent_to_experts(load: Load) -> float:
    """Bytes, both ways: each token to its k experts, of which (ep - 1) / ep live elsewhere."""
    return 2 * load.top_k * load.tokens * load.hidden * load.width * (load.ep_size - 1) / load.ep_size


def _transfer(moved: float, machine: Soc) -> float:
    return moved / (machine.link * COMM_EFFICIENCY * 1e3)


def _compute(load: Load, machine: Soc) -> float:
    weights = 3 * load.hidden * load.intermediate
    operations = 2 * load.tokens * load.top_k * weights
    read = load.local_experts * weights * load.weight_width
    return max(
        operations / (machine.compute * COMPUTE_EFFICIENCY * 1e6), read / (machine.memory * MEMORY_EFFICIENCY * 1e3)
    )
