"""What runs on the ranks of ``test_ranks_that_differ``: layers of which one rank changes one thing."""

import contextlib
import functools
import os
import time
from unittest import mock

import rank_jobs
import torch
from torch import nn

import moe_lowering
from moe_lowering import MoE, MoeLowering, lowering_backend, npugraph_ex_options, shard_experts
from moe_lowering._versions import installed_version, sources_digest
from moe_lowering.agreement_rounds import group_session
from moe_lowering.custom_ops import assert_agreement
from moe_lowering.passes.verifier import VerificationError

SIZES = {"hidden": 1024, "intermediate": 128, "experts": 12, "top_k": 3, "activation": "swiglu"}
BREAKS = {
    "code": mock.patch(
        "moe_lowering.passes.agreement_check.sources_digest",
        lambda *suffixes: sources_digest(*suffixes) if suffixes else "another",
    ),
    "library": mock.patch("moe_lowering.limits.calls.schemas._is_loaded", lambda library, name: False),
    "torch_npu": mock.patch(
        "moe_lowering.passes.agreement_check.installed_version",
        lambda name: "2.99.0" if name == "torch_npu" else installed_version(name),
    ),
    "every run": mock.patch.dict(os.environ, {assert_agreement.COMPARE_EVERY_RUN: "1"}),
    "rewrite": mock.patch("moe_lowering.passes.run.graph_run.same_value", side_effect=VerificationError("on purpose")),
}


class Layers(nn.Module):
    """Equal MoE layers one after the other, with a mask, and with the experts' load as a result."""

    def __init__(self, where, changes):
        super().__init__()
        sizes = {name: changes.get(name, value) for name, value in SIZES.items()}
        hidden, intermediate, self.experts, self.top_k, activation = sizes.values()
        self.where, self.load, self.layers = where, changes.get("load", False), changes.get("layers", 1)
        self.dtype, self.hidden = getattr(torch, changes.get("dtype", "bfloat16")), hidden
        torch.manual_seed(0)
        whole = MoE(hidden, intermediate, self.experts, self.top_k, activation=activation, dtype=self.dtype)
        self.moe = shard_experts(whole, where)
        if changes.get("transposed"):  # the same values in another order of memory
            self.moe.w13 = nn.Parameter(self.moe.w13.transpose(1, 2).contiguous().transpose(1, 2), requires_grad=False)

    def forward(self, x, mask):
        loads = []
        for _ in range(self.layers):
            weights, ids = moe_lowering.route(self.moe.gate(x), self.top_k)
            x, counts, _ = moe_lowering.moe_experts(
                x, weights, ids, self.moe.w13, self.moe.w2, num_experts=self.experts, deployment=self.where, mask=mask,
                return_counts=True, activation=self.moe.activation,
            )  # fmt: skip
            loads.append(counts)
        return (x, *loads) if self.load else (x,)


def compile_layers(rank, changes, comm, fields, backend="aot", timeout="auto"):
    """The compiled layers of a rank with its changes, and the pass object."""
    where = rank_jobs.deployment(rank, **fields)
    lowering = MoeLowering(where, comm, cost=rank_jobs.fused_first)
    options = {}
    compiler = lowering_backend(lowering)
    if backend == "npugraph_ex":
        compiler = backend
        options["options"] = npugraph_ex_options(where, lowering=lowering, force_eager=True, agreement_timeout=timeout)
    torch._dynamo.reset()
    module = Layers(where, changes)
    return module, torch.compile(module, backend=compiler, fullgraph=True, dynamic=False, **options), lowering


def call(rank, module, compiled, tokens, mask=False):
    x = torch.randn(tokens, module.hidden, generator=torch.Generator().manual_seed(rank)).to(module.dtype)
    with torch.no_grad():
        return compiled(x, torch.arange(tokens) < tokens - 2 if mask else None)


def first_run(rank, by_rank, comm="auto", fields=None):
    """The error of the first run on each rank, or what the blocks were lowered to."""
    changes = by_rank.get(rank, {})
    module, compiled, lowering = compile_layers(rank, changes, comm, fields or {})
    with BREAKS.get(changes.get("breaks"), contextlib.nullcontext()):
        try:
            call(rank, module, compiled, changes.get("tokens", 6), changes.get("mask", False))
        except Exception as error:
            return str(error)
    return [block.comm for report in lowering.reports for block in report.blocks]


