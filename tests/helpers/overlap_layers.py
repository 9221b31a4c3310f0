"""Layers with a shared expert, checks of the order between streams, and what a rank does: for ``test_overlap``."""

from __future__ import annotations

import operator
from contextlib import contextmanager

import rank_jobs
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from moe_lowering import MoE, MoeLowering, npugraph_ex_options, shard_experts
from moe_lowering.passes.overlap import LABEL

MAIN = "main"
MOVED = ["tagged_event_wait", "t", "mm", "silu", "t", "mm", "mul", "t", "mm", "tagged_event_record"]


class SharedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden, intermediate, dtype):
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, intermediate, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(intermediate, hidden, bias=False, dtype=dtype)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """One decoder layer's MLP half; ``join(layer, x, h, y)`` says how the shared expert meets the block's result."""

    def __init__(self, hidden=64, intermediate=32, experts=6, top_k=2, dtype=torch.float32, join=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.RMSNorm(hidden, dtype=dtype)
        self.moe = MoE(hidden, intermediate, experts, top_k, dtype=dtype)
        self.shared = SharedMlp(hidden, intermediate + 16, dtype)
        for tensor in self.parameters():
            if tensor.dim() > 1:
                tensor.data = (torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5).to(dtype)
        self.join = join
        self.requires_grad_(False)

    def forward(self, x):
        h = self.norm(x)
        if self.join is not None:
            return self.join(self, x, h)
        return x + self.moe(h) + self.shared(h)

    def expected(self, x):
        """The layer in float64, on one rank."""
        h = self.norm(x)
        weights, ids = reference.route(
            self.moe.gate(h).float(), None, self.moe.top_k, "softmax", True, 1, 1, "max", 1.0
        )
        gate, up, down = (m.weight.double() for m in (self.shared.gate, self.shared.up, self.shared.down))
        each = h.double()
        a = each @ gate.T
        shared = (a * torch.sigmoid(a) * (each @ up.T)) @ down.T
        return x.double() + reference.moe(h, weights, ids, self.moe.w13, self.moe.w2).double() + shared


def stream_errors(graph):
    """What the events of a graph leave to chance: values read before they exist, memory given back too early.

    Also says when nothing can overlap: a side stream whose work some operator of the main stream waits for at once.
    """
    clocks, events, made, errors, scopes = {MAIN: {MAIN: 0}}, {}, {}, [], []
    crossing = {}  # what another stream reads -> (that stream, its position)
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    for node in nodes:
        name = getattr(node.target, "_opname", "")
        if name == "scope_enter":
            scopes.append(node.args[1][0])
            continue
        if name == "scope_exit":
            scopes.pop()
            continue
        stream = scopes[-1] if scopes else MAIN
        clock = clocks.setdefault(stream, {stream: 0})
        if name == "tagged_event_record":
            if node.args[0] in events:  # then which of the two a wait means depends on when it is issued
                errors.append(f"event {node.args[0]} is recorded twice")
            events[node.args[0]] = dict(clock)
        elif name == "tagged_event_wait":
            for other, position in events[node.args[0]].items():
                clock[other] = max(clock.get(other, 0), position)
        elif name != "keep_alive":
            clock[stream] += 1
            made[node] = (stream, dict(clock))
            for source in node.all_input_nodes:
                owner, before = made.get(source, (MAIN, {MAIN: 0}))
                if owner != stream and before[owner] > clock.get(owner, 0):
                    errors.append(f"{node.name} does not wait for {source.name}")
                if owner != stream and owner == MAIN:
                    crossing[source] = (stream, clock[stream])
        if stream == MAIN:  # the last reader of a value gives its memory back
            for source, (other, position) in crossing.items():
                last = max(source.users)
                if last is node and clock.get(other, 0) < position:
                    errors.append(f"{source.name} is given back while {other} may read it")
    return errors


def region(graph):
    """The names of the operators in the side stream's scopes, one list per scope."""
    found, inside = [], False
    for node in graph.nodes:
        name = getattr(node.target, "_opname", "")
        if name == "scope_enter" and node.args[1] == [LABEL]:
            found.append([])
            inside = True
        elif name == "scope_exit":
            inside = False
        elif inside and node.target is not operator.getitem:
            found[-1].append(name)
    return found


@contextmanager
def watched_capture():
    """Every operator that is captured on device npu, as (stream, clock, reads, writes) with the addresses of each."""
    from moe_lowering.simulator.device import capture_state, kernels
    from moe_lowering.simulator.device.memory import host_alias, on_npu

    launches, record = [], kernels._record

    def extents(values):
        aliases = [host_alias(value) for value in tree_leaves(values) if on_npu(value) and value.numel()]
        last = [sum((n - 1) * step for n, step in zip(a.shape, a.stride(), strict=True)) for a in aliases]
        return [(a.data_ptr(), a.data_ptr() + (n + 1) * a.element_size()) for a, n in zip(aliases, last, strict=True)]

    def watched(op, name, around, args, kwargs, *rest):
        result = record(op, name, around, args, kwargs, *rest)
        entry = capture_state.latest_tape().entries[-1]
        launches.append((name, entry.stream, entry.clock, extents((args, kwargs)), extents(result)))
        return result

    kernels._record = watched
    try:
        yield launches
    finally:
        kernels._record = record


def races(launches):
    """Pairs of operators on two streams, neither of which waits for the other, where one writes what the other touches."""

    def meet(one, other):
        return any(a < d and c < b for a, b in one for c, d in other)

    found = []
    for i, (name, stream, clock, reads, writes) in enumerate(launches):
        for later, other, seen, later_reads, later_writes in launches[i + 1 :]:
            ordered = stream == other or seen.get(stream, 0) >= clock[stream]
            if not ordered and (meet(writes, later_reads + later_writes) or meet(reads, later_writes)):
                found.append((name, later))
    return found


def lower_and_run(rank, comm, overlap):
    """This rank's layer through npugraph_ex: (output, notes, names in the scopes)."""
    where = rank_jobs.deployment(rank)
    module = shard_experts(Layer(1024, 128, 12, 3, torch.bfloat16), where)
    lowering = MoeLowering(where, comm, strict=True, overlap=overlap)
    seen = []
    torch._dynamo.reset()
    options = npugraph_ex_options(
        where, lowering=lowering, force_eager=True,
        post_grad_custom_post_pass=lambda gm, *_: seen.append((region(gm.graph), stream_errors(gm.graph))),
    )  # fmt: skip
    with torch.no_grad():
        y = torch.compile(module, backend="npugraph_ex", fullgraph=True, options=options)(tokens(rank))
    return y, lowering.reports[-1].blocks[0].notes, *seen[0]


def tokens(rank):
    return rank_jobs.tokens_of(rank, 6, torch.bfloat16, False)


def big(join=None):
    return Layer(1024, 128, 12, 3, torch.bfloat16, join)


def without(name, nth, graph):
    nodes = [node for node in graph.nodes if getattr(node.target, "_opname", "") == name]
    graph.erase_node(nodes[nth])
    return stream_errors(graph)
