"""A word that the code does not know is refused, by a code or by an error: never taken for another word.

Each vocabulary gets a word that nothing but the vocabulary knows, as a maintainer's first step would add it.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from graph_build import build, text
from graph_cases import BlockCase, GraphCase, RouteCase

from moe_lowering import Deployment, MoeLowering
from moe_lowering.custom_ops import fused, grouped_mlp, npu_grouped_mlp, quantised, route
from moe_lowering.custom_ops.grouped_mlp import GroupedMlpCall
from moe_lowering.limits import Prover, load
from moe_lowering.lookup import look_up
from moe_lowering.passes import find_blocks as find_blocks_module
from moe_lowering.passes import policy
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.costs.price import price_of
from moe_lowering.passes.emission.emitter import Emitter
from moe_lowering.passes.find_blocks import find_blocks
from moe_lowering.passes.implementations import IMPLEMENTATIONS, activation, quantised_mlp
from moe_lowering.passes.legality import judge
from moe_lowering.passes.operands import storage_format
from moe_lowering.passes.policy import Policy
from moe_lowering.passes.quantities import GROUP_SELECT_MODES, NORM_TYPES
from moe_lowering.prices.rates import rates_of
from moe_lowering.prices.rows import WORDS
from moe_lowering.vocabulary import (
    ACTIVATIONS,
    COMMS,
    EXPERT_FORMATS,
    FUSED_MODES,
    GUARDS,
    IMPLEMENTATION_FORMS,
    MODES,
    POLICIES,
    SOCS,
    UNPERMUTE_OPERATORS,
    WEIGHT_FORMATS,
    Activation,
)

WORD = "no_such_word"
CAPABLE = Deployment(
    ep_size=2, ep_rank=0, ep_group="ep", mc2_group="mc2", hccl_buffer_mb=4096, weight_format="nz", capture=False,
    providers=(("vllm_ascend", "0.23.0"),),
)  # fmt: skip
CASE = GraphCase(CAPABLE, (BlockCase(8, 2, 512),), hidden=1024, dtype=torch.bfloat16, symbolic=(False,))


def spec_of(case: GraphCase = CASE) -> BlockSpec:
    (block,), _, _ = find_blocks(build(case).gm.graph)
    return block.spec


def with_word(deployment: Deployment, **fields: Any) -> Deployment:
    """A deployment with words that its own check would refuse: as if that check had been widened, and nothing else."""
    copy = dataclasses.replace(deployment)
    for name, value in fields.items():
        object.__setattr__(copy, name, value)
    return copy


def codes(spec: BlockSpec, deployment: Deployment = CAPABLE) -> dict[str, set[str]]:
    verdicts = judge(spec, deployment, spec.tokens, Prover()).verdicts
    return {comm: {v.code for v in verdict.violations} for comm, verdict in verdicts.items()}


def test_the_case_is_legal_for_all() -> None:
    assert codes(spec_of()) == {comm: set() for comm in IMPLEMENTATIONS}


# --- activations ------------------------------------------------------------------------------------------------------


def test_every_activation_has_an_emitter() -> None:
    assert set(ACTIVATIONS) == activation.EMITTED
    assert {"none", *quantised_mlp.EMITTED} == set(EXPERT_FORMATS)
    assert grouped_mlp._COMPUTED == npu_grouped_mlp._COMPUTED == set(EXPERT_FORMATS)


@pytest.fixture
def reglu(monkeypatch: pytest.MonkeyPatch) -> str:
    """relu(gate) * up in the generic operator and its kernel, and nowhere else."""
    known = grouped_mlp._activated
    monkeypatch.setattr(grouped_mlp, "ACTIVATIONS", {**ACTIVATIONS, "reglu": Activation("reglu")})

    def gated(hidden: torch.Tensor, word: str, *rest: Any) -> torch.Tensor:
        if word != "reglu":
            return known(hidden, word, *rest)
        gate, up = hidden.float().chunk(2, dim=1)
        return gate.relu() * up

    monkeypatch.setattr(grouped_mlp, "_activated", gated)
    return "reglu"


@pytest.mark.parametrize("comm", [*IMPLEMENTATIONS])
@pytest.mark.parametrize("quantisation", EXPERT_FORMATS)
def test_an_activation_without_emitter_is_refused(reglu: str, comm: str, quantisation: str) -> None:
    block = BlockCase(8, 2, 512, activation=reglu, quantisation=quantisation)
    built = build(CASE.replace(blocks=(block,)))
    before = text(built.gm.graph)
    lowering = MoeLowering(CAPABLE, comm, policy="fixed")
    lowering(built.gm)
    (report,) = lowering.reports[-1].blocks
    found = {v.code for v in report.verdicts[comm].violations}
    fused = "fused.quantisation" if quantisation == "w4a16" else "fused.activation"
    assert (fused if comm == "fused_mc2" else "block.activation") in found
    assert report.comm is None and text(built.gm.graph) == before
    twin = dataclasses.replace(block, activation="swiglu")
    assert "block.activation" not in codes(spec_of(CASE.replace(blocks=(twin,))))[comm]


def test_and_emission_raises(reglu: str) -> None:
    built = build(CASE)
    (rows,) = (n for n in built.gm.graph.nodes if n.name == "w2_0")
    emit = Emitter(built.gm.graph, rows.meta["val"].fake_mode)
    with (
        emit.at(list(built.gm.graph.nodes)[-1], rows),
        pytest.raises(ValueError, match="activation is 'reglu'; accepted: "),
    ):
        activation.emit_activation(emit, rows, rows, dataclasses.replace(spec_of(), activation=reglu), "A3")


@pytest.mark.parametrize("word", ACTIVATIONS)
def test_kernels_know_their_words(word: str) -> None:
    limit = 1.0 if ACTIVATIONS[word].clamped else 0.0
    assert grouped_mlp.activate(
        torch.ones(2, 2 * ACTIVATIONS[word].parts), word, limit, 1.702, False, torch.float32
    ).shape == (2, 2)
    with pytest.raises(ValueError, match=f"activation is '{WORD}', which has no kernel"):
        grouped_mlp.activate(torch.ones(2, 4), WORD, limit, 1.702, False, torch.float32)


# --- quantisation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("comm", IMPLEMENTATIONS)
def test_a_quantisation_without_emitter_is_refused(comm: str) -> None:
    spec = dataclasses.replace(spec_of(), quantisation=WORD)
    assert codes(spec)[comm] == {"block.quantisation"}


# A maintainer's first step: a record, like that of a format that is known, and nothing else.
LIKE_OTHERS = [name for name, made in EXPERT_FORMATS.items() if made.quantised]


@pytest.fixture(params=LIKE_OTHERS)
def new_format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(EXPERT_FORMATS, WORD, dataclasses.replace(EXPERT_FORMATS[request.param], name=WORD))
    return WORD


@pytest.mark.parametrize("comm", IMPLEMENTATIONS)
def test_a_format_with_a_record_alone_is_refused(new_format: str, comm: str) -> None:
    spec = dataclasses.replace(spec_of(), quantisation=new_format)
    assert ("fused.quantisation" if comm == "fused_mc2" else "block.quantisation") in codes(spec)[comm]


def call_of_unknown_format() -> GroupedMlpCall[torch.Tensor]:
    nothing = torch.empty(0)
    return GroupedMlpCall(nothing, nothing, nothing, [], [], [], [], "swiglu", 0.0, 1.0, False, WORD)


def test_and_by_emitters_kernels_and_fused_operators(new_format: str) -> None:
    built, spec = build(CASE), dataclasses.replace(spec_of(), quantisation=new_format)
    (block,), _, _ = find_blocks(built.gm.graph)
    block = dataclasses.replace(block, spec=spec)
    with pytest.raises(ValueError, match=f"quantised_mlp: quantisation is '{WORD}'"):
        quantised_mlp.emit(None, block, block.dispatch, None, block.dispatch, CAPABLE)
    for gate in (npu_grouped_mlp.npu_grouped_mlp, grouped_mlp._cpu):
        with pytest.raises(ValueError, match=f"quantisation is '{WORD}'"), mock.patch.object(grouped_mlp, "_check"):
            gate(call_of_unknown_format())
    with pytest.raises(ValueError, match=f"quantisation is '{WORD}'"):
        fused.check_quantisation("operator", WORD)


def test_the_vocabulary_has_the_forms_of_each_implementation() -> None:
    for name, implementation in IMPLEMENTATIONS.items():
        deployments = (
            CAPABLE.replace(capture=capture, fused_mode=mode, providers=providers)
            for capture, mode in itertools.product((True, False), FUSED_MODES)
            for providers in (CAPABLE.providers, (("cann_ops_transformer", "9.2.0"),))
        )
        forms = {form.name for d in deployments for form in (*implementation.forms(d), *implementation.ruled_out(d))}
        assert forms == set(IMPLEMENTATION_FORMS[name])


WEIGHTS = ([torch.zeros(4, 1024, 64)], [torch.zeros(4, 32, 1024)])
QUANTISED_OPERATORS = sorted(
    name
    for name in dir(torch.ops.moe_lowering)
    for op in [getattr(getattr(torch.ops.moe_lowering, name), "default", None)]
    if isinstance(op, torch._ops.OpOverload) and "quantisation" in {a.name for a in op._schema.arguments}
)
GIVEN = {
    "x": torch.zeros(4, 1024, dtype=torch.bfloat16), "rows": torch.zeros(4, 1024), "row_scale": torch.zeros(0),
    "counts": torch.zeros(4, dtype=torch.int64), "ids": torch.zeros(4, 1, dtype=torch.int32), "weights": torch.zeros(4, 1),
    "w13": WEIGHTS[0], "w2": WEIGHTS[1], "w13_bias": [], "w2_bias": [], "activation": "swiglu", "limit": 0.0, "alpha": 1.702,
    "interleaved": False, "group": "g", "ep_group": "g", "ep_size": 2, "tp_size": 1, "tp_group": "", "num_experts": 8,
    "max_tokens": 8, "max_rows": 0, "max_output_size": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISED_OPERATORS)
def test_every_operator_refuses_an_unknown_quantisation(name: str) -> None:
    op = getattr(torch.ops.moe_lowering, name).default
    arguments = {
        a.name: GIVEN.get(a.name) for a in op._schema.arguments if a.name in GIVEN or not a.has_default_value()
    }
    with pytest.raises(ValueError, match=f"{name}: quantisation is '{WORD}'; accepted: "):
        op(**{**arguments, "quantisation": WORD})


def test_and_kernels_and_costs_raise() -> None:
    spec = dataclasses.replace(spec_of(), quantisation=WORD)
    with pytest.raises(ValueError, match=f"quantisation is '{WORD}'"):
        policy.load_of(spec, CAPABLE, 8)
    with pytest.raises(ValueError, match=f"quantisation is '{WORD}'"):
        npu_grouped_mlp.npu_grouped_mlp(call_of_unknown_format())
    assert quantised.WEIGHT_DTYPES.keys() == set(EXPERT_FORMATS) - {"none"}


# --- routing ----------------------------------------------------------------------------------------------------------


def test_the_router_s_words() -> None:
    assert set(route.SCORINGS) == NORM_TYPES.keys()
    assert set(route.GROUP_SCORES) == GROUP_SELECT_MODES.keys()
    with pytest.raises(ValueError, match=f"scoring is '{WORD}', which has no kernel"):
        route._score(torch.ones(1, 4), WORD)
    with pytest.raises(ValueError, match=f"group_score is '{WORD}', which has no kernel"):
        route._keep_best_groups(torch.ones(1, 4), 2, 1, WORD)


@pytest.mark.parametrize("field", ["scoring", "group_score"])
def test_a_routing_of_another_kind_is_left_alone(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    routed = BlockCase(8, 2, 512, route=RouteCase(num_groups=2))
    built = build(CASE.replace(blocks=(routed,)))
    name = {"scoring": "NORM_TYPES", "group_score": "GROUP_SELECT_MODES"}[field]
    monkeypatch.setattr(find_blocks_module, name, {WORD: 0})  # the word of the graph is one that the pass does not know
    lowering = MoeLowering(CAPABLE, "allgather")
    lowering(built.gm)
    (why,) = {why for _, why in lowering.reports[-1].unrecognised}
    assert why.startswith("[raise.unknown_word]") and WORD in why
    assert built.gm.graph.find_nodes(op="call_function", target=torch.ops.moe_lowering.route.default)


# --- deployments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "words"), [
    ("soc", SOCS), ("weight_format", WEIGHT_FORMATS), ("guards", GUARDS), ("mode", MODES),
    ("unpermute_operator", UNPERMUTE_OPERATORS),
])  # fmt: skip
def test_a_deployment_s_words(field: str, words: tuple[str, ...]) -> None:
    for word in words:
        assert getattr(Deployment(**{field: word}), field) == word
    with pytest.raises(ValueError, match=f"{field} is '{WORD}'; accepted: {', '.join(words)}"):
        Deployment(**{field: WORD})


@pytest.mark.parametrize(("field", "code"), [
    ("mode", "deployment.mode"), ("weight_format", "gmm.weight_format"), ("fused_mode", "fused.mode"),
])  # fmt: skip
def test_a_deployment_s_new_word_is_refused(field: str, code: str) -> None:
    """By a rule that lists what is known, for every implementation that reads the word."""
    found = codes(spec_of(), with_word(CAPABLE, **{field: WORD}))
    readers = {"fused_mode": ("fused_mc2",), "weight_format": ("allgather", "alltoall", "mc2")}.get(
        field, [*IMPLEMENTATIONS]
    )
    assert all(code in found[comm] for comm in readers), found
    assert field != "weight_format" or "fused.weight_format" in found["fused_mc2"]


def test_new_guards_forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not ``allow`` adds no guard."""
    case = CASE.replace(sizes="dynamic", symbolic=(True,), deployment=with_word(CAPABLE, guards=WORD))
    built = build(case)
    guards = len(built.env.guards) if built.env else 0
    MoeLowering(case.deployment, "mc2")(built.gm)
    assert built.env is not None and len(built.env.guards) == guards


