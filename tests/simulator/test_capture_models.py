"""Four-layer transformers models as NPU graphs: all replays are equal to the lowered model without a graph, bit by bit,
and to the model's own experts on the CPU. Also ``moe-lowering lower --capture``.
"""

import json

import capture_models
import pytest
import torch
from capture_models import BUCKETS, EXPERTS, TOP_K, tokens

from moe_lowering import cli, simulator
from moe_lowering.cli.lower import early_refusal, graph_replay
from moe_lowering.cli.lower.graph_replay import Captured
from moe_lowering.simulator import device

REPLAYS = {"qwen3_moe": 200, "deepseek_v3": 40}  # a second model shows other operators, not more of the same replays
NEAR = 1e-4  # float32 over four layers, relative to the largest logit; measured below 1e-5


@pytest.fixture(scope="module", autouse=True)
def enabled():
    simulator.enable_device()


@pytest.fixture(autouse=True)
def constants():
    """Floats of a model are constants of its graph, not inputs on the host."""
    with torch._dynamo.config.patch(specialize_float=True), torch.no_grad():
        yield


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", capture_models.CONFIGS)
def test_all_replays_are_equal_to_eager_and_each_bucket_is_captured_once(name):
    replays = REPLAYS[name]
    pair, before, worst = capture_models.pair(name), device.counts(), 0.0
    routings, skewed, graphs = set(), 0, []
    for step in range(replays):
        ids = tokens(step, BUCKETS[step % len(BUCKETS)])
        found = pair.captured(ids.npu()).cpu()
        # the same compiled graph: one that was compiled to be run without is compared in the next test
        graphs = graphs or capture_models.graphs_of_this_process()
        with capture_models.without_graphs(graphs):
            eager = pair.captured(ids.npu()).cpu()
        assert torch.equal(found, eager), f"replay {step}"
        pair.chosen.clear()
        worst = max(worst, relative(found, pair.reference(ids, use_cache=False).logits))
        for chosen in pair.chosen:
            routings.add(tuple(chosen.flatten().tolist()))
            skewed += len(chosen.unique()) == TOP_K
    assert worst < NEAR
    counts, layers = device.counts() - before, capture_models.moe_layers(name)
    assert (counts.captured, counts.replayed) == (len(BUCKETS), replays)
    assert counts.begun == len(BUCKETS) + 1 == counts.captured + counts.empty
    assert len(pair.chosen) == layers and [len(report.blocks) for report in pair.lowering.reports] == [layers]
    assert len(routings) > replays * layers / 2
    assert skewed >= replays / 4 * layers and TOP_K < EXPERTS  # all tokens to two experts, six without rows
    for tape in device.tapes()[-len(BUCKETS) :]:
        assert sum(name == "npu::npu_moe_init_routing_v2" for name in tape.operators) == layers
        ours = {name for name in tape.operators if name.startswith("moe_lowering::")}
        assert ours <= {"moe_lowering::assert_tokens"}  # none of the generic operators


@pytest.mark.parametrize("name", capture_models.CONFIGS)
def test_all_defaults_of_npugraph_ex(name):
    """Its ``inplace_pass`` too, which the package turns off: right for a model that is given its attention mask. Its guards
    compare element counts, so that one graph need not serve all sizes; each size is captured once all the same."""
    pair, before = capture_models.pair(name, masked=True, layers=2, inplace_pass=True), device.counts()
    for step in range(9):
        ids = tokens(step, BUCKETS[step % len(BUCKETS)])
        found = pair.captured(ids.npu()).cpu()
        assert torch.equal(found, pair.eager(ids.npu()).cpu())
        assert relative(found, pair.reference(ids, use_cache=False).logits) < NEAR
    counts = device.counts() - before
    assert (counts.captured, counts.replayed) == (len(BUCKETS), 9)


def test_a_replay_that_leaves_out_one_operator_is_seen():
    """The twin: without one layer's combine, or with the inputs of the capture, replays differ."""
    pair = capture_models.pair("qwen3_moe", layers=2)
    first, second = tokens(0, 8).npu(), tokens(1, 8).npu()
    pair.captured(first)
    assert torch.equal(pair.captured(second), pair.eager(second))
    tape = device.tapes()[-1]
    place = tape.operators.index("npu::npu_moe_token_unpermute")
    entry = tape.entries.pop(place)
    assert not torch.equal(pair.captured(first), pair.eager(first))
    tape.entries.insert(place, entry)
    assert torch.equal(pair.captured(first), pair.eager(first))


# The command


def command(capfd, *given):
    capfd.readouterr()
    torch._dynamo.reset()
    code = cli.main(["lower", *given])
    printed = capfd.readouterr()
    return code, printed.out, printed.err


