"""NPU graph capture: the tapes behind the stand-in's capture functions, and what a capture forbids.

``capture.c`` knows which streams are captured and calls here when a capture begins, ends, runs or is destroyed, when
streams wait for each other, and when something was called that a capture forbids. torch_npu turns a failure there into
a RuntimeError; ``graphs.py`` makes the ``CaptureError`` behind it come out.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from moe_lowering.simulator.device.tape import CaptureError, Tape
from moe_lowering.simulator.device.task_groups import TaskGroups, Update
from moe_lowering.simulator.standins import SimulatorError

_ADDRESS, _MODEL = ctypes.c_size_t, ctypes.c_uint64
_BEGIN = ctypes.CFUNCTYPE(ctypes.c_int, _MODEL, _ADDRESS)
_END = ctypes.CFUNCTYPE(ctypes.c_int, _MODEL)
_DESTROY = ctypes.CFUNCTYPE(None, _MODEL)
_FORBIDDEN = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
_ORDER = ctypes.CFUNCTYPE(None, _ADDRESS, _ADDRESS)
_VALUE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, _ADDRESS, ctypes.c_uint64, _ADDRESS)
_GROUP = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, _ADDRESS, ctypes.POINTER(_ADDRESS))
_GROUP_BEGIN, _GROUP_END, _UPDATE_BEGIN, _UPDATE_END = range(4)
FAILED = 500000  # ACL_ERROR_INTERNAL_ERROR


class _Hooks(ctypes.Structure):
    """``hooks_t`` of capture.c."""

    _fields_ = (
        ("begin", _BEGIN),
        ("end", _END),
        ("execute", _BEGIN),
        ("destroy", _DESTROY),
        ("forbidden", _FORBIDDEN),
        ("record", _ORDER),
        ("wait", _ORDER),
        ("value", _VALUE),
        ("group", _GROUP),
    )


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often the stand-in was entered.

    Attributes:
        begun: entries of ``aclmdlRICaptureBegin``. npugraph_ex makes one empty capture per compiled graph, to create
            its memory pool, which is counted too.
        empty: captures that ended and recorded nothing.
        captured: captures that ended and recorded at least one operator.
        replayed: entries of ``aclmdlRIExecuteAsync``.
    """

    begun: int
    empty: int
    captured: int
    replayed: int

    def __sub__(self, other: Counts) -> Counts:
        """What has happened since ``other`` was read."""
        after, before = dataclasses.astuple(self), dataclasses.astuple(other)
        return Counts(*(a - b for a, b in zip(after, before, strict=True)))


_library: Any = None
_hooks: _Hooks | None = None
_current: Tape | None = None
_latest: Tape | None = None
_tapes: dict[int, Tape] = {}
_finished = {"empty": 0, "captured": 0}
_tasks = TaskGroups()


def counts() -> Counts:
    """The counters of this process."""
    library = _load_library()
    return Counts(
        begun=library.moe_standin_captures_begun(),
        empty=_finished["empty"],
        captured=_finished["captured"],
        replayed=library.moe_standin_replays(),
    )


def latest_tape() -> Tape | None:
    """The tape of the last capture that began."""
    return _latest


def tapes() -> list[Tape]:
    """The tapes of all graphs that exist and recorded something, oldest first."""
    return [tape for tape in _tapes.values() if tape.entries]


def tape_in_progress(operator: str = "launch") -> Tape | Update | None:
    """The tape of the capture under way in which the current stream takes part, or the update of a captured group that its
    launches belong to; None when nothing is captured.

    Raises:
        CaptureError: a capture is under way, and the current stream is not part of it.
        SimulatorError: a graph that was replayed on the current stream waits for an external event.
    """
    if _current is None:
        if _tasks.update is not None and current_stream() == _tasks.update.stream:
            return _tasks.update
        if _tasks.waiting is not None and current_stream() == _tasks.waiting.stream:
            raise SimulatorError(f"{operator}: launched behind a graph that was replayed: {_tasks.describe()}")
        return None
    if not _library.moe_standin_is_captured(current_stream()):
        raise refuse(operator, "on a stream that is not part of the capture under way: let it wait for an event of it")
    return _current


def is_capturing() -> bool:
    """Whether a capture is under way, on any stream."""
    return _current is not None


def capture_error() -> CaptureError | None:
    """Why the capture under way is invalid; None when it is not, or nothing is captured."""
    return _current.error if _current is not None else None


def refuse(operator: str, reason: str) -> CaptureError:
    """The error to raise for what the capture under way forbids; the capture is invalid from here on."""
    assert _current is not None
    _library.moe_standin_invalidate()
    return _current.fail(operator, reason)


