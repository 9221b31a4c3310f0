"""The guards of a capture in the stand-in runtime, one by one: each call spoils the capture, and is harmless outside of one.

Through torch_npu where a public call reaches the function, else on the stand-in library itself, as torch_npu's C++ would.
"""

import ctypes

import pytest
import torch

from moe_lowering import simulator
from moe_lowering.simulator import device
from moe_lowering.simulator.device import CaptureError

DEVICE_TO_HOST, BYTES = 2, 512
EVENTS, STREAMS = 4096, 64  # of one capture, capture.c


@pytest.fixture(scope="module", autouse=True)
def enabled():
    simulator.enable_device()


@pytest.fixture(scope="module")
def acl():
    return ctypes.CDLL("libascendcl.so")  # loaded already: matched by soname


def pointer(value=0):
    return ctypes.c_void_p(value)


def stream():
    return pointer(torch.npu.current_stream().npu_stream)


def capture(function, **options):
    """A graph of ``function()``."""
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, **options):
        result = function()
    return graph, result


def recorded_event():
    event = torch.npu.Event()
    event.record()
    return event


def free(acl):
    block = pointer()
    assert acl.aclrtMalloc(ctypes.byref(block), ctypes.c_size_t(BYTES), 0) == 0
    return acl.aclrtFree(block)


def malloc_host(acl):
    return acl.aclrtMallocHost(ctypes.byref(pointer()), ctypes.c_size_t(BYTES))


def copy(name, kind, *more):
    kept = ctypes.create_string_buffer(BYTES), ctypes.create_string_buffer(b"\x07" * BYTES, BYTES)

    def call(acl):
        to, source = (pointer(ctypes.addressof(buffer)) for buffer in kept)
        size = ctypes.c_size_t(BYTES)
        return getattr(acl, name)(to, size, source, size, kind, *(make() for make in more))

    return call


def fill(name, *more):
    kept = ctypes.create_string_buffer(BYTES)

    def call(acl):
        size = ctypes.c_size_t(BYTES)
        return getattr(acl, name)(pointer(ctypes.addressof(kept)), size, 3, size, *(make() for make in more))

    return call


def status(name, handle):
    def call(acl):
        return getattr(acl, name)(pointer(handle()), ctypes.byref(ctypes.c_int()))

    return call


# function of the runtime: a call of it. torch_npu raises for the public ones; the others return ACL's code.
PUBLIC = {
    "aclrtSynchronizeDeviceWithTimeout": lambda: torch.npu.synchronize(),
    "aclrtSynchronizeStreamWithTimeout": lambda: torch.npu.current_stream().synchronize(),
    "aclrtSynchronizeEvent": lambda: recorded_event().synchronize(),
    "aclrtStreamQuery": lambda: torch.npu.current_stream().query(),
    "aclrtQueryEventStatus": lambda: recorded_event().query(),
}
FAIL = {
    "aclrtSynchronizeDevice": lambda acl: acl.aclrtSynchronizeDevice(),
    "aclrtSynchronizeStream": lambda acl: acl.aclrtSynchronizeStream(stream()),
    "aclrtMemcpy": copy("aclrtMemcpy", DEVICE_TO_HOST),
    "aclrtMemcpyAsync": copy("aclrtMemcpyAsync", DEVICE_TO_HOST, stream),
    "aclrtMemset": fill("aclrtMemset"),
    "aclrtMemsetAsync": fill("aclrtMemsetAsync", stream),
    "aclrtQueryEventWaitStatus": status("aclrtQueryEventWaitStatus", lambda: recorded_event().npu_event),
}
SPOIL = {"aclrtFree": free, "aclrtMallocHost": malloc_host}  # torch_npu does not expect these to fail: they do not
RELAXED = {**SPOIL, "aclrtStreamQuery": status("aclrtStreamQuery", lambda: torch.npu.default_stream().npu_stream)}


