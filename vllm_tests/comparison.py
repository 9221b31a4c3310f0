"""Whether two engines computed the same model: log probabilities of the best first tokens, as ``serve.py`` prints them. And what
each MoE layer runs, beside the table of docs/vllm.md."""

import math
from pathlib import Path

BEST = 5  # log probabilities that are kept of each request
FLOOR = 20.0  # dB, of two chains that round bfloat16 and int8 in different places; other weights are below 10
NEAR = 0.5  # log probability by which a chosen token may be worse than the best one of the other engine


def ratio(first, second):
    """Signal to noise in dB, over the tokens that both engines list for a request."""
    signal = noise = 0.0
    for a, b in zip(first, second, strict=True):
        for token in a.keys() & b.keys():
            signal += a[token] ** 2
            noise += (a[token] - b[token]) ** 2
    assert signal > 0
    return 10 * math.log10(signal / noise) if noise else math.inf


def assert_close(reference, found):
    """The same model: alike in numbers, and each first token one of the other engine's best."""
    first, second = reference["logprobs"], found["logprobs"]
    assert ratio(first, second) > FLOOR
    pairs = zip(first, found["tokens"], strict=True)
    far = [(best, t[0]) for best, t in pairs if best.get(str(t[0]), -math.inf) <= max(best.values()) - NEAR]
    assert not far, far
    # the comparison itself: other requests are another thing
    others = [*second[1:], second[0]]
    common = sum(len(a.keys() & b.keys()) for a, b in zip(first, others, strict=True))
    assert common < sum(len(a.keys() & b.keys()) for a, b in zip(first, second, strict=True)) / 2


PAGE = Path(__file__).parent.parent / "docs" / "vllm.md"
NORM = "_C_ascend::npu_add_rms_norm_bias"  # stands before attention and before the MoE layer


def operators_of_layer(tape):
    """What a captured graph of Qwen3-MoE runs for its last MoE layer, from the gate on. (The first one computes what all share.)
    Checks on the host, which launch nothing, are left out."""
    parts = [[]]
    for operator in tape:
        if operator == NORM:
            parts.append([])
        elif not operator.startswith("moe_lowering::assert_"):
            parts[-1].append(operator.rpartition("::")[2])
    return parts[1::2][-1]


def assert_documented(row, own, found):
    """The operators of a layer in the largest decode graph, vllm-ascend's own and with the plugin, are those of the page."""
    [line] = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {row} |")]
    cells = [cell.strip().replace("`", "").split(", ") for cell in line.strip("|").split("|")[1:]]
    called = [operators_of_layer(each["captured"][0]) for each in (own, found)]
    assert called == cells, (row, called, cells)
