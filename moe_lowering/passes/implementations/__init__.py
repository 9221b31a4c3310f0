"""The ways to communicate, one file each. To add one: a file with an ``Implementation``, an entry here, its rows in
``limits/data``, and its estimate in ``costs.estimate``."""

from moe_lowering.passes.implementations.allgather import ALLGATHER
from moe_lowering.passes.implementations.alltoall import ALLTOALL
from moe_lowering.passes.implementations.base import Call, Form, Implementation, Replacement
from moe_lowering.passes.implementations.fused_mc2 import FUSED_MC2
from moe_lowering.passes.implementations.mc2 import MC2

IMPLEMENTATIONS: dict[str, Implementation] = {i.name: i for i in (ALLGATHER, ALLTOALL, MC2, FUSED_MC2)}

__all__ = ["IMPLEMENTATIONS", "Call", "Form", "Implementation", "Replacement"]
