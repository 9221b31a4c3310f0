"""The ways to communicate, one file each. To add one: its name and forms in
``vocabulary``, a file with an ``Implementation``, an entry here, its rows in ``limits/data``; its price is that of the
nodes that it emits."""

from moe_lowering.lookup import look_up
from moe_lowering.passes.implementations.allgather import ALLGATHER
from moe_lowering.passes.implementations.alltoall import ALLTOALL
from moe_lowering.passes.implementations.base import Form, Implementation, Replacement
from moe_lowering.passes.implementations.fused_mc2 import FUSED_MC2
from moe_lowering.passes.implementations.mc2 import MC2
from moe_lowering.vocabulary import IMPLEMENTATION_FORMS

_REGISTERED = {i.name: i for i in (ALLGATHER, ALLTOALL, MC2, FUSED_MC2)}
# In the order of the vocabulary; a name without an implementation, or the other way round, is an error here.
IMPLEMENTATIONS: dict[str, Implementation] = {
    name: look_up(_REGISTERED, name, "IMPLEMENTATION_FORMS: name") for name in (*IMPLEMENTATION_FORMS, *_REGISTERED)
}

__all__ = ["IMPLEMENTATIONS", "Form", "Implementation", "Replacement"]
