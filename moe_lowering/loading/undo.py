"""``as_it_was``: whatever is raised while a model is filled, its modules hold what they held before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo what is done within to parameters, buffers, modules and attributes, if it ends with any exception.

    What is written into a tensor is not taken back: those of a model on device meta have no data.
    """
    before = [(module, dict(vars(module)), _copy_tables(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, tables in before:
            vars(module).clear()
            vars(module).update(attributes)
            for table, content in tables.items():
                attributes[table].clear()
                attributes[table].update(content)
        raise


def _copy_tables(module: nn.Module) -> dict[str, Any]:
    return {table: vars(module)[table].copy() for table in _TABLES}
