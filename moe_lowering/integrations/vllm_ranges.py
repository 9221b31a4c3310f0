"""Tell a graph's ShapeEnv, while the pass runs, which token counts vLLM will run the graph with.

vLLM compiles a graph for a range of token counts and drops dynamo's guards (``vllm/compilation/backends.py``,
``piecewise_backend.py``). Dynamo assumes two tokens or more, or more than one on each TP rank where views ask for it;
vLLM runs the same graph with one token too. So the lower bounds that dynamo assumed are replaced by vLLM's: what the
pass proves, and what the graph refuses, must hold for vLLM's range. Token counts are the only sizes that vLLM leaves
symbolic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch._guards import detect_fake_mode
from torch.fx import GraphModule
from torch.utils._sympy.value_ranges import ValueRanges

from moe_lowering.passes.token_ranges import RUNS_WITHOUT_GUARDS

SPECIALISED = 2  # dynamo keeps 0 and 1 for graphs of their own


@contextlib.contextmanager
def ranges_of_vllm(gm: GraphModule, first: int, last: int) -> Iterator[None]:
    """Inside, the sizes that dynamo knows as 2 or more are ``first`` to ``last``, or to less where that was known."""
    values = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder" and "val" in node.meta]
    mode = detect_fake_mode(values)
    environment: Any = None if mode is None else mode.shape_env
    if environment is None:
        yield
        return
    changed = {}
    for symbol, before in dict(environment.var_to_range).items():
        if before.lower >= SPECIALISED:
            ours = ValueRanges(first, last if before.upper > last else before.upper)
            changed[symbol] = before, ours
            environment.var_to_range[symbol] = ours
    token = RUNS_WITHOUT_GUARDS.set(True)
    environment._version_counter += 1  # what was proven before is forgotten
    try:
        yield
    finally:
        for symbol, (before, ours) in changed.items():
            environment.var_to_range[symbol] = _restored(before, ours, environment.var_to_range[symbol])
        RUNS_WITHOUT_GUARDS.reset(token)
        environment._version_counter += 1


def _restored(before: Any, ours: Any, now: Any) -> Any:
    """The range as it was, but where somebody narrowed it meanwhile."""
    lower = before.lower if now.lower == ours.lower else max(before.lower, now.lower)
    upper = before.upper if now.upper == ours.upper else min(before.upper, now.upper)
    return ValueRanges(lower, upper)
