"""The price of an implementation in microseconds, from what its nodes do (``work``) and what that costs (``prices``).

    price = sum over nodes of: start + bytes of memory, or operations where those take longer, or bytes on links
    fused = start of dispatch and combine + the longer of both matmuls and both exchanges

A price is a sum of terms, each with its relative error. What two prices have in common is wrong alike in both, so only the
terms in which they differ make their difference uncertain. A difference that is not larger than its error is a tie: then the
simpler implementation is taken, in the order of ``vocabulary.IMPLEMENTATION_FORMS`` (AllGather needs no second communicator,
MC2 no library), with a form that waits for the host as the last.

Every rank must choose alike. So a price reads the block's record without T, the deployment, the rates and T, and nothing else;
its terms are whole nanoseconds. Of T it reads the tokens of one TP rank, rounded up: more tokens never cost less.
Work is affine in these tokens: it is counted at two numbers of them, and read off the line through both at any other
(``_Line``). Where a cap on rows binds it is counted at T itself.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

from moe_lowering.custom_ops.sizes import ceil_div
from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.costs.work import Work, counted_work
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.prices.machines import Sent
from moe_lowering.prices.rates import Rates

_NO_CAP = 2**40  # rows
WAITS_FOR_THE_HOST = "exact"  # a form that reads sizes on the host, which has no price: it wins no tie
_TERM = tuple[str, int, float]


@dataclasses.dataclass(frozen=True)
class Price:
    """What an implementation costs at one number of tokens.

    Attributes:
        terms: (what, nanoseconds, their relative error), each ``what`` once.
        hidden_ns: of a fused operator, what it does beside something longer; it may not be hidden.
    """

    terms: tuple[_TERM, ...]
    hidden_ns: int = 0

    @property
    def ns(self) -> int:
        return sum(ns for _, ns, _ in self.terms)

    @property
    def us(self) -> float:
        return self.ns / 1000

    @property
    def error_us(self) -> float:
        """How wrong it may be; the errors of its terms are independent."""
        return difference_error(self, Price(())) / 1000


def difference_error(one: Price, other: Price) -> float:
    """How wrong the difference of two prices may be, in nanoseconds."""
    ours, theirs = ({what: (ns, error) for what, ns, error in price.terms} for price in (one, other))
    squares = float((one.hidden_ns - other.hidden_ns) ** 2)
    for what in sorted(ours.keys() | theirs.keys()):
        (a, error), (b, other_error) = ours.get(what, (0, 0.0)), theirs.get(what, (0, 0.0))
        squares += ((a - b) * max(error, other_error)) ** 2
    return math.sqrt(squares)


def is_tie(one: Price, other: Price) -> bool:
    """Whether the difference is within its error."""
    return abs(one.ns - other.ns) <= difference_error(one, other)


def choose_cheapest(prices: Mapping[str, Price], forms: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """(the simplest of those that tie with the cheapest, the others that do).

    Args:
        prices, forms: by implementation.
    """
    known = [name for name in IMPLEMENTATIONS if name in prices]
    order = sorted(known, key=lambda name: forms.get(name) == WAITS_FOR_THE_HOST)  # stable
    best = min(order, key=lambda name: (prices[name].ns, order.index(name)))
    tied = [name for name in order if name == best or is_tie(prices[name], prices[best])]
    return tied[0], tuple(name for name in tied if name != tied[0])


def price_of(name: str, form: str, spec: BlockSpec, deployment: Deployment, tokens: int, rates: Rates) -> Price:
    """Of a form that is legal for the block, at T = ``tokens`` (with unequal counts: the declared bound, on every rank)."""
    spec, own = spec_without_tokens(spec), ceil_div(tokens, spec.tp_size)
    where = deployment_without_tokens(deployment)
    if _is_capped(form, spec, own):
        return price_work(_count(name, form, spec, where, own, rates.ranks_per_node), rates)
    line = _line(name, form, spec, where, rates.ranks_per_node)
    return price_work(line.at(own), rates)


@functools.lru_cache(maxsize=64)
def _spec_without_tokens(spec: BlockSpec) -> BlockSpec:
    return dataclasses.replace(
        spec,
        tokens=None,
        max_tokens=min(spec.max_tokens, 1),
        key=(),
        on_shared_rank=False,
        collective_groups=frozenset(),
    )


def spec_without_tokens(spec: BlockSpec) -> BlockSpec:
    """What a price depends on beside T; ``max_tokens`` says only whether there is one."""
    return _spec_without_tokens(spec)


@functools.lru_cache(maxsize=64)
def deployment_without_tokens(deployment: Deployment) -> Deployment:
    """The same of a deployment."""
    bounded = not deployment.equal_tokens
    return deployment.replace(max_tokens=int(bounded), min_tokens=1)


def _is_capped(form: str, spec: BlockSpec, own: int) -> bool:
    """Whether ``max_rows`` bounds the buffers of a form at so many tokens."""
    return form == "buffers" and spec.max_rows > 0 and own * min(spec.top_k, spec.local_experts) > spec.max_rows


def _count(
    name: str, form: str, spec: BlockSpec, deployment: Deployment, own: int, ranks_per_node: int
) -> tuple[Work, ...]:
    """The work of a rank that has ``own`` tokens."""
    tokens = own * spec.tp_size
    if spec.max_tokens:
        spec = dataclasses.replace(spec, max_tokens=max(tokens, 1))
    return counted_work(name, form, spec, deployment, tokens, ranks_per_node)


@dataclasses.dataclass(frozen=True)
class _Line:
    """Work at two numbers of tokens per TP rank, ``first`` and ``first + step``: at any other it is on the line through both."""

    low: tuple[Work, ...]
    high: tuple[Work, ...]
    first: int
    step: int

    def at(self, own: int) -> list[Work]:
        more, step = own - self.first, self.step

        def on_line(a: int, b: int) -> int:
            return max(0, a + (b - a) * more // step)

        def sent(a: Sent, b: Sent) -> Sent:
            return Sent(on_line(a.within, b.within), on_line(a.between, b.between))

        return [
            dataclasses.replace(
                a,
                moved=on_line(a.moved, b.moved),
                operations=tuple(map(on_line, a.operations, b.operations)),
                rows=on_line(a.rows, b.rows),
                sent=sent(a.sent, b.sent),
                back=sent(a.back, b.back),
            )
            for a, b in zip(self.low, self.high, strict=True)
        ]


@functools.lru_cache(maxsize=256)
def _line(name: str, form: str, spec: BlockSpec, deployment: Deployment, ranks_per_node: int) -> _Line:
    """Of a form whose buffers no ``max_rows`` bounds."""
    step = spec.ep_size * (spec.ep_size - spec.shared_expert_ranks)  # divides everything that is spread over ranks
    if spec.max_rows:
        spec = dataclasses.replace(spec, max_rows=_NO_CAP)
    low, high = (_count(name, form, spec, deployment, own, ranks_per_node) for own in (step, 2 * step))
    return _Line(low, high, step, step)


class _Sum:
    """Terms as they add up."""

    def __init__(self, rates: Rates) -> None:
        self.rates, self.terms, self.hidden = rates, dict[str, int](), 0
        self.errors: dict[str, float] = {}

    def add(self, what: str, us: float, law: str) -> None:
        self.terms[what] = self.terms.get(what, 0) + round(us * 1000)
        self.errors[what] = self.rates.law(law).error

    def start(self, law: str, times: int = 1) -> None:
        self.add(f"{law} start", times * self.rates.law(law).fixed_us, law)

    def taken(self, law: str, ideal: float, ranks: int = 1) -> float:
        return ideal * self.rates.law(law).factor(ranks)

    def memory(self, size: int) -> float:
        return self.taken("memory", self.rates.ideal("memory", size))

    def longer(self, operations: int, rate: str, size: int) -> tuple[float, str]:
        """A matmul's time: of its operations, or of the bytes that it reads and writes."""
        return max((self.taken(rate, self.rates.ideal(rate, operations)), rate), (self.memory(size), "memory"))

    def price(self) -> Price:
        return Price(tuple((what, ns, self.errors[what]) for what, ns in self.terms.items()), self.hidden)


