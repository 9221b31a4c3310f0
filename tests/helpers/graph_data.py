"""Real tensors for the graphs of ``graph_build``, and what the graphs should compute with them (``reference``)."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Sequence
from typing import Any

import graph_quantised
import reference
import torch
from graph_build import Built, build, text
from graph_cases import BlockCase, GraphCase, PairCase
from graph_forms import given
from graph_runs import many_cases
from quantised_numbers import snr
from torch import Tensor

from moe_lowering import MoeLowering, simulator
from moe_lowering.vocabulary import EXPERT_FORMATS

# A gap below which rounding to float32 may change the choice of an expert.
DECISIVE = 1e-5


class Data:
    """Inputs of one rank. Weights are the same on every rank before they are sharded; tokens are those of its TP group.

    Args:
        lead: leading dimensions of x on this rank, the case's unless given.
    """

    def __init__(self, case: GraphCase, lead: tuple[int, ...] | None = None, rank: int = 0) -> None:
        self.case, self.lead, self.rank = case, case.lead if lead is None else lead, rank
        self.group = rank // case.deployment.tp_size

    def _random(self, name: str, *shape: int) -> Tensor:
        seed = random.Random(f"{self.case.seed} {name}").getrandbits(48)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @functools.cached_property
    def mask(self) -> Tensor:
        return self._random(f"mask {self.group}", *self.lead).sigmoid() < self.case.keep

    @functools.cache  # noqa: B019
    def experts(self, index: int) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor | None, Tensor | None]:
        """(what the graph is given, by name), and what that means: w13, w2 and their biases of all experts."""
        spec, hidden = self.case.blocks[index], self.case.hidden
        shapes = ((hidden, 2 * spec.intermediate), (spec.intermediate, hidden))
        if spec.quantisation != "none":
            drawn = [
                graph_quantised.draw(functools.partial(self._drawn, index), name, spec, shape, self.case.dtype)
                for name, shape in zip(("w13", "w2"), shapes, strict=True)
            ]
            return drawn[0][0] | drawn[1][0], drawn[0][1], drawn[1][1], None, None
        matrices = [
            (self._random(f"w {index} {n}", spec.experts, *shape) / shape[0] ** 0.5).to(self.case.dtype)
            for n, shape in enumerate(shapes)
        ]
        bias_dtype = torch.float32 if spec.bias_float32 else self.case.dtype
        biases = [
            self._random(f"b {index} {n}", spec.experts, shape[1]).to(bias_dtype) if spec.bias[n] else None
            for n, shape in enumerate(shapes)
        ]
        given = dict(zip(("w13", "w2", "w13_bias", "w2_bias"), (*matrices, *biases), strict=True))
        return {k: v for k, v in given.items() if v is not None}, *matrices, *biases

    def _drawn(self, index: int, name: str, *shape: int) -> Tensor:
        return self._random(f"{name} {index}", *shape)

    @functools.cache  # noqa: B019  (lives as long as one test case)
    def routing(self, index: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(inputs, weights, ids) of a block: what it is given, and the float64 weights and the ids that this means."""
        spec = self.case.blocks[index]
        if spec.route is None:
            order = self._random(f"ids {index} {self.group}", *self.lead, spec.experts)
            ids = self._skewed(order).argsort(-1)[..., : spec.top_k].to(torch.int32)
            weights = self._random(f"weights {index} {self.group}", *self.lead, spec.top_k).sigmoid()
            return {f"weights{index}": weights, f"ids{index}": ids}, weights.double(), ids
        for attempt in range(100):
            logits = self._skewed(self._random(f"logits {index} {self.group} {attempt}", *self.lead, spec.experts), -5)
            logits = logits.to(self.case.dtype)
            bias = (self._random(f"bias {index}", spec.experts) / 4).to(self.case.dtype) if spec.route.bias else None
            if _is_decisive(logits, bias, spec):
                break
        r = spec.route
        weights, ids = reference.route(
            logits, bias, spec.top_k, r.scoring, r.renormalize, r.num_groups, r.topk_groups, r.group_score, r.scale
        )
        given = {f"logits{index}": logits} if bias is None else {f"logits{index}": logits, f"bias{index}": bias}
        return given, weights, ids

    def _skewed(self, order: Tensor, most: float = 100.0) -> Tensor:
        """Made to prefer (small first, or large first when ``most`` is negative) one expert and to shun another."""
        if self.case.skew:
            order[..., 0] -= most
            order[..., -1] += most
        return order

    def _spoiled(self, name: str, tensor: Tensor) -> Tensor:
        """Garbage in masked tokens, where every block has the mask."""
        if not self.case.garbage or not all(block.mask for block in self.case.blocks):
            return tensor
        if name == "x" or name.startswith(("weights", "logits")):
            return tensor.masked_fill(~self.mask.unsqueeze(-1), float("nan"))
        return tensor.masked_fill(~self.mask.unsqueeze(-1), -1) if name.startswith("ids") else tensor

    def inputs(self, built: Built) -> list[Any]:
        """The tensors and sizes of the graph's inputs, in order."""
        given: dict[str, Any] = {f"T{d}": n for d, n in enumerate(self.lead)}
        given.update(hidden=self.case.hidden, mask=self.mask)
        for index, spec in enumerate(self.case.blocks):
            given.update({k: self._spoiled(k, v) for k, v in self.routing(index)[0].items()})
            given.update(self._shard(index, spec))
        names = [node.target for node in built.gm.graph.find_nodes(op="placeholder")]
        return [given[name] if name in given else self._spoiled(name, self._x(name)) for name in names]

    def _x(self, name: str) -> Tensor:
        hidden, layout = self.case.hidden, self.case.layout
        lead = {"expanded": (1,) * len(self.lead), "permuted": self.lead[::-1]}.get(layout, self.lead)
        width = hidden * len(self.case.blocks) if layout == "slices" else hidden
        return self._random(f"{name} {self.group}", *lead, width).to(self.case.dtype)

    def _shard(self, index: int, spec: BlockCase) -> dict[str, Tensor]:
        local = spec.experts // self.case.deployment.ep_size
        found = {}
        for which, tensor in self.experts(index)[0].items():
            own = tensor[self.rank * local : (self.rank + 1) * local]
            if which in ("w13", "w2") and spec.transposed:
                own = own.transpose(1, 2)
            found.update(given(f"{which}_{index}", spec.form(which), own.contiguous()))
        return found

    def expected(self, index: int, x: Tensor) -> Tensor:
        """y of a block in float64, for the x that it was given."""
        spec = self.case.blocks[index]
        _, weights, ids = self.routing(index)
        _, w13, w2, w13_bias, w2_bias = self.experts(index)
        return reference.moe(
            x, weights, ids, w13, w2, w13_bias=w13_bias, w2_bias=w2_bias, mask=self.mask if spec.mask else None,
            activation=spec.activation, limit=spec.limit, alpha=spec.alpha, interleaved=spec.interleaved,
        )  # fmt: skip

    def wrong(self, built: Built, outputs: tuple[Any, ...]) -> list[str]:
        """What differs from the reference, block by block; empty when all is right."""
        values, found = dict(zip(built.outputs, outputs, strict=True)), []
        for index, spec in enumerate(self.case.blocks):
            if (y := values.get(f"y{index}")) is None:
                continue
            found += self._differs(index, y, self.expected(index, values[f"x{index}"]))
            if spec.mask and not bool((y[~self.mask] == 0).all()):
                found.append(f"block {index}: masked tokens have results other than zero")
        return found

    def _differs(self, index: int, y: Tensor, expected: Tensor) -> list[str]:
        if y.dtype != self.case.dtype:
            return [f"block {index}: y is {y.dtype}"]
        if EXPERT_FORMATS[self.case.blocks[index].quantisation].int8_rows:
            ratio = snr(y, expected)
            return [] if ratio >= graph_quantised.FLOOR else [f"block {index}: signal-to-noise {ratio:.1f} dB"]
        error = reference.relative_error(y, expected)
        return [] if error <= reference.BOUNDS[self.case.dtype] else [f"block {index}: relative error {error:.2e}"]


