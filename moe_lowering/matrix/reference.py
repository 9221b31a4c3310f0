"""What a cell of the matrix must give: a dense MoE layer in float64, in one process, with dequantised weights.

Nothing is grouped, nothing is sent, activations are not quantised, and no code is shared with what is checked.
Sources: here.architecture: SwiGLU with the gate first; ops_transformer.grouped_matmul, op_plugin.grouped_matmul: weights are
int8 * scale, int4 * scale, (int4 + offset) * scale, eight int4 in an int32 from the lowest bits up.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from moe_lowering.matrix.cells import EXPERTS, TOKENS, Inputs, Scenario, expert_weights, token_bank
from moe_lowering.vocabulary import EXPERT_FORMATS

# The least signal-to-noise ratio, in dB, of a token's result: 10 log10(sum of squares of the reference / of the error).
# Noise of single roundings relative to the signal, measured on normally distributed values:
#   to bfloat16: -55.6 dB. Gate and up each: -52 dB of what follows. With the activation, the second matmul, the routing weight
#     and the sum: -47.6 dB. (int4 + offset) * scale, rounded to bfloat16 before it multiplies, adds as much again: -46 dB.
#   to int8 by row, scale max / 127: -42 dB for x (1,024 values, the largest 3.5 sigma), -36 dB for activated values (512 values,
#     the largest 7.5 sigma, -31 dB for the worst token's 12.6 sigma). int4 weights are read exactly.
# Floors stand about 3 dB below what the worst token of all cells has; the scales of another expert cost 10 dB.
FLOORS = {form.name: form.snr_floor for form in EXPERT_FORMATS.values()}


@functools.cache
def expected(quantisation: str, scenario: Scenario, group: int, groups: int) -> Tensor:
    """y [T, H] in float64 of one TP group; zero for masked tokens."""
    inputs: Inputs = scenario.inputs(group, groups)
    if inputs.scale is not None:
        results = _experts(quantisation, inputs.x.double() * inputs.scale.double().unsqueeze(1))
    elif scenario.on_input:
        results = _experts(quantisation, inputs.x.double() * inputs.weights.double())
    else:
        results = _all_experts_on_all_tokens(quantisation)[:, group * TOKENS :]  # where its tokens are in the bank
    y = torch.zeros(inputs.x.shape, dtype=torch.float64)
    for token in range(len(inputs.x)):
        if inputs.mask is not None and not inputs.mask[token]:
            continue
        for choice, expert in enumerate(_physical(inputs, token)):
            weight = 1.0 if scenario.on_input else inputs.weights[token, choice].double()
            y[token] += weight * results[expert, token]
    return y


def _physical(inputs: Inputs, token: int) -> list[int]:
    ids: list[int] = inputs.ids[token].tolist()
    return ids if inputs.log2phy is None else [inputs.log2phy.tolist()[expert] for expert in ids]


@functools.cache
def expected_counts(scenario: Scenario, groups: int) -> Tensor:
    """[E] int64: tokens that each expert gets from all TP groups."""
    counts = torch.zeros(EXPERTS, dtype=torch.int64)
    for group in range(groups):
        inputs = scenario.inputs(group, groups)
        sent = [token for token in range(len(inputs.ids)) if inputs.mask is None or inputs.mask[token]]
        for token in sent:
            for expert in _physical(inputs, token):
                counts[expert] += 1
    return counts


def signal_to_noise(actual: Tensor, reference: Tensor) -> float:
    """dB of the worst token whose reference is not zero; -inf where a zero is not zero, or a value is not finite.

    Infinite for no tokens, and for results without any error.
    """
    if actual.shape != reference.shape:
        return -math.inf
    worst = math.inf
    for got, want in zip(actual.double(), reference, strict=True):
        signal, noise = float(want.square().sum()), float((got - want).square().sum())
        if not math.isfinite(noise) or (noise and not signal):
            return -math.inf
        if noise:
            worst = min(worst, 10 * math.log10(signal / noise))
    return worst


@functools.cache
def _all_experts_on_all_tokens(quantisation: str) -> Tensor:
    """Every expert on every token of the bank: [E, 24, H] float64."""
    return _experts(quantisation, token_bank().double())


def _experts(quantisation: str, x: Tensor) -> Tensor:
    """Every expert on every token of x [T, H] float64: [E, T, H]."""
    results = []
    for expert in range(EXPERTS):
        weights = {name: tensor[expert] for name, tensor in expert_weights(quantisation).items()}
        gate, up = (x @ _dequantise_weight(weights, "w13")).tensor_split(2, 1)
        results.append((gate / (1 + torch.exp(-gate)) * up) @ _dequantise_weight(weights, "w2"))
    return torch.stack(results)


def _dequantise_weight(weights: dict[str, Tensor], name: str) -> Tensor:
    weight = weights[name]
    if weight.dtype == torch.int32:
        parts = [(weight.to(torch.int64) >> 4 * at) & 15 for at in range(8)]
        nibbles = torch.stack(parts, 2).reshape(len(weight), -1)
        weight = torch.where(nibbles > 7, nibbles - 16, nibbles)
    matrix = weight.double()
    if name + "_offset" in weights:
        matrix = matrix + weights[name + "_offset"].double()
    return matrix * weights[name + "_scale"].double() if name + "_scale" in weights else matrix
