"""Changes to methods of vLLM and vllm-ascend that hold none of the plugin's state: each calls what it is given, and no more.

A module may be imported, and a hook on its import run, more than once: ``is_watched`` says whether its owner was changed before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_WATCHED = "_moe_lowering_watches"


def is_watched(owner: Any) -> bool:
    """Whether this was asked of a class or a module before. (That a function of it is wrapped does not say by whom.)"""
    known = vars(owner).get(_WATCHED, False)
    setattr(owner, _WATCHED, True)
    return bool(known)


def after_weights(method: Any, decide: Callable[[Any], None]) -> None:
    """Call ``decide(layer)`` when a layer of a quantisation method has its weights."""
    original = method.process_weights_after_loading
    if is_watched(method):
        return

    @functools.wraps(original)
    def process_weights_after_loading(self: Any, layer: Any) -> None:
        original(self, layer)
        decide(layer)

    method.process_weights_after_loading = process_weights_after_loading


def add_to_graph_key(compiler: Any, factors: Callable[[Any], list[str]]) -> None:
    """Put ``factors(vllm_config)`` into the key of the cache of compiled graphs."""
    compute_hash = compiler.compute_hash

    @functools.wraps(compute_hash)
    def hash_with_factors(self: Any, vllm_config: Any) -> str:
        return "-".join([str(compute_hash(self, vllm_config)), *factors(vllm_config)])

    compiler.compute_hash = hash_with_factors


def on_load(compiler: Any, tell: Callable[[Any], None]) -> None:
    """Call ``tell(handle)`` before a graph comes from the cache."""
    load_graph = compiler.load

    @functools.wraps(load_graph)
    def load(self: Any, handle: Any, *args: Any, **kwargs: Any) -> Any:
        tell(handle)
        return load_graph(self, handle, *args, **kwargs)

    compiler.load = load


def add_to_trace_key(module: Any, factors: Callable[[Any], list[str]]) -> None:
    """Put ``factors(vllm_config)`` into the key of the cache of traced models."""
    factors_of = module.aot_compile_hash_factors

    @functools.wraps(factors_of)
    def aot_compile_hash_factors(vllm_config: Any) -> list[str]:
        return [*factors_of(vllm_config), *factors(vllm_config)]

    module.aot_compile_hash_factors = aot_compile_hash_factors
