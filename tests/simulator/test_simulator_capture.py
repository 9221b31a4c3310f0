"""NPU graph capture in the simulator: what is recorded, what a replay computes, and what a capture forbids."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._ops import HigherOrderOperator

from moe_lowering import simulator
from moe_lowering.simulator import device
from moe_lowering.simulator.device import CaptureError


@pytest.fixture(scope="module", autouse=True)
def enabled():
    simulator.enable_device()


def capture(function, *inputs, **options):
    """A graph of ``function(*inputs)``, and what it returned."""
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, **options):
        result = function(*inputs)
    return graph, result


# Recording and replaying


def test_a_capture_records_and_does_not_compute():
    x = torch.ones(3, 4, device="npu")
    before = device.counts()
    graph, (y, n) = capture(lambda: (torch.relu(x - 3) + 1, torch.ones(2, device="npu", dtype=torch.int32) * 3))
    assert y.isnan().all().item() and n.tolist() == [torch.iinfo(torch.int32).min] * 2
    tape = device.tape_of(graph)
    assert tape.operators == ["aten::sub.Tensor", "aten::relu", "aten::add.Tensor", "aten::ones", "aten::mul.Tensor"]
    assert all("test_simulator_capture.py" in entry.place.file for entry in tape.entries)
    assert device.counts() - before == device.Counts(begun=1, empty=0, captured=1, replayed=0)

    graph.replay()
    assert y.tolist() == [[1.0] * 4] * 3 and n.tolist() == [3, 3]
    assert device.counts() - before == device.Counts(begun=1, empty=0, captured=1, replayed=1)


def test_a_replay_reads_and_writes_fixed_addresses():
    x, state = torch.zeros(4, device="npu"), torch.zeros(4, device="npu")

    def step():
        state.add_(x)
        return state * 10

    graph, y = capture(step)
    address = y.data_ptr()
    for value in (1.0, 2.0, 3.0):
        x.fill_(value)
        graph.replay()
    assert state.tolist() == [6.0] * 4 and y.tolist() == [60.0] * 4 and y.data_ptr() == address
    x = torch.full((4,), 100.0, device="npu")  # another tensor: the graph does not know of it
    graph.replay()
    assert state.tolist() == [9.0] * 4


def test_memory_of_temporaries_is_used_again_within_a_graph():
    x = torch.ones(1 << 16, device="npu")

    def chain():
        y = x
        for _ in range(40):
            y = y * 1.5 - 0.5
        return y

    graph, y = capture(chain)
    graph.replay()
    assert y.unique().tolist() == [1.0]
    assert len(device.tape_of(graph).entries) == 80
    assert device.tape_of(graph).pool_bytes() <= 20 << 20  # 80 results of 256 KiB would need 20 MiB


def test_two_graphs_of_one_pool():
    x = torch.ones(8, device="npu")
    first, a = capture(lambda: x + 1)
    second, b = capture(lambda: x * 5, pool=first.pool())
    first.replay(), second.replay()
    assert (a.tolist(), b.tolist()) == ([2.0] * 8, [5.0] * 8)
    assert device.tape_of(first).pool == device.tape_of(second).pool
    assert device.tape_of(first).pool != device.tape_of(capture(lambda: x + 1)[0]).pool


def test_a_tape_goes_with_its_graph():
    graph, _ = capture(lambda: torch.ones(4, device="npu") + 1)
    tape = device.tape_of(graph)
    assert tape in device.tapes()
    graph.reset()
    gc.collect()
    assert tape not in device.tapes()


def test_constants_of_the_host_are_baked_in():
    """What is a number in the model; what the capture finds on the host is refused (FORBIDDEN)."""
    x, number = torch.ones(2, device="npu"), 3.0
    graph, y = capture(lambda: x * torch.tensor(number) + number)
    number = 7.0
    graph.replay()
    assert y.tolist() == [6.0, 6.0]


def test_an_operator_that_refuses_at_replay_is_named():
    x, i = torch.arange(4.0, device="npu"), torch.zeros(2, dtype=torch.int64, device="npu")
    graph, y = capture(lambda: x[i])
    graph.replay()
    i.fill_(9)
    with pytest.raises(device.ReplayError, match=r"aten::index.Tensor: failed when .*test_simulator_capture") as caught:
        graph.replay()
    assert caught.value.operator == "aten::index.Tensor"
    i.fill_(3)
    graph.replay()
    assert y.tolist() == [3.0, 3.0]


# Streams


def on_side_stream(join=True, fork=True):
    # torch_npu has 32 streams and gives them in turn; its own for captures may be any of them, two in a row differ
    x, own, side = torch.ones(4, device="npu"), torch.npu.Stream(), torch.npu.Stream()

    def work():
        main = torch.npu.current_stream()
        y = x + 1
        if fork:
            side.wait_stream(main)
        with torch.npu.stream(side):
            z = y * 3
        if join:
            main.wait_stream(side)
        return z

    return capture(work, stream=own)


def test_a_side_stream_joins_the_capture():
    graph, z = on_side_stream()
    graph.replay()
    assert z.tolist() == [6.0] * 4
    assert len(device.tape_of(graph).streams) == 2
    one, two = device.tape_of(graph).entries
    assert one.stream != two.stream


def test_a_side_stream_that_is_not_joined_back_is_refused():
    with pytest.raises(CaptureError, match=r"aten::mul.Tensor: its stream never joined"):
        on_side_stream(join=False)


@pytest.mark.parametrize("turn", range(32))
def test_a_stream_that_is_not_forked_is_refused(turn):
    """Whichever of torch_npu's streams it is."""
    with pytest.raises(CaptureError, match=r"aten::mul.Tensor: on a stream that is not part of the capture"):
        on_side_stream(fork=False)


