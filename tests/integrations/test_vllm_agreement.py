"""Ranks of a vLLM engine compare which layers they have taken over, before their first forward: two real processes."""

import pytest
import rank_jobs
import torch.distributed as dist
import vllm_rank_jobs
from rank_pools import Ranks

from moe_lowering.agreement_rounds import Session
from moe_lowering.integrations import vllm_agreement
from moe_lowering.integrations.vllm_agreement import layer_differences

LAYER = "model.layers.0.mlp.experts"
WHY = "[vllm.weight_format] the memory format of the experts is nd; accepted: nz"
TAKEN, LEFT = ("on", {LAYER: ""}), ("on", {LAYER: WHY})


@pytest.fixture(scope="module")
def pair():
    with Ranks(2, setup=rank_jobs.setup, collective_timeout=20) as ranks:
        yield ranks


@pytest.mark.parametrize(
    ("ranks", "tokens"),
    [
        ({0: TAKEN, 1: TAKEN}, [4, 4]),
        ({0: LEFT, 1: ("on", {LAYER: "[vllm.lora] lora_config is given; accepted: none"})}, [3, 4]),
        ({0: ("off", {}), 1: LEFT}, [3, 4]),
        ({0: (None, {}), 1: ("off", {})}, [3, 4]),
    ],
    ids=["both", "neither", "one_is_off", "both_are_off"],
)
def test_ranks_that_agree_pad_alike(pair, ranks, tokens):
    assert pair.run(vllm_rank_jobs.load, ranks) == [(tokens, [])] * 2


@pytest.mark.parametrize(
    ("other", "state"),
    [
        (LEFT, f"it stays with vllm-ascend's operator, {WHY}"),
        (("off", {}), "the plugin is not switched on"),
        (("on", {}), "the plugin does not know it"),
        (("on", {LAYER: "", "model.layers.1.mlp.experts": WHY}), None),
    ],
    ids=["left", "off", "unknown", "another_layer_is_left"],
)
@pytest.mark.parametrize("first", [0, 1])
def test_a_layer_that_one_rank_took_over_alone_is_an_error_on_both(pair, first, other, state):
    """The rank that took it over ends; the other one says why in its log, as it waits for nobody."""
    mine = ("on", {LAYER: "", "model.layers.1.mlp.experts": ""}) if state is None else TAKEN
    answers = pair.run(vllm_rank_jobs.load, {first: mine, 1 - first: other})
    layer = LAYER if state else "model.layers.1.mlp.experts"
    states = [state or f"it stays with vllm-ascend's operator, {WHY}", "the plugin has taken it over"]
    one, zero = states if first == 0 else states[::-1]
    said = f"ranks disagree with rank 0:\n  rank 1: {layer}: {one}; on rank 0 {zero}"
    assert answers[first] == (said, [])
    assert answers[1 - first] in [(said, []), ([f"moe_lowering: {said}"], [f"moe_lowering: {said}"])]


def test_a_rank_that_does_not_answer(pair):
    """As one without the plugin: who took a layer over says so after the group's own time. Later they are in step again."""
    (waited, _), (late, _) = pair.run(vllm_rank_jobs.late, TAKEN, 1.0)
    assert waited.startswith("no answer from rank 1 of 2 within 1 s: the plugin is not loaded there"), waited
    assert late == f"this rank came too late, and has not run: the others gave up with: {waited}"
    assert pair.run(vllm_rank_jobs.load, {0: TAKEN, 1: TAKEN}) == [([4, 4], [])] * 2


def test_who_took_no_layer_over_waits_for_nobody(pair):
    """The twin: others may have no plugin, and need none."""
    (went_on, first), (_, second) = pair.run(vllm_rank_jobs.late_with_nothing, LEFT[1], 1.0)
    assert went_on and first == second == []
    assert pair.run(vllm_rank_jobs.load, {0: TAKEN, 1: TAKEN}) == [([4, 4], [])] * 2


def test_who_listens_ends_before_its_process(monkeypatch):
    """A thread within the store's library when a process ends would abort it."""
    store = dist.HashStore()  # a session does not keep it
    session = Session(store, [0, 1], 0)
    monkeypatch.setattr(vllm_agreement, "group_session", lambda group: (session, [0, 1], 1800.0))
    monkeypatch.setattr(vllm_agreement.atexit, "register", lambda *call: ends.append(call))
    ends = []
    thread = vllm_agreement.compare_layers("ep", {"layers.0": "why"}, True)
    assert thread.is_alive()
    for end, *arguments in ends:
        end(*arguments)
    assert not thread.is_alive()


@pytest.mark.parametrize(("layers", "counted"), [(3, []), (5, ["and 2 more layers"])])
def test_many_layers_that_differ_are_counted(layers, counted):
    taken = {"is_on": True, "layers": {f"{i}": "" for i in range(layers)}}
    left = {"is_on": True, "layers": dict.fromkeys(taken["layers"], WHY)}
    state = f"it stays with vllm-ascend's operator, {WHY}; on rank 0 the plugin has taken it over"
    assert layer_differences(taken, left, 0) == [f"{i}: {state}" for i in range(3)] + counted
    assert layer_differences(taken, taken, 0) == layer_differences(left, left, 0) == []
