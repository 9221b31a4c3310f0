"""Descriptions of MoE graphs and the deployments that they are lowered for.

``graph_build.build`` makes the graph module of a ``GraphCase``, ``graph_data.Data`` the tensors to run it on and what it
should compute. All of it is the same in every process: a case can be sent to other ranks and built there. Group names
name nothing when a graph is only judged.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moe_lowering import Deployment

# What a graph may hold that a rewrite must keep, or see that it changes nothing: the block still means the same.
HARMLESS = (
    "counts_read", "counts_read_early", "weights_late", "weights_last", "weights_from_counts", "w13_late", "ids_read",
    "kwargs", "y_unused",
)  # fmt: skip
# What the simulator's graphs cannot run, but a rewrite may meet.
SCOPES = ("scope_around", "scope_across", "scope_of_weights", "scope_not_open")
# What makes a chain no block: it must be left alone.
FOREIGN = (
    "rows_read", "rows_changed", "mlp_read", "mlp_changed", "mlp_twice", "handle_read", "handle_other", "ids_other",
    "mask_at_one_end", "bound_at_one_end", "experts_at_one_end", "counts_other", "counts_twice", "row_scale_read",
    "dispatch_whole", "quantised", "no_value",
)  # fmt: skip

# How a tensor of the experts comes to be: given as one tensor or one by expert; computed from such; made one from a list or
# a list from one; a part, the swapped or the wider version of what is given.
FORMS = ("stacked", "list", "computed", "list_computed", "unbound", "joined", "part", "swapped", "widened")


@dataclasses.dataclass(frozen=True)
class RouteCase:
    """A ``route`` in front of a block; without one, ids and weights are inputs of the graph."""

    scoring: str = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    scale: float = 1.0
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class BlockCase:
    """One block. ``as_list`` and ``bias`` are of (w13, w2); ``arguments`` replace those that the deployment gives.

    ``quantisation`` is that of the experts, see ``graph_quantised``; with one there are no biases. ``forms`` are of tensors
    by name (``w13_scale``), one of ``FORMS`` or ``dynamic`` (of symbolic sizes); as ``as_list`` says where they are not named.
    """

    experts: int
    top_k: int
    intermediate: int
    activation: str = "swiglu"
    limit: float = 0.0
    alpha: float = 1.702
    interleaved: bool = False
    as_list: tuple[bool, bool] = (False, False)
    transposed: bool = False
    bias: tuple[bool, bool] = (False, False)
    bias_float32: bool = False
    quantisation: str = "none"
    route: RouteCase | None = None
    mask: bool = False
    odd: tuple[str, ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()
    forms: tuple[tuple[str, str], ...] = ()

    def form(self, name: str) -> str:
        """That of one tensor of the experts."""
        as_list = self.as_list[name.startswith("w2")]
        return dict(self.forms).get(name, "list" if as_list else "stacked")

    def replace(self, **changes: Any) -> BlockCase:
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class GraphCase:
    """A graph.

    Attributes:
        lead: leading dimensions of x, T is their product. sizes: ``static``, ``dynamic``, ``strict`` or ``unbacked``.
        symbolic: which leading dimensions are symbols, unless static. bounds: what the graph knows of each.
        layout: ``chain`` (x + y of the block before), ``slices`` of one tensor, ``expanded``, ``permuted``.
        interleave: all dispatches, then all MLPs, then all combines (not with ``chain``).
        garbage: masked tokens hold NaN, and ids that name no expert.
    """

    deployment: Deployment
    blocks: tuple[BlockCase, ...]
    lead: tuple[int, ...] = (4,)
    hidden: int = 16
    dtype: torch.dtype = torch.float32
    sizes: str = "static"
    symbolic: tuple[bool, ...] = (True,)
    bounds: tuple[int, int | None] = (2, None)
    symbolic_hidden: bool = False
    layout: str = "chain"
    interleave: bool = False
    comm: str = "auto"
    policy: str = "auto"
    seed: int = 0
    keep: float = 0.5
    skew: bool = False
    garbage: bool = False

    def replace(self, **changes: Any) -> GraphCase:
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class PairCase:
    """A case for two ranks, with the leading dimensions that each compiles and runs its graph with."""

    case: GraphCase
    compiled: tuple[tuple[int, ...], ...]
    run: tuple[tuple[int, ...], ...]
