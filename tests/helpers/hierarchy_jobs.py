"""What each rank does for test_hierarchy_ranks.py: lower a block to MC2 through the pass, and run what came out.

Experts and tokens come from seeds of their own, so that every process makes what it needs and the reference makes all.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from mc2_calls import on_soc
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moe_lowering import Deployment, MoeLowering, moe_experts

HIDDEN, INTERMEDIATE, TOP_K = 1024, 64, 3
MB = 1024  # A3's two-level algorithm takes 404 MB and a few for these sizes


@dataclasses.dataclass(frozen=True)
class Case:
    """One block on one SoC. ``mask`` is "", "prefix" (declared as such) or "free"."""

    soc: str
    hierarchy: bool = False
    quantisation: str = "none"
    mask: str = ""
    tokens: int = 5
    experts_per_rank: int = 2

    def __str__(self) -> str:
        return "-".join([self.soc, *["hierarchy"] * self.hierarchy, self.quantisation, *[self.mask] * bool(self.mask)])

    def fields(self) -> dict[str, Any]:
        return {"soc": self.soc, "mc2_hierarchy": self.hierarchy, "mask_is_prefix": self.mask == "prefix"}


def expert(case: Case, number: int) -> dict[str, Tensor]:
    """The weights of one expert by argument of ``moe_experts``; int8 with a scale per column where quantised."""
    generator = torch.Generator().manual_seed(1000 + number)
    made: dict[str, Tensor] = {}
    for name, shape in (("w13", (HIDDEN, 2 * INTERMEDIATE)), ("w2", (INTERMEDIATE, HIDDEN))):
        # each expert has a size of its own, so that one's scales are wrong for another
        plain = torch.randn(shape, generator=generator) * (1 + number / 16) / shape[0] ** 0.5
        if case.quantisation == "none":
            made[name] = plain.bfloat16()
            continue
        scale = plain.abs().amax(0) / 127
        made[name] = (plain / scale).round().to(torch.int8)
        made[f"{name}_scale"] = scale if name == "w13" else scale.bfloat16()
    return made


def inputs(case: Case, rank: int, ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x [T, H] bfloat16, weights [T, K] float32, ids [T, K] int32, mask [T]; masked tokens hold NaN."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(case.tokens, HIDDEN, generator=generator).bfloat16()
    weights = torch.rand(case.tokens, TOP_K, generator=generator) + 0.1
    scores = torch.rand(case.tokens, ranks * case.experts_per_rank, generator=generator)
    scores[:, 1] = 0  # nobody chooses expert 1
    ids = scores.argsort(1, descending=True)[:, :TOP_K].int().contiguous()
    if not case.mask:
        return x, weights, ids, None
    token = torch.arange(case.tokens)
    mask = token < (rank + 2) % (case.tokens + 1) if case.mask == "prefix" else (token + rank) % 3 != 1
    x[~mask], weights[~mask] = torch.nan, torch.nan
    return x, weights, ids, mask


def on_ranks(rank: int, cases: list[Case]) -> list[Any]:
    """y of each case, or the codes of the refusal."""
    logging.getLogger("moe_lowering").setLevel(logging.CRITICAL)
    os.environ["HCCL_BUFFSIZE"] = str(MB)
    assert dist.group.WORLD is not None
    groups = {"ep_group": dist.group.WORLD.group_name, "mc2_group": dist.new_group().group_name}
    return [_run(case, rank, groups) for case in cases]


def _run(case: Case, rank: int, groups: dict[str, str]) -> Any:
    ranks = dist.get_world_size()
    where = Deployment(
        ep_size=ranks, ep_rank=rank, hccl_buffer_mb=MB, weight_format="nz", cann="9.1.0", torch_npu="2.13.0",
        **groups, **case.fields(),
    )  # fmt: skip
    own = [expert(case, rank * case.experts_per_rank + local) for local in range(case.experts_per_rank)]
    named = {name: torch.stack([one[name] for one in own]) for name in own[0]}
    x, weights, ids, mask = inputs(case, rank, ranks)

    def block(x: Tensor, weights: Tensor, ids: Tensor, mask: Tensor | None, named: dict[str, Tensor]) -> Tensor:
        options: dict[str, Any] = {"mask": mask, "deployment": where, "quantisation": case.quantisation}
        return moe_experts(x, weights, ids, **named, **options)

    mode = FakeTensorMode()
    fakes = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, (x, weights, ids, mask, named))
    gm = make_fx(block)(*fakes)
    lowering = MoeLowering(where, "mc2")
    on_soc(case.soc)
    try:
        lowering(gm)
        (report,) = lowering.reports[-1].blocks
        if report.comm is None:
            return [violation.code for violation in report.verdicts["mc2"].violations] or report.reason
        return gm(x, weights, ids, mask, named)
    finally:
        on_soc("A3")
