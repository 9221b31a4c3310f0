"""``IMPLEMENTATIONS``: the ways to communicate, by name, each in a file of its own.

What a new one needs: ``docs/adding.md``, An implementation.
"""

from moe_lowering.passes.implementations.allgather import ALLGATHER
from moe_lowering.passes.implementations.alltoall import ALLTOALL
from moe_lowering.passes.implementations.base import Form, Implementation, Replacement
from moe_lowering.passes.implementations.fused_mc2 import FUSED_MC2
from moe_lowering.passes.implementations.mc2 import MC2
from moe_lowering.vocabulary import IMPLEMENTATION_FORMS

_REGISTERED = {i.name: i for i in (ALLGATHER, ALLTOALL, MC2, FUSED_MC2)}
# A name without an implementation, or the other way round, is an error here.
for _name in IMPLEMENTATION_FORMS.keys() ^ _REGISTERED.keys():
    _where, _step = ("passes/implementations/__init__.py", 3) if _name in IMPLEMENTATION_FORMS else ("vocabulary.py", 1)
    raise ImportError(
        f"{_name!r} is no implementation of {_where} (docs/adding.md, An implementation, step {_step}: forgotten)"
    )
# In the order of the vocabulary.
IMPLEMENTATIONS: dict[str, Implementation] = {name: _REGISTERED[name] for name in IMPLEMENTATION_FORMS}

__all__ = ["IMPLEMENTATIONS", "Form", "Implementation", "Replacement"]
