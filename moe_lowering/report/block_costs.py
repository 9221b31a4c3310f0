"""What each implementation of a block costs, for reports: counted from the nodes that it emits, and priced."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_lowering.number_words import count_of, megabytes


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """One implementation of one block, at one number of tokens of a rank. Bytes are those of ``graph_costs``.

    Attributes:
        implementation, form: by their names.
        tokens: T that it is counted at.
        kernels: launches of a layer, ``exchanges`` of them collectives. once: kernels that all layers of a graph share.
        moved: bytes read and written beside the experts' weights, ``outside`` of them not by collectives.
        sent_within, sent_between: bytes that a rank sends to others of its node, and to other nodes; those that MC2's and the
            fused operators send inside among them, with tokens spread evenly.
        buffers: the most bytes that the layer's results take at once, row buffers at their bound.
        workspace: bytes that a fused operator takes beside them; 0 for several operators, None where it is not known.
        us, error_us: the price, and how wrong it may be.
    """

    implementation: str
    form: str
    tokens: int
    kernels: int
    exchanges: int
    once: int
    moved: int
    outside: int
    sent_within: int
    sent_between: int
    buffers: int
    workspace: int | None
    us: float
    error_us: float

    @property
    def name(self) -> str:
        """The implementation, and its form where that has another name."""
        return self.implementation if self.form in ("", self.implementation) else f"{self.implementation} ({self.form})"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        several = "an exchange" if self.exchanges == 1 else "exchanges"
        exchanges = f", {self.exchanges} of them {several}" if self.exchanges else ""
        within = f", {megabytes(self.sent_within)} sent within the node" if self.sent_within else ""
        start = " and" if within else ", sent:"
        between = f"{start} {megabytes(self.sent_between)} to other nodes" if self.sent_between else ""
        once = f"; {count_of(self.once, 'kernel')} once per graph" if self.once else ""
        return (
            f"{self.name}: {count_of(self.kernels, 'kernel')}{exchanges}, {megabytes(self.moved)} read and "
            f"written beside weights{within}{between}, buffers of "
            f"{megabytes(self.buffers)}{self._workspace()}{once}; "
            f"{self.us:.0f} +- {self.error_us:.0f} us"
        )

    def _workspace(self) -> str:
        if self.workspace is None:
            return ", its workspace is not known"
        return f", workspace of {megabytes(self.workspace)}" if self.workspace else ""
