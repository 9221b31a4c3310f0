"""Comparison of a lowered model with the model's own output.

Two comparisons, because each has a blind spot. The logits are compared as a whole, but a small error in one block can
drown in them. And the output of every MoE block is compared with what the unlowered experts give for the very inputs
that the lowered block had, which no other layer can hide or cause.

A router that chooses between two almost equal experts may choose the other one after a rounding difference in an
earlier layer: both runs are right and their logits differ by far more than rounding. Where the choice differs, the
reference run takes the lowered run's, and the number of such tokens is reported and bounded (``MAX_REROUTED``).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from moe_lowering.cli.lower.models import OWN_SCALE, MoeStack, logits
from moe_lowering.layers.expert_modules import is_experts_module, weight_names
from moe_lowering.layers.moe import MoE
from moe_lowering.number_words import WORST
from moe_lowering.quantisation import dequantise, quantise_weight
from moe_lowering.vocabulary import EXPERT_FORMATS

# Largest accepted max|a - b| / max|b|. Both sides round every stage to the dtype, but not at the same places: measured
# are up to 6e-7 in float32 and 1.2e-2 in bfloat16 (float16 has 8 times finer steps), over seven models. A block that
# computes something else, e.g. with gate and up exchanged, is off by 1e-1 to 1 with the weights used here.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
# Largest accepted share of tokens whose experts differ: a share of near ties that grows with the rounding unit.
MAX_REROUTED = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.2}
# Lowest accepted signal-to-noise ratio in dB with quantised experts, against the same weights dequantised. int8 rows of
# normal activations cost 42 dB at the first matmul and, with their longer tails, some 35 dB at the second; int4 weights with
# 16-bit activations round as bfloat16 does, with inputs that layers before have rounded: at least 36 dB. A block that
# computes something else is at 20 dB or less.
SNR_FLOOR = {form.name: min(form.snr_floor, 36.0) for form in EXPERT_FORMATS.values() if form.quantised}
LOGITS_SNR_FLOOR = 20.0  # errors of blocks add up over layers, and attention and norms spread them
REWEIGHTED = 0.1  # share of a token's largest routing weight by which rounding is taken not to move one
SILENT = 300.0  # dB that two equal tensors are given, whose ratio is infinite

Taken = list[tuple[Tensor, ...]]


@dataclasses.dataclass
class Errors:
    """The largest errors seen so far; ``rerouted`` of ``routed`` tokens had other experts in the reference run.

    ``snr`` and ``block_snr`` are the lowest signal-to-noise ratios in dB, of logits and of MoE blocks.
    """

    absolute: float = 0.0
    relative: float = 0.0
    block_relative: float = 0.0
    rerouted: int = 0
    routed: int = 0
    snr: float = SILENT
    block_snr: float = SILENT

    def merge(self, other: Errors) -> Errors:
        """The errors of both together."""
        return Errors(
            max(self.absolute, other.absolute),
            max(self.relative, other.relative),
            max(self.block_relative, other.block_relative),
            self.rerouted + other.rerouted,
            self.routed + other.routed,
            min(self.snr, other.snr),
            min(self.block_snr, other.block_snr),
        )


def difference(actual: Tensor, reference: Tensor) -> tuple[float, float]:
    """(max|a - b|, max|a - b| / max|b|) in float64; NaN anywhere, or another shape, counts as ``WORST``."""
    if actual.shape != reference.shape:
        return WORST, WORST
    a, b = actual.double(), reference.double()
    absolute, largest = float((a - b).abs().max()), float(b.abs().max())
    if not (absolute < WORST and largest < WORST):
        return WORST, WORST
    return absolute, absolute / largest if largest else (0.0 if absolute == 0 else WORST)


def snr(actual: Tensor, reference: Tensor) -> float:
    """Signal-to-noise ratio in dB, at most ``SILENT``; 0 for NaN or another shape."""
    if actual.shape != reference.shape or not bool(actual.isfinite().all()):
        return 0.0
    a, b = actual.double(), reference.double()
    noise, signal = float((a - b).square().sum()), float(b.square().sum())
    if noise == 0.0:
        return SILENT
    return 10 * math.log10(signal / noise) if signal else 0.0


def use_quantised_weights(model: nn.Module, format: str) -> None:
    """Give an unsharded model the weights that its quantised weights stand for, in the model's dtype."""
    for module in moe_modules(model):
        for name in weight_names(module):
            parameter = getattr(module, name)
            transposed = isinstance(module, MoE) or bool(getattr(module, "is_transposed", False))
            for expert in range(parameter.shape[0]):
                matrix = parameter.data[expert] if transposed else parameter.data[expert].T
                matrix.copy_(dequantise(quantise_weight(matrix, format)))