def price_work(works: Sequence[Work], rates: Rates) -> Price:
    """Of some nodes, one after the other."""
    total = _Sum(rates)
    for work in works:
        if work.what == "fused":
            _add_fused(total, work)
        elif work.what == "matmul":
            total.start(work.rate)
            us, law = total.longer(work.operations[0], work.rate, work.moved + work.read_experts(0))
            total.add(law, us, law)
        else:
            total.start(work.what)
            if work.what == "exchange":
                total.add("latency", rates.latency(work.ranks), "exchange")
            if work.ranks > 1:
                total.add(f"{work.what} bytes", total.taken(work.what, rates.link(work.sent), work.ranks), work.what)
            total.add("memory", total.memory(work.moved), "memory")
        if work.kernels > 1:
            total.start("vector", work.kernels - 1)  # copies of what is in pieces
            if work.what == "fused":
                total.add("memory", total.memory(work.moved), "memory")
    return total.price()


def _add_fused(total: _Sum, work: Work) -> None:
    """Both exchanges beside both matmuls: what is shorter is hidden, which may not be so."""
    total.start("dispatch")
    total.start("combine")
    computed = [
        total.longer(operations, work.rate, work.read_experts(at)) for at, operations in enumerate(work.operations)
    ]
    links = [
        (total.taken(law, total.rates.link(sent), work.ranks), law)
        for law, sent in (("dispatch", work.sent), ("combine", work.back))
    ]
    compute, link = sum(us for us, _ in computed), sum(us for us, _ in links)
    for us, law in computed if compute >= link else links:
        total.add(law if compute >= link else f"{law} bytes", us, law)
    total.hidden += round(min(compute, link) * 1000)
