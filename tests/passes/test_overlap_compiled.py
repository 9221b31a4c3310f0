"""Shared experts on a side stream through npugraph_ex: numbers, ranks, captures, compile caches.

What is moved and what is not: test_overlap.py.
"""

import gc

import overlap_layers as layers
import pytest
import reference
import torch
from overlap_layers import MOVED, Layer, big, without
from rank_pools import Ranks

from moe_lowering import Deployment, MoeLowering, npugraph_ex_options, simulator
from moe_lowering.backends.cache_key import cache_digest
from moe_lowering.integrations import transformers as integration

# Numbers


def through_npugraph_ex(module, lowering, **options):
    torch._dynamo.reset()
    options = npugraph_ex_options(lowering.deployment, lowering=lowering, **options)
    return torch.compile(module, backend="npugraph_ex", fullgraph=True, options=options)


def both(module, *args, **options):
    """(result in plain order, result with overlap, notes) of a module through npugraph_ex."""
    results = []
    for flag in (False, True):
        lowering = MoeLowering(Deployment(), "allgather", strict=True, overlap=flag)
        with torch.no_grad():
            results.append(through_npugraph_ex(module, lowering, **options)(*args))
    return *results, [block.notes[-1] for block in lowering.reports[-1].blocks]


@pytest.mark.parametrize("inplace_pass", [False, True])
def test_two_layers_on_one_rank(inplace_pass):
    module, x = torch.nn.Sequential(Layer(), Layer()), torch.randn(9, 64)
    plain, overlapped, notes = both(module, x, force_eager=True, inplace_pass=inplace_pass)
    assert torch.equal(plain, overlapped)
    assert all("overlaps" in note for note in notes) and len(notes) == 2
    with torch.no_grad():
        expected = module[1].expected(module[0].expected(x).float())
    reference.assert_near(overlapped, expected, torch.float32)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_transformers(family):
    from test_transformers import make

    integration.register()
    model = make(family, decoder_sparse_step=1) if family == "qwen2_moe" else make(family)
    model.set_experts_implementation("moe_lowering")
    ids = torch.randint(1, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    plain, overlapped, notes = both(lambda i: model(i, use_cache=False).logits, ids, force_eager=True)
    assert notes and all("overlaps" in note for note in notes)
    assert torch.equal(plain, overlapped)


@pytest.fixture(scope="module")
def pair():
    import rank_jobs

    with Ranks(2, setup=rank_jobs.setup, collective_timeout=60) as ranks:
        yield ranks


@pytest.mark.parametrize("comm", ["mc2", "allgather", "alltoall"])
def test_two_ranks(pair, comm):
    plain = pair.run(layers.lower_and_run, comm, False)
    overlapped = pair.run(layers.lower_and_run, comm, True)
    whole = big()
    for rank in range(2):
        y, notes, moved, errors = overlapped[rank]
        assert "overlaps" in notes[-1] and moved == [MOVED] and errors == []
        assert plain[rank][2] == [] and torch.equal(y, plain[rank][0])
        with torch.no_grad():
            reference.assert_near(y, whole.expected(layers.tokens(rank)), torch.bfloat16)


# Captured on device npu


def capture(join=None, drop=None, replays=2):
    """Two layers captured with npugraph_ex's default options, compared with no graph; the races and the streams.

    ``drop``: (operator, number) of a node to take out behind the pass's back.
    """
    simulator.enable_device()

    def sabotage(gm, *_):
        if drop is not None:
            without(*drop, gm.graph)
            gm.recompile()

    gc.collect()
    module = torch.nn.Sequential(Layer(join=join), Layer(join=join)).to("npu")
    lowering = MoeLowering(Deployment(), "allgather", strict=True, overlap=True)
    compiled = through_npugraph_ex(module, lowering, post_grad_custom_post_pass=sabotage)
    with layers.watched_capture() as launches, torch.no_grad():
        for step in range(replays):
            x = torch.randn(40, 64, generator=torch.Generator().manual_seed(step)).npu()
            torch.testing.assert_close(compiled(x), module(x))
    assert simulator.device.tapes()[-1].replays >= replays
    return layers.races(launches), {stream for _, stream, *_ in launches}


def test_captured_streams_are_ordered():
    races, streams = capture()
    assert len(streams) == 2 and races == []


@pytest.mark.parametrize("drop", [
    ("tagged_event_wait", 0), ("tagged_event_wait", 1), ("tagged_event_wait", 2), ("keep_alive", 0),
], ids=lambda d: f"{d[0]}-{d[1]}")  # fmt: skip
def test_a_capture_without_one_of_them_has_a_race(drop):
    races, _ = capture(drop=drop)
    assert races


# Settings


def test_options_and_cache_key():
    where = Deployment()
    on, off = (MoeLowering(where, overlap=flag) for flag in (True, False))
    assert cache_digest(on) != cache_digest(off)
    hook = npugraph_ex_options(where, overlap=True)["post_grad_custom_pre_pass"]
    assert cache_digest(on) in hook.__code__.co_consts
    with pytest.raises(ValueError, match="give either lowering, or comm, strict, policy and overlap"):
        npugraph_ex_options(where, lowering=on, overlap=True)


def test_a_graph_from_the_compile_cache_makes_its_own_events(tmp_path):
    from npugraph_ex._acl_concrete_graph import graph_pass
    from torch.npu.npugraph_ex.inference import cache_compile

    module, x = Layer(), torch.randn(5, 64)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = module

        def forward(self, x):
            return self.layer(x)

    lowerings, results = [], []
    for _ in range(2):
        lowerings.append(MoeLowering(Deployment(), "allgather", overlap=True))
        options = npugraph_ex_options(Deployment(), lowering=lowerings[-1], force_eager=True)
        model = Model()
        torch._dynamo.reset()
        graph_pass._GLOBAL_SCOPE_TAG_TO_EVENT.clear()  # as in another process
        with torch.no_grad():
            results.append(cache_compile(model.forward, cache_dir=str(tmp_path), options=options)(x))
        assert any(name.startswith("moe_lowering_") for name in graph_pass._GLOBAL_SCOPE_TAG_TO_EVENT)
    assert [len(lowering.reports) for lowering in lowerings] == [1, 0]
    assert torch.equal(*results)
    reference.assert_near(results[0], module.expected(x), torch.float32)