def moe_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose blocks are lowered, in order of definition."""
    return [m for m in model.modules() if isinstance(m, MoE) or is_experts_module(m)]


def record(model: nn.Module) -> Taken:
    """A list that each call of ``model`` extends by (inputs..., output) of every MoE module, compiled or not."""
    routings: Taken = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        routings.append((*args, *kwargs.values(), output))

    for module in moe_modules(model):
        module.register_forward_hook(keep, with_kwargs=True)
    return routings


def use_reference(model: nn.Module) -> None:
    """Make an unsharded model compute its experts without the generic operators."""
    if isinstance(model, MoeStack):
        return
    for module in moe_modules(model):
        known: Any = module
        known.config._experts_implementation = "grouped_mm"


def compare(reference: nn.Module, input_ids: Tensor, actual: Tensor, routings: Taken) -> Errors:
    """Errors of a lowered run: its logits, and ``taken`` by ``record`` during it.

    ``reference`` is the whole model after ``use_reference``.
    """
    modules = moe_modules(reference)
    if len(routings) != len(modules):
        raise RuntimeError(
            f"{len(modules)} MoE modules, of which {len(routings)} ran: the comparison would be incomplete"
        )
    errors = Errors()
    for module, (*inputs, output) in zip(modules, routings, strict=True):
        own = _block(module, inputs)
        errors.block_relative = max(errors.block_relative, difference(output, own)[1])
        errors.block_snr = min(errors.block_snr, snr(output, own))
    replay = _Replay(modules, routings)
    with replay:
        expected = logits(reference, input_ids)
    errors.absolute, errors.relative = difference(actual, expected)
    errors.snr = snr(actual, expected)
    errors.rerouted, errors.routed = replay.rerouted, replay.routed
    return errors


def _block(module: nn.Module, inputs: list[Tensor]) -> Tensor:
    return plain_moe(module, inputs[0], plain_route(module, inputs[0])) if isinstance(module, MoE) else module(*inputs)


class _Replay:
    """While it is entered, a token of the reference run goes to the experts that the lowered run chose for it."""

    def __init__(self, modules: list[nn.Module], routings: Taken) -> None:
        self.modules, self.taken = modules, routings
        self.rerouted = self.routed = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for module, (*inputs, _) in zip(self.modules, self.taken, strict=True):
            if isinstance(module, MoE):
                lowered = plain_route(module, inputs[0])
                module.forward = self._plain_forward(module, lowered)  # type: ignore[method-assign]  # __exit__ drops it
            else:
                hook = self._reroute((inputs[2], inputs[1]))
                self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def __exit__(self, *unused: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self.modules:
            vars(module).pop("forward", None)

    def _plain_forward(self, module: MoE, lowered: tuple[Tensor, Tensor]) -> Any:
        def forward(x: Tensor) -> Tensor:
            return plain_moe(module, x, self._choose(plain_route(module, x), lowered))

        return forward

    def _reroute(self, lowered: tuple[Tensor, Tensor]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            inputs: tuple[Tensor, ...] = (*args, *kwargs.values())
            weights, ids = self._choose((inputs[2], inputs[1]), lowered)
            return (inputs[0], ids, weights), {}

        return hook

    def _choose(self, own: tuple[Tensor, Tensor], lowered: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weights, ids = lowered[0].to(own[0].dtype), lowered[1].to(own[1].dtype)
        differs = _find_rerouted_tokens(own, (weights, ids))
        self.rerouted += int(differs.sum())
        self.routed += differs.numel()
        return torch.where(differs, weights, own[0]), torch.where(differs, ids, own[1])


def _find_rerouted_tokens(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """[..., 1] bool: tokens with other experts, or with weights that rounding does not explain (phimoe's have jumps)."""
    (a_ids, a_order), (b_ids, b_order) = (routing[1].sort(-1) for routing in (a, b))
    change = (a[0].gather(-1, a_order) - b[0].gather(-1, b_order)).abs().amax(-1, keepdim=True)
    return (a_ids != b_ids).any(-1, keepdim=True) | (change > REWEIGHTED * a[0].amax(-1, keepdim=True))


def plain_route(module: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, ids) of the router of ``models.MoeStack`` in plain torch: sigmoid, correction bias, groups by top 2."""
    scores = module.gate(x).float().sigmoid()
    assert module.selection_bias is not None and module.scoring == "sigmoid" and module.renormalize
    ranked = (scores + module.selection_bias).unflatten(-1, (module.num_groups, -1))
    best_groups = ranked.topk(2).values.sum(-1).topk(module.topk_groups).indices
    kept = torch.zeros_like(ranked[..., 0]).scatter(-1, best_groups, 1.0).bool()
    ids = ranked.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2).topk(module.top_k).indices
    weights = scores.gather(-1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * OWN_SCALE, ids


def plain_moe(module: MoE, x: Tensor, routing: tuple[Tensor, Tensor]) -> Tensor:
    """The experts of ``models.MoeStack`` (SwiGLU, no bias), one after another, in plain torch."""
    weights, ids = routing
    y = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(module.num_experts):
        share = (weights * (ids == expert)).sum(-1, keepdim=True)
        gate, up = (x @ module.w13[expert]).chunk(2, -1)
        y += share * ((nn.functional.silu(gate) * up) @ module.w2[expert])
    return y.to(x.dtype)
