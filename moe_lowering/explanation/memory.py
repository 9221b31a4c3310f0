"""What a model's experts and buffers take of a SoC's memory, for ``explain``: said and warned of, never refused.

Counted are the experts of all MoE layers, the most that the results of one layer take at once (row buffers at their bound;
layers follow each other, and share it), a fused operator's workspace where it is known (shared likewise), and twice
HCCL_BUFFSIZE, to send and to receive, for each communicator that the choice uses (CANN 8.5, HCCL user guide, HCCL_BUFFSIZE:
hiascend.com canncommercial/850/commlib/hcclug/hcclug_000076.html).
Attention, the KV cache, other communicators and all else of the model are not known here, so what fits may still be too much.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_lowering.deployment import Deployment
from moe_lowering.number_words import count_of, gigabytes
from moe_lowering.passes.operands import ExpertOperands
from moe_lowering.prices.machines import machine_of

TOO_SMALL = "memory.too_small"
ON_TOP = "MoE layers only: attention, embeddings, KV cache and other communicators come on top"
_WINDOWS = 2  # of HCCL_BUFFSIZE for each communicator
_FEWEST_BITS = 4  # experts in 4 bits take a quarter of those in bfloat16


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        experts: weights, scales and biases of the experts of one MoE layer. layers: how many there are; None where it is not
            known, and one is counted.
        buffers: what the results of one layer take at most. workspace: what its fused operator takes beside them; 0 without
            one, None where it is not known, and none is counted. window: of HCCL, for ``communicators``.
        capacity: of the SoC; None where it is not known.
        least_buffer_mb: the smallest HCCL_BUFFSIZE that the choice's rules accept.
    """

    experts: int
    layers: int | None
    buffers: int
    workspace: int | None
    window: int
    communicators: int
    capacity: int | None
    least_buffer_mb: int = 1

    @property
    def needed(self) -> int:
        return self.experts * (self.layers or 1) + self.of_one_layer + self.window

    @property
    def of_one_layer(self) -> int:
        """What a layer takes while it runs, beside its experts: the next one takes the same memory."""
        return self.buffers + (self.workspace or 0)

    @property
    def fits(self) -> bool:
        """Whether it may fit: what is not counted is not known."""
        return self.capacity is None or self.needed <= self.capacity

    def to_json(self) -> dict[str, Any]:
        fields = {**dataclasses.asdict(self), "needed": self.needed, "fits": self.fits}
        del fields["least_buffer_mb"]  # stands with the window's rule, under sizes
        return fields

    def __str__(self) -> str:
        layers = (
            count_of(self.layers, "MoE layer") if self.layers else "one MoE layer (how many there are is not known)"
        )
        window = "no HCCL window"
        if self.communicators:
            communicators = count_of(self.communicators, "communicator")
            window = f"{gigabytes(self.window)} HCCL windows ({communicators}, twice HCCL_BUFFSIZE each)"
        capacity = (
            "memory of the SoC is not known" if self.capacity is None else f"the SoC has {gigabytes(self.capacity)}"
        )
        text = (
            f"{gigabytes(self.needed)} = {gigabytes(self.experts * (self.layers or 1))} experts of {layers}, "
            f"{gigabytes(self.buffers)} buffers, {self._workspace()}{window}; {capacity}"
        )
        return f"{text} ({ON_TOP})" if self.fits else f"[{TOO_SMALL}] {text}: it cannot fit ({self._advice()})"

    def _workspace(self) -> str:
        if self.workspace is None:
            return "a workspace of unknown size, "
        return f"{gigabytes(self.workspace)} workspace, " if self.workspace else ""

    def _advice(self) -> str:
        """What alone may be enough; each is named only where all else leaves room."""
        assert self.capacity is not None
        experts = self.experts * (self.layers or 1)
        rest = self.of_one_layer + self.window
        ways = ["more ranks"] if rest < self.capacity else []
        ways += ["experts of fewer bits"] if experts / _FEWEST_BITS + rest < self.capacity else []
        ways += ["fewer tokens"] if experts + self.window < self.capacity else []
        if self.communicators:
            room = self.capacity - experts - self.of_one_layer
            most = room // (self.communicators * _WINDOWS * 2**20)
            ways += [f"HCCL_BUFFSIZE of at most {most} MB"] if most >= self.least_buffer_mb else []
        return ", or ".join(ways) or "no one thing is enough: more ranks, and fewer tokens or a smaller HCCL_BUFFSIZE"


def memory_of(
    experts: ExpertOperands,
    layers: int | None,
    buffers: int,
    workspace: int | None,
    deployment: Deployment,
    choice: str | None,
    least_buffer_mb: int | None,
) -> Memory:
    """Of one rank in a deployment.

    Args:
        buffers, workspace: bytes. choice: the implementation; None for none.
        least_buffer_mb: the smallest HCCL_BUFFSIZE that its rules accept; None where none is on it.
    """
    exchanges = int(choice is not None and deployment.ep_size > 1) + int(deployment.tp_size > 1)
    gib = machine_of(deployment.soc).memory_gib
    return Memory(
        experts_bytes(experts),
        layers,
        buffers,
        workspace,
        exchanges * _WINDOWS * deployment.hccl_buffer_bytes,
        exchanges,
        gib * 2**30 or None,
        least_buffer_mb or 1,
    )


def experts_bytes(experts: ExpertOperands) -> int:
    """Bytes of one layer's experts on a rank."""
    lists = (getattr(experts, field.name) for field in dataclasses.fields(experts))
    return sum(_bytes(each) for operands in lists for each in operands.items)


def _bytes(each: Any) -> int:
    count = 1
    for n in each.shape:
        count *= n
    return int(count) * int(each.dtype.itemsize)