def record(operator: str, run: Callable[[], object]) -> None:
    """Append a launch on the current stream to the tape of the capture under way, or to the update of a captured group."""
    if _current is None:
        assert _tasks.update is not None
        _tasks.update.add(operator, run)
        return
    _current.add(operator, run, current_stream())


def current_stream() -> int:
    """The handle of the current stream."""
    return int(torch.get_device_module("npu").current_stream().npu_stream)


def install() -> None:
    """Let the stand-in's capture functions keep tapes. Idempotent."""
    global _hooks, _library
    if _hooks is not None:
        return
    _library = ctypes.CDLL("libascendcl.so")  # the stand-in, which standins.load() has loaded: matched by soname
    for name in ("moe_standin_captures_begun", "moe_standin_replays"):
        getattr(_library, name).restype = ctypes.c_uint64
    _library.moe_standin_is_captured.argtypes = (ctypes.c_size_t,)
    _library.moe_standin_refused.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
    _hooks = _Hooks(
        _BEGIN(_begin),
        _END(_end),
        _BEGIN(_execute),
        _DESTROY(_destroy),
        _FORBIDDEN(_forbidden),
        _ORDER(lambda event, stream: _in_order(lambda tape: tape.record(event, stream))),
        _ORDER(lambda stream, event: _in_order(lambda tape: tape.wait(stream, event))),
        _VALUE(_value),
        _GROUP(_group),
    )
    _library.moe_standin_set_hooks(ctypes.byref(_hooks))
    _library.moe_standin_device_computes()  # what still fails is not for want of ``enable_device()``


def _load_library() -> Any:
    if _library is None:
        raise SimulatorError("device npu is not enabled; call moe_lowering.simulator.enable_device() first")
    return _library


def _begin(model: int, stream: int) -> int:
    global _current, _latest
    _current = _latest = _tapes[model] = Tape(model, stream)
    return 0


def _end(model: int) -> int:
    global _current
    _current = None
    tape = _tapes[model]
    tape.finish()
    _finished["captured" if tape.entries else "empty"] += 1
    return 0


def _execute(model: int, stream: int) -> int:
    tape = _tapes[model]
    try:
        _tasks.replay(tape, stream)
    except BaseException as error:  # the caller is a C function, which takes no exception but a number
        tape.failure = error
        return FAILED
    return 0


def _destroy(model: int) -> None:
    if (tape := _tapes.pop(model, None)) is not None:
        _tasks.forget(tape)


def _value(waits: int, address: int, value: int, stream: int) -> int:
    """A stream writes a word of memory, or waits until it is ``value``: an external event."""
    word = ctypes.c_uint64.from_address(address)

    def write() -> None:
        word.value = value

    def ready() -> bool:
        return bool(word.value == value)

    if _current is not None and _library.moe_standin_is_captured(stream):
        if waits:
            _current.add("wait for an external event", lambda: None, stream, ready)
        else:
            _current.add("write an external event", write, stream)
    elif not waits:
        write()
        waiting = _tasks.waiting
        try:
            _tasks.wake()
        except BaseException as error:  # as in _execute
            assert waiting is not None
            waiting.tape.failure = error
            return FAILED
    elif not ready():
        return int(
            _library.moe_standin_refused(b"aclrtValueWait", b"waits for an external event that nothing recorded")
        )
    return 0


def _group(action: int, stream: int, handle: Any) -> int:
    """A group of tasks begins or ends, in a capture or in an update."""
    if action == _GROUP_END:
        handle[0] = _tasks.end()
        refused = "" if handle[0] else "no group of tasks is open"
    elif action == _GROUP_BEGIN:
        refused = _tasks.begin(_current)
    else:
        refused = _tasks.begin_update(stream, handle[0]) if action == _UPDATE_BEGIN else _tasks.end_update()
    return int(_library.moe_standin_refused(b"aclmdlRICaptureTask", refused.encode())) if refused else 0


def waiting_failure() -> BaseException | None:
    """What a graph raised that went on because an external event was recorded; forgotten afterwards."""
    for tape in _tapes.values():
        if tape.failure is not None:
            failure, tape.failure = tape.failure, None
            return failure
    return None


def _forbidden(function: bytes, reason: bytes) -> None:
    if _current is not None:
        _current.fail(function.decode(), reason.decode())


def _in_order(change: Callable[[Tape], None]) -> None:
    if _current is not None:
        change(_current)


def tape_of(npu_graph: Any) -> Tape:
    """The tape of a ``torch.npu.NPUGraph`` that has been captured."""
    tape = getattr(npu_graph, "simulated_tape", None)
    if tape is None:
        raise SimulatorError("this NPUGraph has not been captured since moe_lowering.simulator.enable_device()")
    return tape
