"""The record of one ``matrix`` command. Imports no torch."""

from __future__ import annotations

import dataclasses

from moe_lowering.matrix.forms import EP_SIZES, FORMS, TP_SIZES
from moe_lowering.vocabulary import EXPERT_FORMATS, IMPLEMENTATION_FORMS, TOKEN_UNPERMUTE

# The rows of the table by implementation.
FORMS_OF = {comm: tuple(form.name for form in FORMS.values() if form.comm == comm) for comm in IMPLEMENTATION_FORMS}


@dataclasses.dataclass(frozen=True)
class MatrixRequest:
    """One ``matrix`` command."""

    ep: tuple[int, ...] = EP_SIZES
    tp: tuple[int, ...] = TP_SIZES
    quant: tuple[str, ...] = tuple(EXPERT_FORMATS)
    comm: tuple[str, ...] = tuple(FORMS_OF)
    unpermute_operator: str = TOKEN_UNPERMUTE
    json: bool = False

    @property
    def forms(self) -> tuple[str, ...]:
        return tuple(form for comm in self.comm for form in FORMS_OF[comm])
