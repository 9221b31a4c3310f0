"""At which layer torch is in one long trace, for who waits: dynamo reads a whole model for minutes and says nothing.

Both stages of a trace pass through one method for each node: dynamo makes it (``SubgraphTracer.create_proxy``), and AOTAutograd
runs it once for its metadata and once for its graph (``PropagateUnbackedSymInts.run_node``). While a trace is told, each of
them is wrapped; what it is given, returns and raises stays as it was. A torch that lacks one has no messages of that stage.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from moe_lowering.number_words import count_of

OUTSIDE = "what is outside of the layers"
EVERY = 2.0  # seconds between two messages at least: a whole model has hundreds of layers and of stages

# module, class, method, what the stage is called, and the node of what the method was given and returned
_STAGES: tuple[tuple[str, str, str, str, Callable[[tuple[Any, ...], Any], Any]], ...] = (
    ("torch._dynamo.output_graph", "SubgraphTracer", "create_proxy", "dynamo", lambda given, made: made.node),
    (
        "torch.fx.experimental.symbolic_shapes",
        "PropagateUnbackedSymInts",
        "run_node",
        "AOTAutograd",
        lambda given, made: given[1],
    ),
)
_LAYER = re.compile(r"^(?:L\['self'\]\.)?(?P<layer>.*?[^\W\d]\w*(?:\.\d+|\['?\d+'?\]))(?=[.\[]|$)")


@contextlib.contextmanager
def told(progress: Callable[[str], None]) -> Iterator[None]:
    """Tell ``progress`` now and then which layer of the model is traced, as ``dynamo is at model.layers.12 (1480 nodes)``."""
    with contextlib.ExitStack() as stack:
        tell = _Throttled(progress)
        for module, owner, method, stage, node_of in _STAGES:
            holder = getattr(importlib.import_module(module), owner, None)
            if hasattr(holder, method):
                stack.enter_context(_wrapped(holder, method, _Stage(stage, node_of, tell)))
        yield


def layer_of(node: Any) -> str:
    """The layer of the model that a node was written in: its module's path up to the first number, "" outside of layers."""
    stack = getattr(node, "meta", {}).get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if match := _LAYER.match(path):
            return match["layer"]
    return ""


class _Throttled:
    """A progress that is told something every ``EVERY`` seconds at most. The first time counts as a message."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._last = time.perf_counter()

    def is_due(self) -> bool:
        return time.perf_counter() - self._last >= EVERY

    def __call__(self, message: str) -> None:
        self._progress(message)
        self._last = time.perf_counter()


class _Stage:
    """One stage of a trace: how many nodes came by, and the layer of the last one."""

    def __init__(self, name: str, node_of: Callable[[tuple[Any, ...], Any], Any], tell: _Throttled) -> None:
        self._name, self._node_of, self._tell = name, node_of, tell
        self._nodes = 0

    def see(self, given: tuple[Any, ...], made: Any) -> None:
        self._nodes += 1
        if not self._tell.is_due():
            return
        place = layer_of(self._node_of(given, made))
        self._tell(f"{self._name} is at {place or OUTSIDE} ({count_of(self._nodes, 'node')})")


@contextlib.contextmanager
def _wrapped(holder: Any, method: str, stage: _Stage) -> Iterator[None]:
    """While this is open, ``stage`` sees each call of a method."""
    own = holder.__dict__.get(method)  # None: inherited
    original = getattr(holder, method)

    def call_and_see(*given: Any, **named: Any) -> Any:
        made = original(*given, **named)
        stage.see(given, made)
        return made

    setattr(holder, method, call_and_see)
    try:
        yield
    finally:
        if own is None:
            delattr(holder, method)
        else:
            setattr(holder, method, own)
