"""``lower --capture``: the lowered model as an NPU graph on the simulated device, replayed with new inputs and routings.

Each replay is compared with the model's own, unlowered experts on the CPU, logits and every MoE block, as a run without
capture is (``compare``). That is stronger than the lowered model without a graph on the same device: it shares neither
the device's memory nor the lowering, so what a replay read from a stale address, or never computed, shows as an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from moe_lowering import simulator
from moe_lowering.cli.lower import compare, models
from moe_lowering.cli.lower.request import LowerRequest
from moe_lowering.layers.moe import MoE
from moe_lowering.number_words import count_of, megabytes
from moe_lowering.simulator.device import SourceLine, Tape
from moe_lowering.source_lines import innermost

DEVICE = "npu"
# Of inputs, in turn; equal tokens leave experts without rows
KINDS = ("random", "one token", "random", "half one token")
SEED = 4000
BLOCK = ("dispatch", "grouped_mlp", "combine")


@dataclasses.dataclass(frozen=True)
class Captured:
    """What one rank's captured graphs are and did.

    Attributes:
        captures: NPU graphs that were captured; ``sizes`` is how many there should be, one for each token count.
        replays: runs of them; ``calls`` is how often the model was called.
        operators_per_layer: launches that one MoE layer has on the tape, from the dispatch of its tokens to the combined
            result (without router and shared experts); the most of all layers and sizes, 0 when none is found.
        pool_bytes: device memory of the graphs' pool, with the blocks' inputs and outputs that are kept to be compared.
        routings: different assignments of tokens to experts that the MoE layers saw.
        fewest_experts, experts: experts that had rows in the most skewed of them, of how many.
    """

    captures: int
    sizes: int
    replays: int
    calls: int
    operators_per_layer: int
    pool_bytes: int
    routings: int
    fewest_experts: int
    experts: int

    def problems(self) -> list[str]:
        """What was not as a captured model must be."""
        problems = []
        if self.captures != self.sizes:
            problems.append(
                f"{count_of(self.captures, 'graph')} captured for {count_of(self.sizes, 'token count')}; accepted: one for each"
            )
        if self.replays != self.calls:
            problems.append(
                f"{count_of(self.replays, 'replay')} in {count_of(self.calls, 'call')}; accepted: one for each"
            )
        return problems

    def to_json(self) -> dict[str, int]:
        names = ("captures", "replays", "operators_per_layer", "pool_bytes")
        return {name: getattr(self, name) for name in names}

    def rows(self) -> list[tuple[str, str]]:
        """(label, text) for the report."""
        return [
            ("captures", f"{self.captures} for {count_of(self.sizes, 'token count')}"),
            (
                "replays",
                f"{self.replays}, each with new inputs and compared; {self.routings} different routings, "
                f"of which the most skewed gave rows to {self.fewest_experts} of {self.experts} experts",
            ),
            ("MoE layer", f"{self.operators_per_layer} operators on the tape, from dispatch to combine"),
            (
                "memory pool",
                f"{megabytes(self.pool_bytes)}, with the MoE blocks' inputs and outputs for the comparison",
            ),
        ]


class Sources:
    """A pre-pass that notes which lines of the model the MoE blocks come from; it changes nothing."""

    def __init__(self) -> None:
        self.places: set[SourceLine] = set()

    def __call__(self, gm: GraphModule, example_inputs: Any, config: Any) -> None:
        ours = [getattr(torch.ops.moe_lowering, name).default for name in BLOCK]
        for node in gm.graph.nodes:
            if node.target in ours and (place := innermost(node.meta.get("stack_trace") or "")):
                self.places.add(place)


def communicator(group: Any, rank: int) -> str:
    """The HCCL name of a group, which MC2 operators take on a device."""
    return str(group._get_backend(torch.device(DEVICE)).get_hccl_comm_name(rank))


def inputs(plan: models.ModelPlan, request: LowerRequest, length: int, rank: int, step: int) -> Tensor:
    """Tokens [batch, length] of one replay; in some replays the same token everywhere, on all ranks."""
    generator = torch.Generator().manual_seed(SEED + 1000 * step + rank)
    ids = torch.randint(3, plan.vocabulary, (request.batch, length), generator=generator)
    token = 3 + (SEED + 7 * step) % (plan.vocabulary - 3)
    kind = KINDS[step % len(KINDS)]
    if kind == "one token":
        ids.fill_(token)
    elif kind == "half one token":
        ids[:, : (length + 1) // 2] = token
    return ids


@torch.no_grad()
def replay(
    run: Callable[[Tensor], Tensor],
    reference: nn.Module,
    recorded_routings: compare.Taken,
    batches: Sequence[Tensor],
    sources: Sources,
) -> tuple[Captured, compare.Errors]:
    """Run the captured model on every batch of token ids, and compare each run with the reference on the CPU.

    Args:
        run: the compiled model on device npu; ``taken`` is what ``compare.record`` made of it.
        reference: the unsharded model on the CPU, after ``compare.use_reference``.
    """
    before, old = simulator.device.counts(), set(map(id, simulator.device.tapes()))
    errors, routings = compare.Errors(), Routings(compare.moe_modules(reference))
    for input_ids in batches:
        recorded_routings.clear()
        actual = run(input_ids.to(DEVICE)).cpu()
        # The next replay writes over them
        recorded = [tuple(tensor.cpu() for tensor in block) for block in recorded_routings]
        errors = errors.merge(compare.compare(reference, input_ids, actual, recorded))
        routings.add(recorded)
    counts = simulator.device.counts() - before
    tapes = [tape for tape in simulator.device.tapes() if id(tape) not in old]
    captured = Captured(
        captures=counts.captured,
        sizes=len({input_ids.shape for input_ids in batches}),
        replays=counts.replayed,
        calls=len(batches),
        operators_per_layer=max((len(layer) for tape in tapes for layer in layers_of(tape, sources)), default=0),
        pool_bytes=sum({tape.pool: tape.pool_bytes() for tape in tapes}.values()),
        routings=len(routings.seen),
        fewest_experts=routings.fewest,
        experts=routings.experts,
    )
    return captured, errors


def layers_of(tape: Tape, sources: Sources) -> list[list[str]]:
    """The operators of each MoE block on a tape, in order: runs of launches that come from the blocks' lines."""
    layers: list[list[str]] = []
    inside = False
    for entry in tape.entries:
        if entry.place not in sources.places:
            inside = False
            continue
        if not inside:
            layers.append([])
        inside = True
        layers[-1].append(entry.operator)
    return layers


class Routings:
    """Which experts the MoE layers of a model chose, over all replays."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.seen: set[tuple[int, ...]] = set()
        self.experts = max((int(getattr(module, "num_experts", 0)) for module in modules), default=0)
        self.fewest = self.experts

    def add(self, recorded: compare.Taken) -> None:
        """What one replay chose, from what its blocks were given."""
        for module, (*inputs, _) in zip(self.modules, recorded, strict=True):
            ids = compare.plain_route(module, inputs[0])[1] if isinstance(module, MoE) else inputs[1]
            chosen = ids.flatten().tolist()
            self.seen.add(tuple(chosen))
            self.fewest = min(self.fewest, len(set(chosen)))
