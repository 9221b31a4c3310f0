"""``Statistics``, the counters of one server, and the numbers of captures and compiles that the process has seen so far."""

from __future__ import annotations

import dataclasses

from moe_lowering.number_words import count_of


@dataclasses.dataclass
class Statistics:
    """Counters of one server, from its making on.

    Attributes:
        requests: finished.
        cancelled: ended by ``Server.cancel``; not among the finished.
        steps: decode steps by bucket, without warm-up's.
        real_tokens: rows of decode steps that held a request; each made one token.
        padded_tokens: rows that filled a bucket up.
        prefill_tokens: tokens of prompts.
        prefill_padding: tokens that filled prompts up to the end of their range.
        graphs: compiled in warm-up, as dynamo counts them: one per bucket, and one per range of prompt lengths.
        recompiles: compiled after it. The server raises instead, so anything but 0 is a bug.
        captures: NPU graphs captured, as npugraph_ex counts them: one per bucket; none with ``force_eager``.
        replays: NPU graphs run, warm-up's one per bucket included.
    """

    requests: int = 0
    cancelled: int = 0
    steps: dict[int, int] = dataclasses.field(default_factory=dict)
    real_tokens: int = 0
    padded_tokens: int = 0
    prefill_tokens: int = 0
    prefill_padding: int = 0
    graphs: int = 0
    recompiles: int = 0
    captures: int = 0
    replays: int = 0

    def __str__(self) -> str:
        padding = self.padded_tokens / max(1, self.real_tokens + self.padded_tokens)
        steps = ", ".join(f"{count} of {bucket}" for bucket, count in sorted(self.steps.items()))
        counted = (
            f"{count_of(self.requests, 'request')}, {self.cancelled} cancelled, {count_of(self.prefill_tokens, 'prompt token')}, "
            f"{count_of(self.real_tokens, 'decoded token')}"
        )
        graphs = (
            f"{count_of(self.graphs, 'graph')}, {count_of(self.recompiles, 'recompile')}, "
            f"{count_of(self.captures, 'capture')}, {count_of(self.replays, 'replay')}"
        )
        return f"{counted}; steps: {steps or 'none'}; padding {padding:.0%}; {graphs}"


def captures_so_far() -> int:
    """NPU graphs that npugraph_ex has captured in this process, captures again of the same graph included.

    Source: wheel.acl_graph: counters of torch._dynamo.utils.
    """
    from torch._dynamo.utils import counters

    kinds = ("captured_", "recapture_due_to_")
    return sum(count for name, count in counters["npugraph_ex"].items() if name.startswith(kinds))


def graphs_so_far() -> int:
    """Graphs that dynamo has given to a backend in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