def random_view(constant):
    """An element of a constant that becomes random after it was taken."""
    element = constant[0]
    constant.uniform_()
    return element


def random_out(constant):
    element = constant[0]
    torch.rand(3, out=constant)
    return element


def with_data(constant):
    constant.data = SCALAR
    return constant


# What a capture forbids. Each call works outside of one.

X, SCALAR = torch.arange(6.0), torch.tensor(2.0)
SECTIONS, SPLITS = torch.tensor(3), torch.tensor([2, 4])
PINNED: list[torch.Tensor] = []
LIBRARY = torch.library.Library("moe_lowering_capture", "FRAGMENT")
LIBRARY.define("scale_(Tensor(a!) x, Tensor by) -> ()")


@torch.library.impl(LIBRARY, "scale_", "CompositeExplicitAutograd")
def scale_(x, by):
    x.mul_(by)


def functional(x, by):
    """``scale_`` as a functional graph calls it: x stays as it was, and the result is a copy."""
    return auto_functionalized_v2(
        torch.ops.moe_lowering_capture.scale_.default, by=by, _x_base_index=0, _all_bases=[x]
    )[1]


class Opaque(HigherOrderOperator):
    """One without a kernel that calls other operators."""

    def __init__(self):
        super().__init__("moe_lowering_capture_opaque")
        self.fallthrough(torch._C.DispatchKey.AutogradPrivateUse1)
        self.py_impl(torch._C.DispatchKey.PrivateUse1)(lambda x: x + 1)

    def __call__(self, *args):
        return super().__call__(*args)


OPAQUE = Opaque()

