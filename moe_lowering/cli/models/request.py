"""One ``models`` command. Without torch."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from moe_lowering.families.records import DTYPES, SHAPES, WAYS, Kind


@dataclasses.dataclass(frozen=True)
class ModelsRequest:
    """One ``models`` command; ``only`` is empty for all families."""

    only: tuple[str, ...] = ()
    ways: tuple[str, ...] = WAYS
    dtypes: tuple[str, ...] = DTYPES
    shapes: tuple[str, ...] = SHAPES
    json_file: Path | None = None
    resume: Path | None = None
    write: Path | None = None
    again: bool = False
    json: bool = False

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is tried of each family."""
        return tuple(itertools.product(self.ways, self.dtypes, self.shapes))
