"""What became of a small model of each family, as records. Without torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from moe_lowering.model_configs.errors import ModelError, write_value
from moe_lowering.number_words import WORST

WAYS = ("hook", "trace")  # by transformers' experts interface, and from the graph of the model as transformers makes it
DTYPES = ("bfloat16", "float32")
SHAPES = ("static", "dynamic")
# What may be said of an attempt: all MoE layers lowered, with the model's own result; lowered, with another; some are not
# lowered; the model could not be built, compiled or run.
RIGHT, WRONG, LEFT, FAILED = "right", "wrong", "left", "failed"
STATES = (RIGHT, WRONG, LEFT, FAILED)
Kind: TypeAlias = tuple[str, str, str]  # of WAYS, DTYPES, SHAPES
FORMAT = 1  # of the file; another one is not resumed


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One way, dtype and kind of shapes.

    Attributes:
        state: of ``STATES``.
        layers: MoE layers of the model; ``lowered``: of these, in each graph.
        comms: the implementations that they became, each once.
        error: the largest max|a - b| / max|b| of an MoE layer's output, or None where nothing was compared.
        routers: routers that became an operator of the device; None where the report does not say.
        overlapped: shared experts that run beside a layer; None where they were not asked to.
        reason: why the state is not right; "" when it is.
    """

    way: str
    dtype: str
    shapes: str
    state: str
    layers: int = 0
    lowered: int = 0
    comms: tuple[str, ...] = ()
    error: float | None = None
    routers: int | None = None
    overlapped: int | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        for name, words in (("way", WAYS), ("dtype", DTYPES), ("shapes", SHAPES), ("state", STATES)):
            if getattr(self, name) not in words:
                raise ValueError(f"Attempt: {name} is {getattr(self, name)!r}; accepted: {', '.join(words)}")
        if (self.state == RIGHT) == bool(self.reason):
            raise ValueError(
                f"Attempt: reason is {self.reason!r} for state {self.state!r}; accepted: one unless it is right"
            )


@dataclasses.dataclass(frozen=True)
class Row:
    """A family: its attempts, in the order of ``WAYS``, ``DTYPES``, ``SHAPES``; and how long they took."""

    family: str
    attempts: tuple[Attempt, ...]
    seconds: float = 0.0

    @property
    def kinds(self) -> set[Kind]:
        return {(attempt.way, attempt.dtype, attempt.shapes) for attempt in self.attempts}

    def with_attempts(self, other: Row) -> Row:
        """Its attempts and those of another row of the family, which come instead of its own of the same kind."""
        kept = [attempt for attempt in self.attempts if (attempt.way, attempt.dtype, attempt.shapes) not in other.kinds]
        attempts = sorted(
            (*kept, *other.attempts), key=lambda a: (WAYS.index(a.way), DTYPES.index(a.dtype), SHAPES.index(a.shapes))
        )
        return Row(self.family, tuple(attempts), round(self.seconds + other.seconds, 1))

    def of(self, way: str) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.way == way]

    def is_right(self, way: str) -> bool:
        attempts = self.of(way)
        return bool(attempts) and all(attempt.state == RIGHT for attempt in attempts)


def failed(family: str, kinds: Sequence[Kind], reason: str, seconds: float = 0.0) -> Row:
    """The row of a family whose process ended before it said anything."""
    return Row(family, tuple(Attempt(*kind, FAILED, reason=reason) for kind in kinds), seconds)


def to_json(rows: list[Row], version: str) -> str:
    """One JSON object; ``version``: of transformers. An error that is infinite is ``WORST``."""
    # Not above: with it comes torch, which a command line without a run does not load
    from moe_lowering.report.schemas import SCHEMA_VERSION

    families = [dataclasses.asdict(row) for row in rows]
    for attempt in itertools.chain.from_iterable(family["attempts"] for family in families):
        attempt["error"] = WORST if attempt["error"] == float("inf") else attempt["error"]
    record = {"schema_version": SCHEMA_VERSION, "format": FORMAT, "transformers": version, "families": families}
    return json.dumps(record, indent=1, allow_nan=False)


def read_rows(path: Path, version: str) -> list[Row]:
    """The rows of a file of ``to_json``; none when there is no file.

    Raises:
        ModelError: it is none, or of another transformers.
    """
    if not path.exists():
        return []
    try:
        values = json.loads(path.read_text("utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {write_value(values['format'])}, not {FORMAT}")
        if values["transformers"] != version:
            raise ValueError(f"it is of transformers {write_value(values['transformers'])}, and {version} is installed")
        return [_row(row) for row in values["families"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{write_value(str(path))} cannot be resumed ({type(error).__name__}: {error}); accepted: a file that this "
            "command wrote, or none yet"
        ) from error


def _row(values: dict[str, Any]) -> Row:
    attempts = []
    for each in values["attempts"]:
        error = float("inf") if each["error"] == WORST else each["error"]
        attempts.append(Attempt(**{**each, "comms": tuple(each["comms"]), "error": error}))
    return Row(values["family"], tuple(attempts), values["seconds"])