def test_the_command_reports_what_was_captured(capfd):
    given = "moe --tokens 4 --layers 2 --dynamic --capture --replays 3 --json"
    code, out, err = command(capfd, *given.split())
    assert code == 0, err
    found = json.loads(out)
    pool = found["captured"].pop("pool_bytes")
    # assert_tokens, init_routing, grouped_matmul, swiglu, grouped_matmul, cast of the weights, unpermute
    assert found["captured"] == {"captures": 2, "replays": 6, "operators_per_layer": 7}
    assert pool > 0 and pool % 512 == 0
    assert 0 < found["max_rel_error"] < 0.03


def test_the_report_for_people_and_a_transformers_model(capfd):
    code, out, err = command(capfd, "deepseek_v3", "--tokens", "4", "--capture", "--replays", "4")
    assert code == 0, err
    for part in ("captures          1 for 1 token count", "replays           4, each", "MoE layer         "):
        assert part in out
    assert "gave rows to 4 of 16 experts" in out.replace("\n", " ").replace("  ", "") or "to 4 of 16" in " ".join(
        out.split()
    )


def test_the_command_on_two_ranks(capfd):
    given = "moe --ep 2 --comm mc2 --tokens 4 --layers 1 --capture --replays 2 --json"
    code, out, err = command(capfd, *given.split())
    assert code == 0, err
    found = json.loads(out)
    assert [block["comm"] for block in found["blocks"]] == ["mc2"]
    assert found["captured"]["captures"] == 1 and found["captured"]["replays"] == 2


def test_the_command_captures_nothing_of_a_block_that_is_not_lowered(monkeypatch, capfd):
    """No evidence for operators that no device has: the reason, and exit code 1."""
    given = ["moe", "--comm", "mc2", "--tokens", "4", "--layers", "1", "--capture", "--replays", "2"]
    code, out, err = command(capfd, *given)  # the options say it already
    assert code == 1 and "layers.0 not lowered" in err and "not compared" in out and "captured" not in out
    monkeypatch.setattr(early_refusal, "find_early_refusal", lambda *_: None)
    code, out, err = command(capfd, *given)
    assert code == 1
    assert "layers.0 not lowered: mc2 was asked for and is not legal: [mc2.ep_size]" in err
    assert "nothing was captured: moe_lowering::route: has no kernel on a device" in err
    assert "not compared" in out and "operators on the tape" not in out
    code, out, err = command(capfd, *given, "--json")
    assert code == 1 and "moe_lowering::route" in err
    found = json.loads(out)
    assert found["captured"] is None and found["max_rel_error"] is None
    assert [block["comm"] for block in found["blocks"]] == [None]


def test_the_command_captures_nothing_of_a_module_that_it_does_not_know(capfd):
    code, out, err = command(capfd, *["nllb-moe", "--tokens", "4", "--layers", "1", "--capture", "--json"])
    assert code == 1 and "ffn.experts is not lowered: [experts.own_code]" in err and json.loads(out)["captured"] is None


def test_a_stale_replay_is_a_mismatch(monkeypatch, capfd):
    """Graphs that are not run leave what was there before."""

    def count_only(tape, first=0):
        tape.replays += 1
        return len(tape.entries)

    monkeypatch.setattr(device.Tape, "replay", count_only)
    code, out, err = command(capfd, "moe", "--tokens", "4", "--layers", "1", "--capture", "--replays", "2", "--json")
    assert code == 1 and "outputs differ" in err
    assert json.loads(out)["captured"]["replays"] == 2


def test_too_many_captures_and_calls_without_a_graph_are_problems():
    good = Captured(2, 2, 6, 6, 6, 512, 6, 4, 16)
    assert good.problems() == []
    assert "3 graphs captured for 2 token counts" in Captured(3, 2, 6, 6, 6, 512, 6, 4, 16).problems()[0]
    assert "5 replays in 6 calls" in Captured(2, 2, 5, 6, 6, 512, 6, 4, 16).problems()[0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--capture", "--fake"], "argument --capture: is given with --fake; accepted: without"),
        (["--replays", "3"], "argument --replays: is 3, and needs --capture"),
        (["--capture", "--replays", "0"], "argument --replays: is '0'; accepted: an integer from 1 to"),
    ],
)
def test_wrong_usage(given, says, capfd):
    code, out, err = command(capfd, "moe", *given)
    assert code == 2 and out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("moe-lowering: error: ")]
    assert says in line


def test_layers_are_told_apart_on_the_tape():
    """Runs of launches from the blocks' lines: what comes from other lines parts them, and is not counted."""
    block, other = device.SourceLine("model.py", 1, "f"), device.SourceLine("model.py", 2, "f")
    tape, sources = device.Tape(0, 0), graph_replay.Sources()
    sources.places.add(block)
    tape.entries = [
        device.Entry(name, lambda: None, 0, place, {})
        for name, place in (("a", block), ("b", block), ("c", other), ("d", None), ("e", block))
    ]
    assert graph_replay.layers_of(tape, sources) == [["a", "b"], ["e"]]
