"""The matrix of implementations: its axes, and the data of every cell, the same in each process that makes them.

A cell is one way to lower a block, one weight format, one EP and TP size, one scenario of token counts and routing, and
one layout of the weights: what the way to lower wants, but for a few cells (``table.Axes``).
Sizes are the smallest that every operator accepts (mega_moe: hidden from 1,024, intermediate from 512 with CANN 9.2).
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from moe_lowering.matrix.forms import EP_SIZES, FORMS, LAYOUTS, Layout
from moe_lowering.quantisation import quantise_weight
from moe_lowering.vocabulary import EXPERT_FORMATS, TOKEN_UNPERMUTE

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 1024, 512, 16, 3
TOKENS = 6  # of a TP group where nothing else is said; the bound where counts differ
MOST_GROUPS = 4
DTYPE = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Scenario:
    """How many tokens there are, and where they go.

    Attributes:
        name, words: as arguments spell it, and for people.
        tokens: of every TP group; () where ``unequal`` gives them.
        routing: ``random``, ``even`` (each expert alike), ``skewed`` (all tokens to the same experts, which are one
            rank's), ``empty`` (every rank has an expert without tokens).
        masked: some tokens are masked, and all those of the last TP group if there are several.
        padded: the last tokens are masked, and the deployment says that every mask is like that.
        counts: the experts' token counts are a result of the graph, too.
        symbolic: the graph is made for a symbolic number of tokens (as of ``TOKENS`` tokens), not for those it is run with.
        idle: ``unequal``, and some TP group has no token, which the deployment allows.
        quantised: tokens are int8 with a scale each.
        on_input: one expert for each token, and x is multiplied by its weight instead of the result.
        logical: ids are logical, and a table says which physical expert each is.
        quantisations, eps: the weight formats and EP sizes that the scenario is for.
    """

    name: str
    words: str
    tokens: int = TOKENS
    routing: str = "random"
    masked: bool = False
    padded: bool = False
    unequal: bool = False
    counts: bool = False
    symbolic: bool = False
    idle: bool = False
    quantised: bool = False
    on_input: bool = False
    logical: bool = False
    quantisations: tuple[str, ...] = tuple(EXPERT_FORMATS)
    eps: tuple[int, ...] = EP_SIZES

    @property
    def top_k(self) -> int:
        return 1 if self.on_input else TOP_K

    @property
    def no_token(self) -> bool:
        """Whether no rank has a token."""
        return not self.unequal and self.tokens == 0

    def by_group(self, groups: int) -> tuple[int, ...]:
        """Tokens of each TP group."""
        if self.idle:
            return {1: (0,), 2: (6, 0), 4: (6, 0, 3, 5)}[groups]
        return {1: (3,), 2: (6, 1), 4: (6, 1, 3, 5)}[groups] if self.unequal else (self.tokens,) * groups

    def inputs(self, group: int, groups: int) -> Inputs:
        """The inputs of the ranks of one TP group."""
        tokens = self.by_group(groups)[group]
        generator = torch.Generator().manual_seed(group + 1)
        ids = _ids(self.routing, group, tokens, self.top_k, generator)
        weights = torch.rand(tokens, self.top_k, generator=generator) + 0.1
        x = token_bank()[group * TOKENS :][:tokens].clone()
        if self.quantised:
            scale = x.float().abs().amax(1) / 127
            x = (x.float() / scale.unsqueeze(1)).round().to(torch.int8)
            return Inputs(x, weights, ids, None, scale=scale)
        if not self.masked and not self.padded:
            return Inputs(x, weights, ids, None, log2phy=physical_experts() if self.logical else None)
        mask = torch.arange(tokens) < 4 - group if self.padded else (torch.arange(tokens) + group) % 3 != 1
        if groups > 1 and group == groups - 1:
            mask = torch.zeros(tokens, dtype=torch.bool)
        # a padding token may hold anything: here NaN, so that it shows if it reaches a result
        x[~mask], weights[~mask] = torch.nan, torch.nan
        return Inputs(x, weights, ids, mask)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """x [T, H] bfloat16, weights [T, k] float32, ids [T, k] int32, mask [T] bool or None; scale [T] float32 of int8 x;
    log2phy [E] int32 of logical ids."""

    x: Tensor
    weights: Tensor
    ids: Tensor
    mask: Tensor | None
    scale: Tensor | None = None
    log2phy: Tensor | None = None


_TWO = ("none", "w8a8")  # weight formats for what has little to do with them
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("even", "every expert gets as many tokens", routing="even"),
        Scenario("skewed", "every token to the same experts", routing="skewed"),
        Scenario("empty", "an expert without tokens on each rank", routing="empty"),
        Scenario("masked", "some tokens masked", masked=True),
        Scenario("padded", "the last tokens masked", padded=True),
        Scenario("t0", "T = 0", tokens=0),
        Scenario("t1", "T = 1", tokens=1),
        Scenario("odd", "T not a multiple of the TP size", tokens=5),
        Scenario("unequal", "T differs between ranks", unequal=True),
        Scenario("unequal_masked", "T differs, some tokens masked", unequal=True, masked=True),
        Scenario("counts", "the counts are read", counts=True),
        Scenario("odd_counts", "T not a multiple of the TP size, the counts are read", tokens=5, counts=True),
        Scenario("symbolic", "a graph for any T, T not a multiple of the TP size", tokens=5, symbolic=True),
        Scenario("symbolic_unequal", "a graph for any T, T differs between ranks", unequal=True, symbolic=True),
        Scenario("idle", "a rank has no token", unequal=True, idle=True, quantisations=_TWO, eps=(2, 4)),
        Scenario("quantised_input", "int8 tokens with a scale each", quantised=True, quantisations=("w8a8",), eps=(2,)),
        Scenario("weight_on_input", "top-1, the weight multiplies x", on_input=True, quantisations=_TWO, eps=(2,)),
        Scenario(
            "log2phy", "logical ids, the counts are read", logical=True, counts=True, quantisations=_TWO, eps=(2,)
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the matrix, by names; ``layout`` is "" where the weights are as the form wants them. ``unpermute_operator``: of
    the deployment."""

    form: str
    quantisation: str
    ep: int
    tp: int
    scenario: str
    layout: str = ""
    unpermute_operator: str = TOKEN_UNPERMUTE

    @property
    def case(self) -> str:
        """What the cell has beside its place in the table: the scenario, or the layout."""
        return self.layout or self.scenario

    @property
    def weights_are(self) -> Layout:
        """The layout of the weights."""
        return LAYOUTS[self.layout] if self.layout else FORMS[self.form].layout(self.quantisation)

    def __str__(self) -> str:
        layout = f" {self.layout}" if self.layout else ""
        operator = "" if self.unpermute_operator == TOKEN_UNPERMUTE else f" {self.unpermute_operator}"
        return f"{self.form} {self.quantisation} EP {self.ep} TP {self.tp} {self.scenario}{layout}{operator}"


def _ids(routing: str, group: int, tokens: int, top_k: int, generator: torch.Generator) -> Tensor:
    if routing == "even":
        first = (group * TOKENS + torch.arange(tokens)) * top_k
        ids = (first.unsqueeze(1) + torch.arange(top_k)) % EXPERTS
    elif routing == "skewed":
        ids = torch.arange(top_k).expand(tokens, top_k)
    else:
        allowed = torch.tensor([e for e in range(EXPERTS) if routing != "empty" or e % (EXPERTS // MOST_GROUPS)])
        ranked = torch.rand(tokens, len(allowed), generator=generator).argsort(1)
        ids = allowed[ranked[:, :top_k]]
    return ids.to(torch.int32).contiguous()


@functools.cache
def physical_experts() -> Tensor:
    """[E] int32: where each logical expert is; none stays in its place, and most go to another rank."""
    return ((torch.arange(EXPERTS) * 3 + 9) % EXPERTS).to(torch.int32)


@functools.cache
def token_bank() -> Tensor:
    """[24, H] tokens, six for each of up to four TP groups."""
    generator = torch.Generator().manual_seed(100)
    return torch.randn(MOST_GROUPS * TOKENS, HIDDEN, generator=generator).to(DTYPE)


@functools.cache
def expert_weights(quantisation: str) -> dict[str, Tensor]:
    """The weights of all experts as ``moe_experts`` takes them, by argument: each [E, ...]."""
    generator = torch.Generator().manual_seed(200)
    shapes = {"w13": (EXPERTS, HIDDEN, 2 * INTERMEDIATE), "w2": (EXPERTS, INTERMEDIATE, HIDDEN)}
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        # each expert has a size of its own, so that one's scales are wrong for another
        size = (1 + torch.arange(EXPERTS) / EXPERTS).view(-1, 1, 1) / shape[1] ** 0.5
        plain = torch.randn(shape, generator=generator).mul_(size)
        form = EXPERT_FORMATS[quantisation]
        if not form.quantised:
            weights[name] = plain.to(DTYPE)
            continue
        # the scales' dtypes are those of quantise_experts for a bfloat16 model
        halves = form.weight_only or ("bfloat16" in form.scale_dtypes and name == "w2")
        quantised = quantise_weight(plain, quantisation, scale_dtype=DTYPE if halves else None)
        weights[name] = quantised.weight
        for field in ("scale", "offset", "scale_bias"):
            if (values := getattr(quantised, field)) is not None:
                weights[f"{name}_{field}"] = values
    return weights
