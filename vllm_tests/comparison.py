"""Whether two engines computed the same model: log probabilities of the best first tokens, as ``serve.py`` prints them."""

import math

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
    for best, tokens in zip(first, found["tokens"], strict=True):
        assert best.get(str(tokens[0]), -math.inf) > max(best.values()) - NEAR, (best, tokens)
    # the comparison itself: other requests are another thing
    others = [*second[1:], second[0]]
    common = sum(len(a.keys() & b.keys()) for a, b in zip(first, others, strict=True))
    assert common < sum(len(a.keys() & b.keys()) for a, b in zip(first, second, strict=True)) / 2
