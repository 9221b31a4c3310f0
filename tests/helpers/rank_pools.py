"""Pools of ranks whose processes import nothing again that this one has imported, and simulate what it simulates."""

from moe_lowering import testing
from moe_lowering.testing.ranks import fork_from_imports


def Ranks(size: int, **options) -> testing.Ranks:
    """As ``testing.Ranks``; with ``start_method="spawn"`` they can simulate another SoC."""
    fork_from_imports()
    return testing.Ranks(size, **{"start_method": "forkserver", **options})
