"""``find_pieces``: the ranges of T with one choice each, and which limit, cost or policy sets each boundary between them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import sympy

from moe_lowering.explanation.answer import Answer, Question
from moe_lowering.limits import TokenRange
from moe_lowering.limits.findings import Finding
from moe_lowering.limits.wording import show
from moe_lowering.number_words import count_of
from moe_lowering.passes.costs.price import is_tie
from moe_lowering.passes.decision import sweep


@dataclasses.dataclass(frozen=True)
class Piece:
    """A range of T with one choice.

    Attributes:
        boundary: what ends it: codes of limits, or ``cost`` or the policy's name; empty at the end of the sweep.
        because: the same in words, with sizes as expressions in T.
    """

    low: int
    high: int
    choice: str | None
    boundary: tuple[str, ...] = ()
    because: tuple[str, ...] = ()


def find_pieces(question: Question, whole: TokenRange) -> tuple[Piece, ...]:
    """The pieces of a range, each with what ends it."""
    at = functools.cache(question.at)
    parts = _choice_pieces(at, whole)
    pieces = []
    for (low, choice), (following, _) in itertools.pairwise([*parts, ((whole.high or 0) + 1, None)]):
        high = following - 1
        ends = _boundary(question.policy.name, at(high), at(following)) if high != whole.high else {}
        pieces.append(Piece(low, high, choice, tuple(ends), tuple(ends.values())))
    return tuple(pieces)


def _choice_pieces(at: Callable[[int], Answer], whole: TokenRange) -> list[tuple[int, str | None]]:
    """(first T, choice) of every piece.

    ``sweep`` steps in doubling strides, so it may step over a short piece between two equal ones. An implementation does
    not become illegal and legal again as T grows: first the ranges of equal legality, then the choices within each.
    """

    def legal(tokens: int) -> str:
        return " ".join(name for name, verdict in at(tokens).judgement.verdicts.items() if verdict.legal)

    parts: list[tuple[int, str | None]] = []
    for part, _ in sweep(legal, whole):
        for piece, choice in sweep(lambda tokens: at(tokens).choice, part):
            if not parts or parts[-1][1] != choice:
                parts.append((piece.low, choice))
    return parts


def _boundary(policy: str, before: Answer, after: Answer) -> dict[str, str]:
    """What changes the choice between two neighbouring token counts, by code, in words."""
    if before.choice is not None and (broken := after.broken(before.choice)):
        return {code: _in_tokens(finding, after, before.choice) for code, finding in broken.items()}
    if after.choice is not None and (broken := before.broken(after.choice)):
        return {
            code: f"{_in_tokens(finding, before, after.choice)}; it is from here on" for code, finding in broken.items()
        }
    if before.requested != after.requested:
        return {policy: f"it selects {before.requested}, then {after.requested}"}
    at = count_of(before.tokens, "token")
    return {"cost": f"at {at} {_prices(before, after)}; at {after.tokens} {_prices(after, before)}"}


def _prices(answer: Answer, other: Answer) -> str:
    """The price of an answer's choice and of the other's, the choice first; a tie may choose the dearer one."""
    names = [name for name in (answer.choice, other.choice) if name is not None]
    priced = [(name, price) for name in names if (price := answer.prices[name]) is not None]
    texts = [f"{name} ({price.us:.0f} us)" for name, price in priced]
    if len(priced) < 2:
        return " and ".join(texts)
    if is_tie(priced[0][1], priced[1][1]):
        return f"{' and '.join(texts)} are a tie"
    return f"{texts[0]} is cheaper than {texts[1]}"


def _in_tokens(finding: Finding, answer: Answer, implementation: str) -> str:
    """A rule on a size as an expression in T, e.g. ``58720256*T must be at most ...``; of the HCCL window in the MB that
    the answer's T needs, as refusals have it."""
    limit, spec = finding.limit, answer.spec
    quantities = answer.quantities(implementation, limit.operator)
    whole = sympy.Symbol("T", integer=True, positive=True)
    share = whole if spec.tp_size == 1 else sympy.Symbol(f"ceil(T/{spec.tp_size})", integer=True, positive=True)
    received = spec.ep_size * share * min(spec.top_k, spec.local_experts)
    sizes = {
        **quantities,
        "block_tokens": whole,
        "tokens": share,
        "max_tokens": share,
        "received": received,
        "soc": answer.deployment.soc,
    }
    size = show(sympy.expand(limit.value(sizes)))
    violations = answer.judgement.verdicts[implementation].violations
    if fault := next((each.fault for each in violations if each.code == limit.code and each.buffer is not None), ""):
        most = limit.accepted(quantities).max
        whole = most is not None and most.expression == "buffer_bytes"  # others compare with a part of it
        return f"at {answer.tokens} it {fault}" + (f" ({size} bytes)" if whole else "")
    accepted = limit.accepted(quantities).say()
    return f"{size} must be {'' if accepted[0].isalpha() else 'in '}{accepted}"
