"""Facts about the operators, written by hand from their sources (``limit_facts/*.toml``), as calls that are legal or not.

They share nothing with ``moe_lowering/limits/data``: a wrong number there must show here. A file names the operators and
SoCs that its facts are about, a group the documents that they were read from, cited as
in ``limits/data``. A fact has a code and one of

- ``range = ["tokens", 1, 512]``: the first and last legal value, "" where there is none; the next ones are illegal;
- ``multiple = ["hidden", 32]``: 32 and 96 are legal, 16, 31, 33 are not;
- ``only = ["x_dtype", ["float16"]]``: the legal values; every other one of the same kind is illegal (``others``);
- ``same = ["mask_tokens", "tokens"]``: legal when equal; or ``bytes = 1002438656``: the least HCCL window that is enough;
- ``legal`` and ``illegal``: lists of quantities.

``soc`` is ``every`` where the rule is of no machine, as its row then names none: such facts hold on a new SoC, too.
``when`` holds the other quantities (or is a list of such: the fact holds in each case); ``versions`` those in which the
fact holds, ``free`` those in which its illegal values are no violation. ``soc`` and ``operators`` may stand in a fact too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_lowering.limits.sources import cite, load_sources, render_citations
from moe_lowering.limits.toml import loads
from moe_lowering.passes.operands import COMPUTED, MIXED
from moe_lowering.vocabulary import ACTIVATIONS, EXPERT_FORMATS, MODES, SOCS, UNPERMUTE_OPERATORS, WEIGHT_FORMATS

DATA = Path(__file__).parent / "limit_facts"
KINDS = ("range", "multiple", "only", "same", "bytes", "legal")
DTYPES = (
    "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint64", "bool",
    "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
WORDS = {
    "comm_alg": ("fullmesh", "fullmesh_v1", "fullmesh_v2", "hierarchy", "ring"),
    "weight_format": (*WEIGHT_FORMATS, COMPUTED, MIXED),
    "activation": tuple(ACTIVATIONS),
    "quantisation": (*EXPERT_FORMATS, "w8a16"),
    "quant_mode": ("pertoken", "perchannel", "pertensor", "pergroup"),
    "form": ("none", "a8w8", "a8w4", "a4w4", "a16w8", "a16w4", "a8w16"),
    "mode": (*MODES, "eager"),
    "unpermute_operator": UNPERMUTE_OPERATORS,
    "smooth_scales": ("none", "tokens", "activations", "tokens and activations"),
    "reduce_op": ("sum", "avg", "max", "min"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of which a fact says that it breaks, or does not break, a rule."""

    operator: str
    code: str
    soc: str
    given: dict[str, Any]
    legal: bool
    versions: dict[str, str]
    source: str

    def __str__(self) -> str:
        return f"{self.operator} on {self.soc}, {self.given}, versions {self.versions}: {self.code} ({self.source})"


@functools.cache
def cases() -> tuple[Case, ...]:
    """All cases of all facts."""
    found: list[Case] = []
    for file in sorted(DATA.glob("*.toml")):
        table = loads(file.read_text("utf-8"))
        for group in table["group"]:
            source = render_citations(cite(group["source"], load_sources()))
            for fact in group["facts"]:
                found += _cases({"operators": table["operators"], "soc": table["soc"], **fact}, source)
    return tuple(found)


def _cases(fact: dict[str, Any], source: str) -> Iterator[Case]:
    unknown = fact.keys() - {*KINDS, "code", "operators", "soc", "when", "versions", "free", "illegal"}
    if unknown or sum(kind in fact for kind in KINDS) != 1:
        raise ValueError(f"{fact}: unknown {sorted(unknown)}, or not one of {KINDS}")
    when = fact.get("when", {})
    for operator, soc, rest in itertools.product(fact["operators"], _socs(fact["soc"]), _list(when)):
        known: list[dict[str, str]] = [fact["versions"], {}] if "versions" in fact else [{}]
        for values, legal in assignments(fact):
            place = values.get("soc", soc)
            given = {**rest, **{k: v for k, v in values.items() if k != "soc"}}
            for versions in known:
                if not (legal and "versions" in fact and not versions):  # unknown versions: other rows may be stricter
                    yield Case(operator, fact["code"], place, given, legal, versions, source)
            if "free" in fact and not legal:
                yield Case(operator, fact["code"], place, given, True, fact["free"], source)


def _socs(text: str) -> tuple[str, ...]:
    return tuple(SOCS) if text == "every" else tuple(text.split())


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def assignments(fact: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
    """(quantities, legal) of one fact."""
    if "legal" in fact:
        yield from ((values, True) for values in fact["legal"])
        yield from ((values, False) for values in fact["illegal"])
    elif "bytes" in fact:
        yield from (({"buffer_bytes": fact["bytes"] - less}, not less) for less in (0, 1))
    elif "range" in fact:
        name, low, high = fact["range"]
        for end, step in ((low, -1), (high, 1)):
            if end != "":
                yield {name: end}, True
                yield {name: end + step}, False
    elif "multiple" in fact:
        name, unit = fact["multiple"]
        yield from (({name: value}, True) for value in (unit, 3 * unit))
        yield from (({name: value}, False) for value in {unit + 1, unit - 1, unit // 2, 3 * unit // 2} if value % unit)
    elif "same" in fact:
        name, other = fact["same"]
        one, two = ("float16", "float32") if name.endswith("dtype") else (7, 8)
        yield from (({name: a, other: b}, a == b) for a, b in ((one, one), (one, two), (two, one)))
    else:
        name, accepted = fact["only"]
        yield from (({name: value}, True) for value in accepted)
        yield from (({name: value}, False) for value in others(name, accepted))


def others(name: str, accepted: list[Any]) -> list[Any]:
    """Values of the same kind that are not accepted: of integers all up to twice the largest, of words all that are known."""
    kind = type(accepted[0])
    if kind is bool:
        universe: tuple[Any, ...] = (True, False)
    elif kind is int:
        universe = tuple(range(-3, 2 * max(accepted) + 4))
    elif name == "soc":
        universe = SOCS
    elif name.endswith("dtype"):
        universe = (*DTYPES, *accepted)
    else:
        universe = (*WORDS[name], *accepted, "something else")
    return [value for value in universe if value not in accepted]
