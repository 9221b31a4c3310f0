"""Timing of the pass by stages, and the arithmetic on the times. Medians throughout: machines that build are shared."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from torch.fx import Graph, GraphModule

from moe_lowering import MoeLowering
from moe_lowering.passes.run import graph_run
from moe_lowering.passes.run import routes as run_routes

STAGES = ("raise", "judge", "rewrite", "lint", "recompile")
Times = dict[str, float]


class StageClock:
    """Seconds spent in each stage of one run of the pass; ``rewrite`` is what no other stage took."""

    def __init__(self) -> None:
        self.spent: Times = dict.fromkeys(STAGES, 0.0)
        self.calls: dict[str, int] = dict.fromkeys(STAGES, 0)

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[stage] += time.thread_time() - start
                self.calls[stage] += 1

        return call

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The pipeline's stages replaced by timed ones: a few calls per run, so the clock costs nothing."""
        with contextlib.ExitStack() as stack:
            for stage, place, name in (
                ("raise", graph_run, "find_blocks"),
                ("judge", graph_run, "decide"),
                ("judge", run_routes, "judge_route"),
                ("lint", Graph, "lint"),
                ("recompile", GraphModule, "recompile"),
            ):
                stack.enter_context(mock.patch.object(place, name, self.timed(stage, getattr(place, name))))
            yield


def run_pass(gm: GraphModule, lowering: MoeLowering) -> Times:
    """Seconds of one run by stage, with ``total``."""
    clock = StageClock()
    gc.collect()
    with clock.installed():
        start = time.thread_time()
        lowering(gm)
        total = time.thread_time() - start
    clock.spent["rewrite"] = total - sum(clock.spent.values())
    return {**clock.spent, "total": total, "pass": total - clock.spent["lint"] - clock.spent["recompile"]}


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    gc.collect()
    start = time.thread_time()
    function()
    return time.thread_time() - start


def medians(samples: Sequence[Times]) -> Times:
    return {key: statistics.median(s[key] for s in samples) for key in samples[0]}


def slope(by_size: dict[int, float]) -> float:
    """Cost of one more unit between the smallest and the largest size: what the first unit costs extra drops out."""
    low, high = min(by_size), max(by_size)
    return (by_size[high] - by_size[low]) / (high - low)


def exponent(by_size: dict[int, float], low: int, high: int) -> float:
    """p of ``time ~ size**p`` between two sizes."""
    return math.log(by_size[high] / by_size[low]) / math.log(high / low)