def _is_decisive(logits: Tensor, bias: Tensor | None, spec: BlockCase) -> bool:
    """No choice of a group or an expert rests on a difference that float32 might not see."""
    r = spec.route
    assert r is not None
    scores = {"softmax": lambda t: t.softmax(-1), "sigmoid": torch.sigmoid}.get(
        r.scoring, lambda t: torch.nn.functional.softplus(t).sqrt()
    )(logits.double())
    choice = scores if bias is None else scores + bias.double()
    if not choice.numel():
        return True
    groups = choice.unflatten(-1, (r.num_groups, -1))
    best = groups.amax(-1) if r.group_score == "max" else groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
    if r.num_groups > 1:
        kept = best.topk(r.topk_groups, -1).indices
        closed = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
        choice = groups.masked_fill(closed.unsqueeze(-1), -math.inf).flatten(-2)
    return _gap(best, r.topk_groups) > DECISIVE and _gap(choice, spec.top_k) > DECISIVE


def _gap(values: Tensor, k: int) -> float:
    """The smallest difference between what is chosen and what is not; infinite when all is chosen."""
    if k >= values.shape[-1]:
        return math.inf
    ordered = values.sort(-1, descending=True).values
    gaps = ordered[..., k - 1] - ordered[..., k]
    return float(gaps.nan_to_num(math.inf).min())


