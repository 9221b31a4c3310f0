"""``ExplainError``: an argument that ``explain`` does not take; ``MissingSizesError``: sizes that a config does not have."""

from __future__ import annotations

from typing import Any


class ExplainError(ValueError):
    """An argument that ``explain`` cannot take.

    Attributes:
        argument: its name.
        problem: its value, and what is accepted.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"explain: {argument}{'' if problem.startswith('is ') else ':'} {problem}")
        self.argument, self.problem = argument, problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, self.problem)


class MissingSizesError(ExplainError):
    """Sizes of a block that neither the arguments nor the config have. ``sizes``: their names in a
    ``BlockDescription``."""

    def __init__(self, model: str | None, sizes: tuple[str, ...]) -> None:
        what = "no model is given" if model is None else f"the config of {model} does not say all sizes"
        super().__init__(
            "model",
            f"{what}: {', '.join(sizes)} missing; accepted: a model with MoE layers, or a BlockDescription",
        )
        self.model, self.sizes = model, sizes

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.sizes)
