"""What compile caches must hash: a digest of the pass, the limits and the deployment, where caches look for it.

npugraph_ex's ``cache_compile`` keys a hook by the text of its bytecode and by nothing that the hook holds (torch_npu
2.13.0, inference/_cache_compiler.py, ``_get_code_digest``): with an instance, a closure or a partial, another capacity
would load the old graph. So the hook is a flat function with the digest as a string constant in its code. Nested functions
would put addresses into that text, and no other process would find the artefact again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch

from moe_lowering._versions import installed_version, sources_digest
from moe_lowering.identity import identity
from moe_lowering.limits.calls.schemas import loaded_libraries
from moe_lowering.passes.pipeline import MoeLowering

Hook = Callable[[Any, Any, Any], None]
_TEMPLATE = """
def moe_lowering_hook(gm, example_inputs, config):
    run({digest!r}, gm, example_inputs, config)
moe_lowering_hook.cache_key = {key!r}
"""


@functools.cache
def code_digest() -> str:
    """SHA-256 (hex) of this package's sources, limit tables among them, and of the versions it compiles for."""
    versions = f"{torch.__version__} {installed_version('torch_npu')}"
    return hashlib.sha256(f"{versions} {sources_digest()}".encode()).hexdigest()


def cache_digest(lowering: MoeLowering, own: Hook | None = None, agreement_timeout: float | str | None = "auto") -> str:
    """SHA-256 (hex) of everything that a lowered graph depends on beside the graph it was made from.

    That is the package's code and limits, operators of other libraries that this process has loaded, every field of the
    deployment (a rank's own too: rank indices and group names stand in the graph), the pass's settings, how long the
    graph waits for other ranks, and a cost function and a pre-pass of the user's with what they hold.
    """
    policy = lowering.policy
    parts = {
        "code": code_digest(),
        "libraries": sorted(loaded_libraries()),
        "deployment": lowering.deployment.all_fields(),
        "comm": policy.comm,
        "policy": policy.name,
        "strict": lowering.strict,
        "overlap": lowering.overlap,
        "raise_foreign": lowering.raise_foreign,
        "cost": identity(policy.cost),
        "own": None if own is None else identity(own),
        "agreement_timeout": agreement_timeout,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def flat_hook(
    lowering: MoeLowering,
    own: Hook | None = None,
    before_first: Callable[[], None] | None = None,
    after: Hook | None = None,
    agreement_timeout: float | str | None = "auto",
) -> Hook:
    """The pass as a function whose code names its digest; ``own``, a pre-pass of the user's, runs before it.

    ``before_first`` is called once, before the first graph; ``after``, code of this package, after the pass.
    """
    waiting = [before_first] if before_first is not None else []

    def run(digest: str, gm: Any, example_inputs: Any, config: Any) -> None:
        while waiting:
            waiting[0]()
            waiting.pop()  # not after an error: the next graph is refused as this one
        if own is not None:
            own(gm, example_inputs, config)
        lowering(gm, example_inputs, config, agreement_timeout)
        if after is not None:
            after(gm, example_inputs, config)

    names: dict[str, Any] = {"run": run}
    digest = cache_digest(lowering, own, agreement_timeout)
    key = f"{digest}, then {getattr(after, '__qualname__', None)}"  # of a hook that is the pre-pass of another
    exec(_TEMPLATE.format(digest=digest, key=key), names)
    hook: Hook = names["moe_lowering_hook"]
    return hook
