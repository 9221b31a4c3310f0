"""``keep_alive``: an operator that computes nothing and reads tensors, so that their memory is not reused before it.

The code that runs a graph drops a tensor after its last reader in program order, and the allocator then gives its memory
to the next operator of the stream it was allocated on. A reader on another stream may not have run by then. So a tensor
that another stream reads is read once more, by this operator, after the wait for that stream; it also keeps passes that
write in place from taking it before. ``npugraph_ex.record_tagged_stream`` does not do it: it looks its stream up by
another table than the generated code that switches to it (torch_npu 2.13.0, npugraph_ex/scope/_scope_attr.py
_GLOBAL_TAG_TO_STREAM; _acl_concrete_graph/fx2acl_converter.py _GLOBAL_USER_TAG_TO_STREAM), and inside a capture memory
with a recorded stream is not used again at all.
"""

from __future__ import annotations

from torch import Tensor

from moe_lowering.custom_ops.library import register

SCHEMA = "keep_alive(Tensor[] tensors) -> ()"


def _do_nothing(tensors: list[Tensor]) -> None:
    """Computes nothing: the call itself keeps ``tensors`` alive. Any shapes, dtypes and devices."""


register(SCHEMA, cpu=_do_nothing, npu=_do_nothing, fake=_do_nothing, side_effect=True)