def refuses(built: Built, lead: tuple[int, ...]) -> bool:
    """Whether the graph itself refuses to run with this many tokens."""
    nodes = built.gm.graph.find_nodes(op="call_function", target=torch.ops.moe_lowering.assert_tokens.default)
    return any(not node.args[1] <= math.prod(lead) <= node.args[2] for node in nodes)


_groups: dict[str, str] = {}


def setup_rank(soc: str) -> None:
    """In each process of a pool."""
    simulator.enable(soc)


def place_on_rank(case: GraphCase, rank: int) -> GraphCase:
    """The case with the process groups of a pool in place of its names; the second group is made once per process."""
    import torch.distributed as dist

    size = dist.get_world_size()
    if "mc2" not in _groups:
        _groups["mc2"] = dist.new_group(range(size)).group_name
    d, names = case.deployment, {"ep_group": dist.group.WORLD.group_name}
    if d.tp_size > 1:
        names["tp_group"] = dist.group.WORLD.group_name
    if d.mc2_group:
        names["mc2_group"] = _groups["mc2"]
    return case.replace(deployment=d.replace(ep_rank=rank, tp_rank=rank % d.tp_size, **names))


@dataclasses.dataclass(frozen=True)
class Result:
    """What one rank says of a case: the choices and why, whether the graph refuses its T, and what is wrong.

    ``untouched`` is False where nothing was lowered and the graph changed all the same. ``results`` are the bits of each y.
    """

    comms: list[str | None]
    reasons: list[str]
    refused: bool
    wrong: list[str]
    untouched: bool
    results: list[bytes]


def lower_and_run(rank: int, pair: PairCase) -> Result:
    """Lower a case for this rank and run it."""
    own = place_on_rank(pair.case, rank).replace(lead=pair.compiled[rank])
    built, data = build(own), Data(own, pair.run[rank], rank)
    before = text(built.gm.graph)
    lowering = MoeLowering(own.deployment, own.comm, policy=own.policy)
    lowering(built.gm)
    blocks = lowering.reports[-1].blocks
    comms, refused = [block.comm for block in blocks], refuses(built, pair.run[rank])
    wrong: list[str] = []
    results = []
    if not refused:
        with torch.no_grad():
            outputs = built.gm(*data.inputs(built))
        wrong = data.wrong(built, outputs)
        named = zip(built.outputs, outputs, strict=True)
        results = [y.float().numpy().tobytes() for name, y in named if name.startswith("y")]
    untouched = any(comms) or before == text(built.gm.graph)
    said = [block.reason for block in blocks] + [why for _, why in lowering.reports[-1].unrecognised]
    return Result(comms, said, refused, wrong, untouched, results)


def lower_and_run_all(rank: int, pairs: Sequence[PairCase]) -> list[Result]:
    """Many cases in one job: a job for each costs more than some cases do."""
    with many_cases():
        return [lower_and_run(rank, pair) for pair in pairs]
