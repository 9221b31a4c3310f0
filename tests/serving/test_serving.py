"""moe_lowering.serving against generation of one request at a time, without cache, graph, padding and our operators."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import random
import threading
from pathlib import Path

import pytest
import torch
from serving_models import TOP_K, VOCABULARY, make, small
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lowering import simulator
from moe_lowering.integrations.transformers import register
from moe_lowering.serving import RecompileError, Request, Server, steps
from moe_lowering.simulator import device


@pytest.fixture(scope="module", autouse=True)
def enabled():
    simulator.enable_device()
    register()


def requests(count, seed=0, prompt=12, new=6):
    draw = random.Random(seed)
    return [
        Request([draw.randrange(VOCABULARY) for _ in range(draw.randint(1, prompt))], draw.randint(1, new))
        for _ in range(count)
    ]


def one_at_a_time(model):
    """The new tokens of a request, by transformers' own experts on CPU; every step computes the whole sequence."""
    reference = type(model)(copy.deepcopy(model.config))
    reference.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    reference.eval().set_experts_implementation("eager")

    def generate(request):
        ids = torch.tensor([request.prompt])
        with torch.no_grad():
            for _ in range(request.max_new_tokens):
                ids = torch.cat([ids, reference(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        return ids[0, len(request.prompt) :].tolist()

    return generate


class Loads(TorchDispatchMode):
    """Rows that each grouped matmul is given for its experts, also when a tape is replayed."""

    def __init__(self):
        super().__init__()
        self.rows = []

    @classmethod
    def is_infra_mode(cls):
        return True  # dynamo need not care

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "npu::npu_grouped_matmul":
            self.rows.append(int(kwargs["group_list"].sum()))
        return func(*args, **(kwargs or {}))


@functools.cache
def on_device():
    """A server on device npu with its defaults, warmed up; what the stand-in counted meanwhile, and the progress."""
    before, lines = device.counts(), []
    server = Server(make(where="npu"), buckets=(1, 2, 4, 8), max_length=20, prefill_lengths=(5, 20))
    server.warm_up(lines.append)
    server.warm_up(lines.append)  # a second time does nothing
    return server, device.counts() - before, lines


def memory():
    gc.collect()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    return tensors, torch.npu.memory_allocated(), len(device.tapes()), [tape.pool_bytes() for tape in device.tapes()]


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_warm_up_captures_each_bucket_once():
    server, counts, lines = on_device()
    assert counts.captured == server.statistics.captures == len(server.buckets)
    assert server.statistics.graphs == len(server.buckets) + len(server.prefill_lengths) == len(lines)
    assert lines[0].startswith("warm-up 1 of 6: prefill of up to 20 tokens, ")
    assert lines[-1].startswith("warm-up 6 of 6: decode of up to 1 requests, ")
    pools = {tuple(tape.pool) for tape in device.tapes()[-len(server.buckets) :]}
    assert len(pools) == 1  # the buckets share their memory
    for lowering, graphs in ((server.lowering, 4), (server.prefill_lowering, 2)):
        assert [[block.comm for block in report.blocks] for report in lowering.reports] == [["allgather"] * 2] * graphs


def test_500_requests():
    """Requests of random lengths arrive between steps in groups of random size, and join the batch that is running."""
    server, _, _ = on_device()
    before, already = device.counts(), dataclasses.replace(server.statistics)
    waiting, found, numbers, state = requests(500), {}, {}, None
    draw = random.Random(1)
    submitted = iter(waiting)
    batches = set()
    while len(found) < len(waiting):
        for request in itertools.islice(submitted, draw.randint(0, 7)):
            numbers[server.submit(request)] = request
        found.update({result.number: result for result in server.step()})
        batches.add(len(server._rows))
        if len(found) >= 100 and state is None:
            state, bytes_then = memory(), resident()
    tensors, *device_memory = memory()
    assert tensors <= state[0] and device_memory == [*state[1:]]  # fewer where an earlier test's were let go meanwhile
    assert resident() - bytes_then < 16 * 2**20
    counts, steps_of = device.counts() - before, server.statistics.steps
    assert (counts.begun, counts.captured) == (0, 0) and counts.replayed == sum(steps_of.values())
    assert sorted(steps_of) == [1, 2, 4, 8] and batches == set(range(9))
    statistics = server.statistics
    assert statistics.recompiles == 0 and statistics.captures == 4 and statistics.requests == 500
    assert statistics.prefill_tokens == sum(len(r.prompt) for r in waiting)
    assert statistics.real_tokens == sum(r.max_new_tokens - 1 for r in waiting)
    assert statistics.real_tokens + statistics.padded_tokens == sum(b * n for b, n in steps_of.items())
    assert statistics.replays - already.replays == counts.replayed
    expected = one_at_a_time(server.model)
    assert {n: result.tokens for n, result in found.items()} == {n: expected(r) for n, r in numbers.items()}


def test_padding_loads_no_expert():
    """Three requests in the bucket of four: the experts see three tokens; in the twin, without a mask, four."""
    server, _, _ = on_device()
    with Loads() as loads:
        server.generate([Request([1, 2, 3], 2), Request([4], 2), Request([5, 6], 2)])
    prompts = [3, 1, 2]  # padded to 5: two projections in each of two layers
    assert loads.rows == [n * TOP_K for n in prompts for _ in range(4)] + [3 * TOP_K] * 4
    assert server.statistics.padded_tokens > 0 and server.statistics.prefill_padding > 0


@pytest.mark.parametrize("masked", [True, False])
def test_without_the_mask_padding_loads_experts(masked, monkeypatch):
    if not masked:
        monkeypatch.setattr(steps, "token_mask", lambda mask: contextlib.nullcontext())
    server = small(make(), buckets=(4,))
    server.warm_up()
    with Loads() as loads:
        server.generate([Request([1, 2, 3], 2)])
    assert loads.rows[-4:] == [(1 if masked else 4) * TOP_K] * 4


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_other_models(family):
    """Keys and values of different sizes; a window that is as long as the requests. Eager attention."""
    model = make(family, "eager", sliding_window=16)
    server = small(model, buckets=(3,), prefill_lengths=(16,))
    server.warm_up()
    wanted, expected = requests(8, prompt=9), one_at_a_time(model)
    found = server.generate(wanted)
    assert [result.tokens for result in found] == [expected(request) for request in wanted]
    assert [result.finish for result in found] == ["length"] * 8 and server.statistics.recompiles == 0


def test_stop_tokens():
    model = make()
    server = small(model)
    server.warm_up()
    tokens = one_at_a_time(model)(Request([3, 1, 4], 6))
    stop = next(i for i, token in enumerate(tokens) if i and token not in tokens[:i])
    for at in (0, stop):  # by prefill, by a decode step
        (result,) = server.generate([Request([3, 1, 4], 6, stop_tokens=[tokens[at]])])
        assert (result.tokens, result.finish) == (tokens[: at + 1], "stop")
    assert server.generate([]) == []


def test_a_step_that_would_recompile_raises():
    model = make()
    server = small(model)
    server.warm_up()
    server.generate(requests(2))
    server.submit(Request([1], 3))
    model.set_experts_implementation("eager")
    with pytest.raises(RecompileError, match="bucket 2 does not fit its graph after warm-up") as caught:
        server.step()
    assert "guard failure" in str(caught.value) and "dropped the graph" not in str(caught.value)
    torch._dynamo.reset()
    with pytest.raises(RecompileError, match="dynamo has dropped the graph"):
        server.step()


def test_settings_of_the_process_may_change_after_warm_up():
    """Dynamo guards on each of them; the twin, compiled alike and called without the server, would compile again."""
    server = small(make(), prefill_lengths=(16,))
    server.warm_up()
    wanted, threads = requests(2), torch.get_num_threads()
    expected = [result.tokens for result in server.generate(wanted)]

    def assert_it_runs():
        assert [result.tokens for result in server.generate(wanted)] == expected
        with pytest.raises(RecompileError, match="does not fit its graph after warm-up"):
            server._graphs.first_token([1], row=0)

    for read, write, other in (
        (torch.get_num_threads, torch.set_num_threads, threads + 1),
        (torch.get_default_dtype, torch.set_default_dtype, torch.float64),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
        (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, False),
    ):
        before = read()
        write(other)
        try:
            assert_it_runs()
            assert read() == other
        finally:
            write(before)
    with torch.autocast("cpu", torch.bfloat16):
        assert_it_runs()
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        assert_it_runs()
        assert torch.is_inference_mode_enabled()
    with torch.enable_grad():
        assert [result.tokens for result in server.generate(wanted)] == expected and torch.is_grad_enabled()


def test_an_error_inside_a_step_loses_no_request():
    """The second of three prefills fails once: the first, which had finished, and the others are answered all the same."""
    server = small(make(), prefill_lengths=())
    server.warm_up()
    wanted = [Request([1, 2, 3], 1), Request([4, 5], 2), Request([6], 1)]
    expected = [result.tokens for result in server.generate(wanted)]
    prefill, calls = server._graphs.eager_prefill, []

    def fails_once(*given):
        calls.append(given)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return prefill(*given)

    server._graphs.eager_prefill = fails_once
    numbers = [server.submit(request) for request in wanted]
    with pytest.raises(RuntimeError, match="out of memory"):
        server.step()
    found = {}
    for _ in range(4):
        found.update({result.number: result.tokens for result in server.step()})
    assert [found[number] for number in numbers] == expected
    assert server.statistics.requests == 6


@pytest.mark.parametrize("when", ["waiting", "running"])
def test_a_cancelled_request_leaves_the_others_as_they_are(when):
    """Of four requests on two rows the one in the first row, or one that waits, is cancelled."""
    server = small(make())
    server.warm_up()
    wanted = requests(4, seed=3, new=1)
    wanted = [Request(request.prompt, 4) for request in wanted]
    expected = [result.tokens for result in server.generate(wanted)]
    numbers = [server.submit(request) for request in wanted]
    assert server.step() == []
    gone = {"waiting": 3, "running": 0}[when]
    cancelled = server.cancel(numbers[gone])
    assert (cancelled.number, cancelled.finish) == (numbers[gone], "cancelled")
    assert cancelled.tokens == {"waiting": [], "running": expected[0][:2]}[when]
    found = {}
    for _ in range(12):
        found.update({result.number: result.tokens for result in server.step()})
    assert found == {number: expected[i] for i, number in enumerate(numbers) if i != gone}
    assert (server.statistics.requests, server.statistics.cancelled) == (7, 1)
    for number in (numbers[gone], numbers[1], 99, None):  # cancelled, finished, never there
        with pytest.raises(ValueError, match=rf"cancel: number is {number}; accepted: .* one of \[\]"):
            server.cancel(number)


def test_two_threads_are_told_so():
    """While one thread is in a step, every call but submit is refused and changes nothing; what was submitted is kept."""
    server = small(make())
    server.warm_up()
    request = Request([1, 2, 3], 2)
    (expected,) = server.generate([request])
    entered, leave = threading.Event(), threading.Event()
    prefill = server._graphs.eager_prefill

    def slow(*given):
        entered.set()
        assert leave.wait(60)
        return prefill(*given)

    server._graphs.eager_prefill = slow
    with concurrent.futures.ThreadPoolExecutor() as pool:
        other = pool.submit(server.generate, [request])
        assert entered.wait(60)
        calls = {
            "step": server.step,
            "generate": lambda: server.generate([request]),
            "warm_up": server.warm_up,
            "cancel": lambda: server.cancel(1),
        }
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=f"Server: {name} while another call is in generate; accepted: one"):
                call()
        late = server.submit(request)
        leave.set()
        assert other.result(60)[0].tokens == expected.tokens
    found = [result for _ in range(3) for result in server.step()]
    assert [(result.number, result.tokens) for result in found] == [(late, expected.tokens)]
    assert server.statistics.requests == 3


def test_a_step_that_captures_again_raises():
    model = make(where="npu")
    server = Server(model, buckets=(1,), max_length=16, prefill_lengths=())
    server.warm_up()
    assert len(server.generate(requests(2))) == 2
    norm = model.model.norm.weight
    old, norm.data = norm.data, norm.data.clone()
    with pytest.raises(RecompileError, match="bucket 1 was captured again after warm-up"):
        server.generate([Request([1], 3)])
    del old
