"""What a layer of the generic operators costs on CPU beside transformers' ``grouped_mm``: ``python benchmarks/bench_cpu.py``.

One layer on one rank, bfloat16, weights as transformers keeps them, without the router; eager. CPU time of one thread, the
lower quartile of rounds in which both run in turn: what else the machine does hits both alike, and only adds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

from moe_lowering import (  # first: it lets torch be imported where torch_npu is installed without CANN
    moe_experts,
    simulator,
)

simulator.enable()

import torch  # noqa: E402
from transformers.integrations.moe import grouped_mm_experts_forward  # noqa: E402

TOKENS, HIDDEN, EXPERTS, TOP_K = (1, 4, 16, 128), (256, 1024), (8, 64), 4


def layer(tokens: int, hidden: int, experts: int) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """(ours, transformers') of one layer, on the same tensors."""
    torch.manual_seed(0)
    inner = hidden // 2
    w13 = (torch.randn(experts, 2 * inner, hidden) / hidden**0.5).bfloat16()
    w2 = (torch.randn(experts, hidden, inner) / inner**0.5).bfloat16()
    x = torch.randn(tokens, hidden).bfloat16()
    weights, ids = torch.softmax(torch.randn(tokens, experts), -1).topk(TOP_K)
    ids = ids.int()
    module = SimpleNamespace(
        num_experts=experts, gate_up_proj=w13, down_proj=w2, gate_up_proj_bias=None, down_proj_bias=None, has_gate=True,
        has_bias=False, is_transposed=False, has_post_expert_norm=False, _is_expert_parallel=False,
        _apply_gate=lambda hidden: torch.nn.functional.silu(hidden.chunk(2, -1)[0]) * hidden.chunk(2, -1)[1],
    )  # fmt: skip
    return (
        lambda: moe_experts(x, weights, ids, w13.transpose(1, 2), w2.transpose(1, 2)),
        lambda: grouped_mm_experts_forward(module, x, ids, weights.bfloat16()),
    )


def compare(tokens: int, hidden: int, experts: int, seconds: float) -> tuple[float, float]:
    """Microseconds of a call of each, lower quartiles."""
    pair = layer(tokens, hidden, experts)
    calls = 5
    torch.testing.assert_close(pair[0](), pair[1](), rtol=0.05, atol=0.05)
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, spent in zip(pair, times, strict=True):
            start = time.thread_time()
            for _ in range(calls):
                run()
            spent.append(1e6 * (time.thread_time() - start) / calls)
    ours, theirs = (statistics.quantiles(spent, n=4)[0] for spent in times)
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each cell")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'T':>5} {'hidden':>7} {'experts':>8} {'ours us':>9} {'grouped_mm us':>14} {'ratio':>6}")
    worst = 0.0
    with torch.inference_mode():
        for tokens, hidden, experts in itertools.product(TOKENS, HIDDEN, EXPERTS):
            ours, theirs = compare(tokens, hidden, experts, given.seconds)
            print(f"{tokens:>5} {hidden:>7} {experts:>8} {ours:>9.0f} {theirs:>14.0f} {ours / theirs:>6.2f}")
            worst = max(worst, ours / theirs)
    print(f"worst ratio {worst:.2f}")


if __name__ == "__main__":
    main()