def test_the_format_of_stored_weights_is_the_deployment_s_word() -> None:
    assert storage_format(WORD, frozenset({True})) == WORD
    assert WORD not in storage_format(WORD, frozenset({False}))


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "words"), [("comm", COMMS), ("name", POLICIES)])
def test_a_policy_s_words(field: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"'{WORD}'; accepted: {', '.join(words)}"):
        Policy(**{field: WORD})
    with pytest.raises(ValueError, match=f"'{WORD}'; accepted: vllm_ascend"):
        policy.vllm_choice(WORD, spec_of(), CAPABLE, 8)


@pytest.mark.parametrize("soc", SOCS)
def test_prices_know_every_soc_and_form(soc: str) -> None:
    rates, spec = rates_of(soc), dataclasses.replace(spec_of(), max_rows=64)
    assert rates.machine.memory > 0 and [what for what, _ in rates.laws] == list(WORDS)
    for name, forms in IMPLEMENTATION_FORMS.items():
        for form in forms:
            assert price_of(name, form, spec, pricing(form), 8, rates).ns > 0


def pricing(form: str) -> Deployment:
    """A deployment that has the form."""
    mode = 2 if form == "dispatch_gmm_combine_decode" else 1
    return CAPABLE.replace(
        fused_mode=mode, providers=(("vllm_ascend", "0.23.0"), ("cann_ops_transformer", "9.1.0")), installed=()
    )


def test_prices_refuse_other_words() -> None:
    with pytest.raises(ValueError, match=f"soc is '{WORD}'"):
        rates_of(WORD)
    with pytest.raises(ValueError, match=f"law is '{WORD}'"):
        rates_of("A3").law(WORD)


def test_look_up() -> None:
    assert look_up({"a": 1}, "a", "x: y") == 1
    with pytest.raises(ValueError, match=r"^x: y is 'b'; accepted: a, c$"):
        look_up({"a": 1, "c": 2}, "b", "x: y")


def test_rows_on_words_list_what_is_accepted() -> None:
    """A rule on a word that excludes some words would accept every new one."""
    words = {"activation", "quantisation", "mode", "weight_format", "comm_alg", "quant_mode", "form", "reduce_op"}
    loose = [row.code for row in load() if row.value.text in words and not row.one_of]
    assert loose == []
