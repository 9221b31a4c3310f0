"""What becomes of graphs with random edits, on each of several ranks that edit theirs alike."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import torch.distributed as dist
from graph_edits import values
from npu_chain_edits import edit

from moe_lowering import Deployment, MoeLowering
from moe_lowering.report.records import LoweringReport

# "no graph": the edit made a graph that does not run, whatever a pass does. "ranks differ": the pass left the layer on some ranks
# and raised it on others, whose graphs then do not meet; what compares the ranks refuses that, and is left out here.
# "not finite": it was raised, and the graph before reads rows that nobody wrote, which the simulator fills with NaN.
OUTCOMES = ("left", "raised", "no graph", "ranks differ", "not finite")


def outcomes(
    base: Any, made: dict[str, torch.Tensor], where: Deployment, comm: str, seeds: list[str]
) -> list[tuple[str, str]]:
    """What became of copies of a graph with random edits: (one of ``OUTCOMES``, what is wrong or "")."""
    logging.disable()
    report = lower_copy(base, where, comm)[1]
    found = [block.comm for block in report.blocks]
    assert found == [comm], (report.blocks, report.foreign)  # else no edit shows anything
    return [_outcome(base, made, where, comm, seed) for seed in seeds]


def _outcome(base: Any, made: dict[str, torch.Tensor], where: Deployment, comm: str, seed: str) -> tuple[str, str]:
    gm, done = edit(base, seed)
    if not runs_everywhere(gm, made):
        return "no graph", ""
    lowered, report = lower_copy(gm, where, comm)
    blocks = report.blocks
    wrong = [block.reason for block in blocks if "internal error" in block.reason or "undone" in block.reason]
    raised = any(block.comm == comm for block in blocks)
    if not _alike_everywhere([*exchanges(lowered), *(str(block.comm) for block in blocks)]):
        return "ranks differ", f"{seed}: {done}: {wrong}" if wrong else ""
    if wrong or not raised:
        return "left", f"{seed}: {done}: {wrong}" if wrong else ""
    before = run_all(second_versions(gm), made)
    if not _alike_everywhere([str(isinstance(before, str))]) or isinstance(before, str):
        return "no graph", ""
    after = run_all(lowered, made)
    if not all(torch.isfinite(each.double()).all() for each in before):
        return "not finite", ""
    return "raised", difference(before, after) and f"{seed}: {done}: {difference(before, after)}"


def lower_copy(gm: Any, where: Deployment, comm: str) -> tuple[Any, LoweringReport]:
    """A copy of a graph, lowered without a comparison of the ranks, and what is said of it."""
    lowered = copy.deepcopy(gm)
    lowering = MoeLowering(where, comm)
    lowering(lowered, agreement_timeout=None)
    return lowered, lowering.reports[0]


def exchanges(gm: Any) -> list[str]:
    """What a graph sends to other ranks, in its order: operators, sizes and dtypes."""
    nodes = [node for node in gm.graph.nodes if getattr(node.target, "namespace", "") in ("_c10d_functional", "npu")]
    sent = [[(str(each.dtype), tuple(each.shape)) for each in _tensors(node)] for node in nodes]
    return [f"{node.target} {each}" for node, each in zip(nodes, sent, strict=True)]


def _tensors(node: Any) -> list[torch.Tensor]:
    found = [source.meta.get("val") for source in node.all_input_nodes]
    return [value for value in found if isinstance(value, torch.Tensor)]


def _alike_everywhere(what: list[str]) -> bool:
    """Whether all ranks have the same; one alone has."""
    if not dist.is_initialized():
        return True
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, what)
    return all(each == what for each in everywhere)


_NORMED = "npu_moe_distribute_combine_add_rms_norm"
# Of operators without CPU kernels, those that compute the same of the same arguments, but for the norm
_SECOND = {
    **{f"npu_moe_distribute_{name}": f"npu_moe_distribute_{name}_v2" for name in ("dispatch", "combine")},
    _NORMED: "npu_moe_distribute_combine_v2",
}


def normed_combine(
    *args: Any, residual_x: torch.Tensor, gamma: torch.Tensor, norm_eps: float = 1e-6, **more: Any
) -> Any:
    """By the formulas of its page: the sum with the residual [T, 1, H], normalised, beside 1 / its root mean square."""
    combined = torch.ops.npu.npu_moe_distribute_combine_v2(*args, **more)
    total = (combined.unsqueeze(1) + residual_x).double()
    inverse = (total.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    return (total * inverse * gamma.double()).to(gamma.dtype), inverse.float(), total.to(gamma.dtype)


def second_versions(gm: Any) -> Any:
    """A graph in which first versions of dispatch and combine are their second ones, which run; what only the first have
    must not be given, or be the default."""
    if not any(getattr(node.target, "_opname", "") in _SECOND for node in gm.graph.nodes):
        return gm
    gm = copy.deepcopy(gm)
    for node in [node for node in gm.graph.nodes if getattr(node.target, "_opname", "") in _SECOND]:
        packet = getattr(torch.ops.npu, _SECOND[node.target._opname])
        known = {argument.name for argument in packet.default._schema.arguments}
        old = {argument.name: argument.default_value for argument in node.target._schema.arguments}
        if node.target._opname == _NORMED:
            names = [argument.name for argument in node.target._schema.arguments]
            node.kwargs = {**node.kwargs, **dict(zip(names[5:], node.args[5:], strict=False))}
            node.args, known = node.args[:5], {*known, "residual_x", "gamma", "norm_eps"}
        assert all(name in known or value == old[name] for name, value in node.kwargs.items()), node
        node.kwargs = {name: value for name, value in node.kwargs.items() if name in known}
        node.target = normed_combine if node.target._opname == _NORMED else packet.default
    gm.recompile()
    return gm


class Alone(torch.fx.Interpreter):
    """Runs a graph without its collectives."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "namespace", "") == "_c10d_functional":
            return args[0].repeat(args[1], *[1] * (args[0].dim() - 1)) if "all_gather" in str(target) else args[0]
        return super().call_function(target, args, kwargs)


def runs_everywhere(gm: Any, made: dict[str, torch.Tensor]) -> bool:
    """Whether an edited graph runs on all ranks and sends the same on each: else one waits for another.

    Its values are made anew, for the pass to read.

    A chain with communicating operators of torch_npu runs as it is: what it refuses, it refuses on all ranks alike.
    """
    communicates = any(getattr(node.target, "namespace", "") == "npu" for node in gm.graph.nodes)
    try:
        values(gm)
        if not communicates:
            with torch.no_grad():
                Alone(gm).run(*(tensor.clone() for tensor in made.values()))
        runs = True
    except Exception:  # an edit made a graph that does not run
        runs = False
    return _alike_everywhere([str(runs), *exchanges(gm)]) and runs


def run_all(gm: Any, made: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        try:
            made = gm(*(tensor.clone() for tensor in made.values()))
        except Exception as error:  # an edit made a graph that does not run, alike on all ranks
            return f"{type(error).__name__}: {error}"
    return made if isinstance(made, (tuple, list)) else (made,)


def difference(before: Any, after: Any) -> str:
    """What differs by more than rounding."""
    if isinstance(after, str):
        return f"only the lowered graph refuses: {after}"
    for old, new in zip(before, after, strict=True):
        largest = old.double().abs().max().item() or 1.0
        error = (old.double() - new.double()).abs().max().item() / largest
        if old.dtype != new.dtype or not error <= 4e-2:  # NaN too
            return f"{old.dtype}, {new.dtype}, relative error {error}"
    return ""