def run_beside_eager(rank, by_rank, comm, fields):
    """What the blocks were lowered to, and whether the result is that of the generic operators."""
    changes = by_rank.get(rank, {})
    module, compiled, lowering = compile_layers(rank, changes, comm, fields)
    got, want = (call(rank, module, each, 6, changes.get("mask", False))[0] for each in (compiled, module))
    close = torch.allclose(got.float(), want.float(), rtol=0.02, atol=0.02 * float(want.float().abs().max()))
    return [block.comm for report in lowering.reports for block in report.blocks], close


def later_run(rank, other_tokens):
    """All agree; then rank 1 alone comes with another T. Each rank's error, and after how many seconds."""
    module, compiled, _ = compile_layers(rank, {}, "allgather", {}, "npugraph_ex")
    for _ in range(2):
        call(rank, module, compiled, 6)
    start = time.monotonic()
    try:
        call(rank, module, compiled, other_tokens if rank == 1 else 6)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "no error", time.monotonic() - start


def print_options(rank, often, timeout):
    """Rank 0 asks for options so often, with settings of many kinds, before it compiles; what the blocks were lowered to."""
    where = rank_jobs.deployment(rank)
    for number in range(often if rank == 0 else 0):
        npugraph_ex_options(where, comm=("auto", "mc2")[number % 2], force_eager=True)
    module, compiled, lowering = compile_layers(rank, {}, "allgather", {}, "npugraph_ex", timeout)
    call(rank, module, compiled, 6)
    return lowering.reports[-1].blocks[0].comm


def without_agreement(rank, tokens):
    """With ``agreement_timeout=None`` a rank that comes with another kind of graph is not asked for."""
    module, compiled, lowering = compile_layers(rank, {"load": rank == 1}, "allgather", {}, "npugraph_ex", None)
    with mock.patch("moe_lowering.custom_ops.assert_agreement.group_session", side_effect=AssertionError("asked")):
        call(rank, module, compiled, tokens)
    return lowering.reports[-1].blocks[0].comm


def error_of(run):
    try:
        run()
    except Exception as error:
        return str(error)
    return ""


def agree_on_two(rank, fields):
    """Layers that both ranks have compiled for T = 6 and, with another number of layers, for T = 8; how to run each."""
    both = {}
    for tokens, changes in ((6, {}), (8, {"layers": 2})):
        module, compiled, _ = compile_layers(rank, changes, "allgather", fields)
        both[tokens] = functools.partial(call, rank, module, compiled, tokens)
        both[tokens]()
    return both


def wait_until_asked(seconds=20.0):
    """Until another rank waits for this one."""
    session, _, _ = group_session(torch.distributed.group.WORLD.group_name)
    deadline = time.monotonic() + seconds
    while not session.is_asked("blocks") and time.monotonic() < deadline:
        time.sleep(0.01)


def compile_again(rank, fields, other_layers):
    """All agree; then rank 0 compiles the same once more, and rank 1 runs what it has, or other layers before that."""
    module, compiled, _ = compile_layers(rank, {}, "allgather", fields)
    call(rank, module, compiled, 6)
    if rank == 1 and other_layers:
        module, compiled, _ = compile_layers(rank, {"layers": other_layers}, "allgather", fields)
    if rank == 0:
        if other_layers:
            wait_until_asked()
        module, compiled, _ = compile_layers(rank, {}, "allgather", fields)
    return error_of(lambda: call(rank, module, compiled, 6))


def runs_of_two(rank, turns, fields):
    """The error of each run after all agreed on two graphs, of which each rank takes one by turns."""
    with BREAKS["every run"]:
        both = agree_on_two(rank, fields)
        return [error_of(both[turn[rank]]) for turn in turns]


def run_often(rank, often):
    """Each run is compared, and rank 0 compiles in between: how many rounds there were, on each rank."""
    with BREAKS["every run"]:
        session, _, _ = group_session(torch.distributed.group.WORLD.group_name)
        module, compiled, _ = compile_layers(rank, {}, "allgather", {})
        before = session._rounds["blocks"]
        for number in range(often):
            if rank == 0 and number == 1:
                module, compiled, _ = compile_layers(rank, {}, "allgather", {})
            call(rank, module, compiled, 6)
        return session._rounds["blocks"] - before