FORBIDDEN = {
    "item": (lambda x: x.sum().item(), "aten::_local_scalar_dense"),
    "bool": (lambda x: bool(x[0] > 0), "aten::_local_scalar_dense"),
    "tolist": (lambda x: x.tolist(), "aten::copy_|aten::_local_scalar_dense"),
    "cpu": (lambda x: (x + 1).cpu(), "aten::copy_"),
    "from the host": (lambda x: x.copy_(X), "aten::copy_"),
    "to the device": (lambda x: X.npu(), "aten::copy_"),
    "nonzero": (lambda x: x.nonzero(), "aten::nonzero"),
    "masked_select": (lambda x: x.masked_select(x > 1), "aten::masked_select"),
    "index by mask": (lambda x: x[x > 1], "aten::index.Tensor|aten::nonzero"),
    "assign by mask": (lambda x: x.index_put_((x > 1,), x[0]), "aten::index_put_"),
    "unique": (lambda x: x.unique(), "aten::_unique2"),
    "repeat_interleave": (lambda x: x.repeat_interleave(x.long()), "aten::repeat_interleave"),
    "one_hot": (lambda x: F.one_hot(x.long()), "aten::one_hot|aten::_local_scalar_dense"),
    "equal": (lambda x: torch.equal(x, x), "aten::equal"),
    "host indices": (lambda x: x[torch.tensor([0, 1])], "aten::index.Tensor|aten::copy_"),
    "synchronize": (lambda x: torch.npu.synchronize(), "aclrtSynchronizeDevice"),
    "stream": (lambda x: torch.npu.current_stream().synchronize(), "aclrtSynchronizeStream"),
    "CPU operator": (lambda x: (X + 1).sum(), "aten::add.Tensor"),
    "scalar of the host": (lambda x: x * (SCALAR + 1), "aten::add.Tensor"),
    "value of the host": (lambda x: x * SCALAR, "aten::mul.Tensor: takes a value of the host"),
    "element of the host": (lambda x: x * X[1], "aten::mul.Tensor: takes a value of the host"),
    "value of the host in place": (lambda x: x.copy_(SCALAR), "aten::copy_: takes a value of the host"),
    "size of the host": (lambda x: x[: int(SECTIONS)], "aten::_local_scalar_dense"),
    "sections of the host": (
        lambda x: x.tensor_split(SECTIONS),
        "aten::tensor_split.tensor_indices_or_sections: reads",
    ),
    "splits of the host": (lambda x: torch.tensor_split(x, SPLITS), "aten::tensor_split.tensor_indices_or_sections"),
    "random scalar": (lambda x: x * torch.rand(()), "aten::mul.Tensor: takes a value of the host"),
    "random scalar in place": (lambda x: x * torch.ones(()).uniform_(), "aten::mul.Tensor: takes a value of the host"),
    "random scalar by a view": (
        lambda x: x * random_view(torch.ones(3)),
        "aten::mul.Tensor: takes a value of the host",
    ),
    "random scalar by out": (lambda x: x * random_out(torch.ones(3)), "aten::mul.Tensor: takes a value of the host"),
    "data of the host": (lambda x: x * with_data(torch.ones(())), "aten::mul.Tensor: takes a value of the host"),
    "random splits": (lambda x: x.tensor_split(torch.randint(6, (2,))), "aten::tensor_split"),
    "random on the CPU": (lambda x: x * (torch.rand(()) + 1), "aten::add.Tensor"),
    # kept, so that the allocator has none to give again: that would need no call of the runtime
    "pinned memory": (lambda x: PINNED.append(torch.empty(1 << 20).pin_memory()), "aclrtMallocHost|aten::"),
    "no npu kernel": (lambda x: torch.special.airy_ai(x), "aten::special_airy_ai"),
    "random": (lambda x: torch.rand_like(x), "aten::"),
    "functional call on the CPU": (lambda x: x + functional(X, X).npu(), "aten::"),
    "functional call with a value of the host": (lambda x: functional(x, SCALAR), "takes a value of the host"),
    "operator that cannot be watched": (lambda x: OPAQUE(x), "moe_lowering_capture_opaque: has no kernel that calls"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_a_capture_forbids(case):
    call, operator = FORBIDDEN[case]
    x = X.npu()
    call(x)
    with pytest.raises(CaptureError, match=operator) as caught:
        capture(call, x)
    assert caught.value.place is not None and caught.value.place.file == __file__
    graph, y = capture(lambda: x + 1)  # the next capture is not harmed
    graph.replay()
    assert torch.equal(y, x + 1)


ALLOWED = {
    "repeat_interleave of a known size": lambda x: x.repeat_interleave(torch.ones_like(x).long(), output_size=6),
    "one_hot of a known size": lambda x: F.one_hot(x.long(), 8),
    "where in place of a mask": lambda x: torch.where(x > 1, x, 0.0),
    "constants of the host": lambda x: x + torch.tensor(2.0),
    "host arithmetic on constants": lambda x: x + (torch.tensor(2.0) * 3).to(torch.float64),
    "constants of ones": lambda x: x * torch.ones(()),
    "an element set to a number": lambda x: x.clone().index_fill_(0, x.long()[:1], 5.0).add_(torch.tensor(1)),
    "splits that are constants": lambda x: x.tensor_split(torch.tensor([2, 4]))[1] + 1,
    "sections that are numbers": lambda x: x.tensor_split(3)[1] + 1,
    "allocation": lambda x: torch.empty(1 << 20, device="npu").fill_(1)[:6] + x,
    "functional call": lambda x: functional(x, x) + x,
    "copies on the device": lambda x: torch.empty_like(x).copy_(x).half(),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_a_capture_allows(case):
    x = X.npu()
    graph, y = capture(ALLOWED[case], x)
    x.copy_(X.flip(0))
    graph.replay()
    assert torch.equal(y, ALLOWED[case](x))


def test_a_caught_error_still_spoils_the_capture():
    x, graph = X.npu(), torch.npu.NPUGraph()

    def careless():
        try:
            x.sum().item()
        except CaptureError:
            return x + 1

    with pytest.raises(CaptureError, match="_local_scalar_dense"), torch.npu.graph(graph):
        careless()
    with pytest.raises(CaptureError, match="_local_scalar_dense"):
        graph.replay()


def test_an_error_of_the_model_ends_the_capture():
    x = X.npu()

    def broken():
        raise KeyError(str(x + 1 is None))

    with pytest.raises(KeyError):
        capture(broken)
    assert not device.is_capturing()
    graph, y = capture(lambda: x + 1)
    graph.replay()
    assert torch.equal(y, x + 1)
