"""The workspace of a fused operator: device memory that it takes beside its arguments and results.

Only ``dispatch_ffn_combine``'s is known, from its host tilings: so many bytes for each row of ``max_output_size``, whether a row
comes or not. Tables of routing and counts, some hundred kilobytes, are left out.
Sources: vllm_ascend.ffn_tiling, vllm_ascend.ffn_tiling_16_bit, vllm_ascend.ffn_tiling_w4a8; vllm_ascend_pull.9814: the same,
and the memory that the KV cache lacked on a device; vllm_ascend_pull.9528: W8A8's matmuls share the memory of their results.
"""

from __future__ import annotations

from moe_lowering.deployment import Deployment
from moe_lowering.limits.versions import Constraint, do_constraints_apply
from moe_lowering.lookup import look_up
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.vocabulary import IMPLEMENTATION_FORMS, ONE_OPERATOR

_SYSTEM = 16 * 2**20  # of the operator itself
_SCALES = 2 * 4  # a row's two scales in float32
_APART = (Constraint.parse("vllm_ascend<0.21"),)  # the results of W8A8's matmuls have memory of their own


def workspace_bytes(form: str, spec: BlockSpec, deployment: Deployment, rows: int | None) -> int | None:
    """Of one form.

    Args:
        rows: that its operator is told to have room for (``Form.told_rows``).

    Returns:
        bytes; 0 for a form of several operators, whose memory is that of their results; None where it is not known.
    """
    if form not in _FUSED:
        return 0
    if form != "dispatch_ffn_combine" or rows is None:
        return None
    return _SYSTEM + rows * _row_bytes(spec, deployment)


def _row_bytes(spec: BlockSpec, deployment: Deployment) -> int:
    """What both matmuls read and give of one row, results in 16 bits."""
    hidden, inner = spec.hidden, spec.intermediate
    apart = do_constraints_apply(_APART, deployment.versions)
    sizes = {
        "none": 2 * (2 * inner + hidden) + 2 * (hidden + inner),
        "w8a8": 2 * (2 * inner + hidden) + hidden + inner if apart else 2 * hidden + hidden,
        "w4a8": 2 * 2 * hidden + hidden + inner,  # two lines as wide as the wider matmul: fused.width
    }
    return look_up(sizes, spec.quantisation, "workspace: quantisation") + _SCALES


_FUSED = frozenset(form for name in ONE_OPERATOR for form in IMPLEMENTATION_FORMS[name])
