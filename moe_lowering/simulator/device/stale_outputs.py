"""Keep Python's garbage collector from running inside two methods of npugraph_ex that it would make fail by chance.

Before a graph of another size is captured, npugraph_ex asks weak references which outputs of earlier replays still
live, keeps the addresses of their storages, and hands these to ``_npu_setCheckpointPoolState`` some time later. An
output that only a reference cycle keeps (an exception's frames, an object that names itself) may be collected in
between: the addresses are stale then, and torch_npu raises "Expected allocated_pointer !=
definitely_stale_pointers.end()", or reads freed memory, on a real NPU too. Here the collector waits, so that tests do
not fail by chance.

Source: wheel.acl_graph: compile_for_graph_key and set_to_original_state_bofore_reconstruct.
"""

from __future__ import annotations

import functools
import gc
import importlib
from collections.abc import Callable
from typing import Any

_OURS = "moe_lowering_collector_waits"  # that a method is wrapped does not say by whom
_MODULE = "npugraph_ex._acl_concrete_graph.acl_graph"
# both read the weak references first and reset the pool at their end; the second one's name is spelt so
_WINDOWS = ("compile_for_graph_key", "set_to_original_state_bofore_reconstruct")


def install() -> None:
    """Let the collector wait in both. Idempotent; a version of torch_npu without one of them has no such window."""
    graph = importlib.import_module(_MODULE).AclGraph
    for name in _WINDOWS:
        method = getattr(graph, name, None)
        if method is not None and not getattr(method, _OURS, False):
            setattr(graph, name, _without_collection(method))


def _without_collection(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        enabled = gc.isenabled()
        gc.disable()
        try:
            return method(*args, **kwargs)
        finally:
            if enabled:
                gc.enable()

    setattr(run, _OURS, True)
    return run
