"""The rows and columns of the matrix: the ways to write an implementation down, sizes of groups, layouts of weights.

Without torch, so that the command can say what it accepts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_lowering.vocabulary import EXPERT_FORMATS

EP_SIZES = (1, 2, 4)
TP_SIZES = (1, 2)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the experts' weights are stored.

    Attributes:
        lists: each expert's weights are a tensor of their own; else one tensor holds all.
        weight_format: memory format on the device, as a deployment has it.
    """

    lists: bool
    weight_format: str

    @property
    def name(self) -> str:
        return f"{'list' if self.lists else 'stacked'}_{self.weight_format}"


LAYOUTS = {
    layout.name: layout for layout in (Layout(False, "nz"), Layout(True, "nz"), Layout(False, "nd"), Layout(True, "nd"))
}

VLLM_ASCEND = {"providers": (("vllm_ascend", "0.23.0"),)}
# an intermediate size of 512 from CANN 9.2: before that it is 1,024 (mega_moe.intermediate)
MEGA_MOE = {"providers": (("cann_ops_transformer", "9.2.0"),), "cann": "9.2.0"}


@dataclasses.dataclass(frozen=True)
class WeightForm:
    """One way to write an implementation down.

    Attributes:
        name: its row in the table.
        comm, form: the implementation that the pass is asked for, and the form that it must take.
        operators: names of operators of which each must be in the lowered graph.
        fields: of the deployment, beside sizes and groups.
        lists: whether each expert's weights are a tensor of their own, where nothing else is said.
        unpermutes: it has the operator in the graph that ``Deployment.unpermute_operator`` names.
        plain_format: memory format of weights that are not quantised, where nothing else is said; the others' is FRACTAL_NZ.
    """

    name: str
    comm: str
    form: str
    operators: tuple[str, ...]
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lists: bool = False
    plain_format: str = "nz"
    unpermutes: bool = False

    def layout(self, quantisation: str) -> Layout:
        """The layout of the weights that the form wants; used when a cell does not name another one."""
        weight_format = "nz" if EXPERT_FORMATS[quantisation].quantised else self.plain_format
        return Layout(self.lists, weight_format)

    def unpermuting(self, operator: str) -> tuple[str, ...]:
        """The operator that brings rows back in the graph, where there is one, by its name in a deployment."""
        return (f"npu.npu_moe_{operator}",) if self.unpermutes else ()

    def deployment_fields(self, layout: Layout) -> dict[str, Any]:
        """What the deployment says beside its sizes and groups: an A3 with enough HCCL window, and of each library the version
        that has most operators; no machine has them together, as vllm_ascend asks for torch_npu 2.10."""
        current = {"soc": "A3", "hccl_buffer_mb": 1024, "cann": "9.1.0", "torch_npu": "2.13.0"}
        return {**current, "weight_format": layout.weight_format, **self.fields}


# (implementation, form) that has no row: the routings of the scenarios send more rows than the ``max_rows`` that it is for.
# Its numbers are checked in tests/passes/test_lowering_ranks.py.
WITHOUT_A_ROW = (("alltoall", "buffers"),)
FORMS = {
    form.name: form
    for form in (
        WeightForm("allgather", "allgather", "allgather", ("npu.npu_moe_init_routing_v2",), unpermutes=True),
        WeightForm(
            "alltoall_static", "alltoall", "static", ("_c10d_functional.all_to_all_single",), {"capture": True},
            unpermutes=True,
        ),
        WeightForm("alltoall_exact", "alltoall", "exact", ("moe_lowering.alltoall_experts",), {"capture": False}),
        WeightForm("mc2", "mc2", "mc2", ("npu.npu_moe_distribute_dispatch_v2", "npu.npu_moe_distribute_combine_v2")),
        WeightForm(
            "dispatch_ffn_combine", "fused_mc2", "dispatch_ffn_combine", ("moe_lowering.dispatch_ffn_combine",),
            {"fused_mode": 1, **VLLM_ASCEND},
        ),
        WeightForm(
            "mega_moe", "fused_mc2", "mega_moe", ("moe_lowering.mega_moe",), {"fused_mode": 1, **MEGA_MOE}, lists=True,
            plain_format="nd",
        ),
        WeightForm(
            "dispatch_gmm_combine_decode", "fused_mc2", "dispatch_gmm_combine_decode",
            ("moe_lowering.dispatch_gmm_combine_decode",), {"fused_mode": 2, **VLLM_ASCEND},
        ),
    )
}  # fmt: skip