def assert_refused(error, function, line):
    """The function, and the line of the model, in the error that ends the capture."""
    assert error.operator == function
    assert (error.place.file, error.place.line) == (__file__, line)
    assert function in str(error) and f"{__file__}:{line}" in str(error)


def assert_not_harmed():
    x = torch.arange(6.0).npu()
    assert not device.is_capturing()
    graph, y = capture(lambda: x + 1)
    graph.replay()
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("function", PUBLIC)
def test_public_calls(function):
    call = PUBLIC[function]
    call()
    with pytest.raises(CaptureError) as caught:
        capture(call)
    assert_refused(caught.value, function, call.__code__.co_firstlineno)
    assert_not_harmed()


@pytest.mark.parametrize("function", PUBLIC)
def test_public_calls_raise_at_once(function):
    reached = []

    def model():
        try:
            PUBLIC[function]()
        except RuntimeError as error:
            assert f"{function}: not allowed while an NPU graph is captured" in str(error)
            raise
        reached.append(function)

    with pytest.raises(CaptureError, match=function):
        capture(model)
    assert reached == []


@pytest.mark.parametrize("function", [*FAIL, *SPOIL])
def test_calls_of_the_runtime(acl, function):
    call = {**FAIL, **SPOIL}[function]
    assert call(acl) == 0
    codes = []

    def model():
        codes.append(call(acl))

    with pytest.raises(CaptureError, match=f"^{function}: not allowed") as caught:
        capture(model)
    assert (codes[0] != 0) == (function in FAIL)
    assert caught.value.place.file == __file__
    assert_not_harmed()


def test_a_refused_copy_does_not_copy(acl):
    source, to = ctypes.create_string_buffer(b"\x07" * BYTES, BYTES), ctypes.create_string_buffer(BYTES)
    size = ctypes.c_size_t(BYTES)
    given = pointer(ctypes.addressof(to)), size, pointer(ctypes.addressof(source)), size, DEVICE_TO_HOST
    with pytest.raises(CaptureError, match="aclrtMemcpyAsync"):
        capture(lambda: acl.aclrtMemcpyAsync(*given, stream()))
    assert to.raw == b"\x00" * BYTES
    assert acl.aclrtMemcpyAsync(*given, stream()) == 0 and to.raw == source.raw


@pytest.mark.parametrize("function", RELAXED)
def test_a_relaxed_capture_allows_what_waits_for_nothing(acl, function):
    x = torch.arange(6.0).npu()

    def model():
        assert RELAXED[function](acl) == 0
        return x + 1

    graph, y = capture(model, capture_error_mode="relaxed")
    graph.replay()
    assert torch.equal(y, x + 1)
    with pytest.raises(CaptureError, match=function):
        capture(model)


@pytest.mark.parametrize("function", PUBLIC)
def test_a_relaxed_capture_forbids_the_rest(function):
    with pytest.raises(CaptureError, match=function):
        capture(PUBLIC[function], capture_error_mode="relaxed")


# Graphs inside of a capture


def test_a_replay_inside_a_capture_is_refused():
    """It would be missing from the graph: z would keep what the first graph left at the capture."""
    x = torch.full((6,), 5.0, device="npu")
    first, y = capture(lambda: x + 1)
    first.replay()
    before = device.counts()

    def model():
        first.replay()  # planted
        return y * 2

    graph = torch.npu.NPUGraph()
    with pytest.raises(CaptureError) as caught, torch.npu.graph(graph):
        model()
    assert_refused(caught.value, "aclmdlRIExecuteAsync", model.__code__.co_firstlineno + 1)
    assert (device.counts() - before).replayed == 0
    with pytest.raises(CaptureError, match="aclmdlRIExecuteAsync"):
        graph.replay()
    x.fill_(7.0)
    first.replay()
    assert y.tolist() == [8.0] * 6
    assert_not_harmed()


