"""What each Ascend operator accepts, by SoC and version: data (``data/*.toml``), each row with its source, and its evaluation.

A row says that the value of an expression over named quantities lies in a range, is a multiple of something, or is one
of a set. The same rows serve three readers: the pass judges a block by them, the CPU kernels of ``npu::`` operators
refuse by them, and the verifier checks every Ascend node of a lowered graph against them. torch_npu's own schemas and
meta functions accept nearly anything, so these rows are the check.
"""

from moe_lowering.limits.bounds import TokenRange
from moe_lowering.limits.calls import bind, check_call, quantities
from moe_lowering.limits.expressions import align, ceil_div
from moe_lowering.limits.prover import Prover
from moe_lowering.limits.row import Limit, LimitsError
from moe_lowering.limits.sources import Citation
from moe_lowering.limits.table import limits_for, load, names
from moe_lowering.limits.violations import Violation, check, needed_buffer_mb

__all__ = [
    "Citation",
    "Limit",
    "LimitsError",
    "Prover",
    "TokenRange",
    "Violation",
    "align",
    "bind",
    "ceil_div",
    "check",
    "check_call",
    "limits_for",
    "load",
    "names",
    "needed_buffer_mb",
    "quantities",
]
