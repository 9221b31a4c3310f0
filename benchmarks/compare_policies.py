"""``policy="auto"`` beside vllm-ascend's rule on a grid of deployments: where they differ, and why.

    python benchmarks/compare_policies.py [--all]

Nothing is built or run. ``vllm_ascend_main`` is what vllm-ascend's main branch selects; that may not be legal here.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import sys
from collections.abc import Iterator

from moe_lowering import BlockDescription, Deployment
from moe_lowering.explanation.answer import Answer, Question
from moe_lowering.passes.policy import Policy

MODELS = {
    "DeepSeek-V3": {"hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8},
    "Qwen3-30B-A3B": {"hidden": 2048, "intermediate": 768, "experts": 128, "top_k": 8},
}
SOCS, EP_SIZES, TOKENS, FORMATS = ("A2", "A3"), (4, 8, 16, 32, 64), (1, 16, 128, 512, 4096), ("none", "w8a8")
Key = tuple[str, str, int, str, int]


def answers() -> Iterator[tuple[Key, Answer]]:
    """(model, SoC, EP size, format, T) and what is chosen there."""
    for (model, sizes), soc, ep_size, form in itertools.product(MODELS.items(), SOCS, EP_SIZES, FORMATS):
        deployment = Deployment(
            soc=soc, ep_size=ep_size, ep_rank=0, ep_group="ep", mc2_group="mc2", max_tokens=4096, hccl_buffer_mb=4096,
            weight_format="nz", capture=False, providers=(("vllm_ascend", "0.23.0"),), installed=(),
        )  # fmt: skip
        question = Question(BlockDescription(**sizes, quantisation=form), deployment, Policy())
        for tokens in TOKENS:
            yield (model, soc, ep_size, form, tokens), question.at(tokens)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", action="store_true", help="print also where they agree")
    given = parser.parse_args(arguments)
    counts: collections.Counter[str] = collections.Counter()
    for (model, soc, ep_size, form, tokens), answer in answers():
        beside = answer.beside_rule()
        pair = f"auto {answer.choice}, {beside.selects}" if beside.differs else f"both {answer.choice}"
        counts[pair] += 1
        if beside.differs or given.all:
            print(f"{model} {soc} EP {ep_size} {form} T {tokens}: auto {answer.choice}; {beside}")
    print()
    for pair, count in counts.most_common():
        print(f"{count:4} {pair}")


if __name__ == "__main__":
    main(sys.argv[1:])