def test_a_caught_refusal_of_a_replay_still_spoils_the_capture():
    x = torch.arange(6.0).npu()
    first, y = capture(lambda: x + 1)

    caught = []

    def model():
        try:
            first.replay()
        except RuntimeError as error:
            caught.append(error)
        return y * 2

    with pytest.raises(CaptureError, match="aclmdlRIExecuteAsync"):
        capture(model)
    assert [type(error) for error in caught] == [CaptureError]


def test_a_replay_on_a_stream_beside_the_capture_is_refused():
    x = torch.arange(6.0).npu()
    first, _ = capture(lambda: x + 1)
    side = torch.npu.Stream()

    def model():
        with torch.npu.stream(side):
            first.replay()

    with pytest.raises(CaptureError, match="aclmdlRIExecuteAsync: replays a graph inside a capture"):
        capture(model)
    assert_not_harmed()


def test_a_compiled_model_inside_a_capture_is_refused():
    """npugraph_ex captures at the first call and replays later: neither can be inside a capture by hand."""
    torch._dynamo.reset()
    x = torch.arange(6.0).npu()
    fast = torch.compile(lambda x: x * 2 + 1, backend="npugraph_ex", fullgraph=True)
    with pytest.raises(CaptureError, match="aclmdlRICaptureBegin: begins a capture inside a capture"):
        capture(lambda: fast(x))
    assert torch.equal(fast(x), x * 2 + 1)
    with pytest.raises(CaptureError, match="aclmdlRIExecuteAsync"):
        capture(lambda: fast(x))
    assert torch.equal(fast(x + 1), x * 2 + 3)


def test_a_capture_inside_a_capture_is_refused():
    x = torch.arange(6.0).npu()

    def nested():
        with torch.npu.graph(torch.npu.NPUGraph()):
            return x + 1

    with pytest.raises(CaptureError) as caught:
        capture(nested)
    assert_refused(caught.value, "aclmdlRICaptureBegin", nested.__code__.co_firstlineno + 1)
    assert_not_harmed()

    errors = []

    def begun():
        try:
            torch.npu.NPUGraph().capture_begin()
        except RuntimeError as error:
            errors.append(error)
        return x + 1

    with pytest.raises(CaptureError, match="begins a capture inside a capture"):
        capture(begun)
    assert [type(error) for error in errors] == [CaptureError]
    assert_not_harmed()


def begin_another(acl):
    return acl.aclmdlRICaptureBegin(pointer(0x77), 0)


def end_another(acl):
    return acl.aclmdlRICaptureEnd(pointer(0x77), ctypes.byref(pointer()))


def too_many_events(acl):
    """Numbers that no event has: the stand-in never looks behind one."""
    return max(acl.aclrtRecordEvent(pointer(0x9000000 + 16 * number), stream()) for number in range(EVENTS + 1))


def too_many_streams(acl):
    event = pointer(0x8000000)
    assert acl.aclrtRecordEvent(event, stream()) == 0
    return max(acl.aclrtStreamWaitEvent(pointer(0x7000000 + 16 * number), event) for number in range(STREAMS))


@pytest.mark.parametrize(
    ("call", "function"),
    [
        (begin_another, "aclmdlRICaptureBegin: begins a capture inside a capture"),
        (end_another, "aclmdlRICaptureEnd: no capture began on this stream"),
        (too_many_events, "aclrtRecordEvent: more events"),
        (too_many_streams, "aclrtStreamWaitEvent: more streams"),
    ],
)
def test_refusals_of_the_runtime_spoil_the_capture(acl, call, function):
    """ACL's code is one that torch_npu raises on: "feature not supported" (207000) would be a warning."""
    codes = []
    with pytest.raises(CaptureError, match=f"^{function}") as caught:
        capture(lambda: codes.append(call(acl)))
    assert codes[0] not in (0, 207000) and caught.value.place.file == __file__
    assert_not_harmed()
