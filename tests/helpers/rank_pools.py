"""Pools of ranks whose processes import nothing again that this one has imported, and simulate what it simulates."""

from collections.abc import Callable
from typing import Any

from moe_lowering import simulator, testing
from moe_lowering.testing.forking import fork_from_imports


def Ranks(size: int, **options: Any) -> testing.Ranks:
    """As ``testing.Ranks``; with ``start_method="spawn"`` they can simulate another SoC."""
    fork_from_imports()
    return testing.Ranks(size, **{"start_method": "forkserver", **options})


def run_on_ranks(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """``function(rank, *arguments)`` on each rank of a pool of its own; the results in rank order."""
    with Ranks(size, setup=simulator.enable) as ranks:
        return ranks.run(function, *arguments, timeout=timeout)
