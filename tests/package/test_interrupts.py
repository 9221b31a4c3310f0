"""SIGINT and SIGTERM while something is compiled: commands, ranks and servers end, and leave nothing behind."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from moe_lowering import interrupts, simulator
from moe_lowering.interrupts import interruptible

SCRIPT = pathlib.Path(__file__).parents[1] / "helpers" / "interrupt_process.py"
RANKS = 2


def start(folder, *given):
    # torch's compile cache is in the temporary directory too, and is meant to stay
    places = {"TMPDIR": str(folder / "tmp"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    (folder / "tmp").mkdir()
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *given], env={**os.environ, **places}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def session(leader):
    """Processes of a session that are no zombies."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if int(its_session) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_in_one_process(tmp_path):
    """torch_npu's handlers make another error of the signal, and go on: only where nobody has asked for an end."""
    process = start(tmp_path, "here")
    out, err = process.communicate(timeout=300)
    assert out.splitlines() == [
        "command: returned 130 returned 143",
        "handlers: torch_npu.dynamo.npugraph_ex torch_npu.dynamo.npugraph_ex",
        "asked: Interrupted Terminated",
        "not asked: BackendCompilerFailed BackendCompilerFailed",
        "server: Interrupted",
    ], err[-2000:]
    assert process.returncode == 143
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.fixture
def folder(tmp_path, request):
    """A temporary directory that is too long for the path of a socket, or short enough: ranks are spawned, or forked."""
    if request.param == "long":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        yield pathlib.Path(short)


ENDS_OF_COMMANDS = [(signal.SIGINT, True, "short"), (signal.SIGTERM, False, "short"), (signal.SIGTERM, False, "long")]


@pytest.mark.parametrize("number, to_all, folder", ENDS_OF_COMMANDS, indirect=["folder"])
def test_a_command_on_ranks(folder, number, to_all):
    """Ctrl-C goes to all processes of a terminal, SIGTERM to the one that was started."""
    process = start(folder, "command", "lower", "moe", "--ep", str(RANKS), "--layers", "1", "--tokens", "4")
    lines = []
    try:
        while sum(line.startswith("compiling ") for line in lines) < RANKS:
            line = process.stderr.readline()
            assert line, "".join(lines)
            lines.append(line)
        assert len(session(process.pid)) > RANKS  # so that "none" says something below
        (os.killpg if to_all else os.kill)(process.pid, number)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == interrupts.exit_code(number)
        assert f"moe-lowering: ended by {number.name}\n" in rest and "Traceback" not in rest, rest
        deadline = time.monotonic() + 10  # Python's resource tracker ends after its parent
        while session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert session(process.pid) == []
        assert list((folder / "tmp").iterdir()) == []
    finally:
        if process.poll() is None or session(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_while_the_ranks_are_started(tmp_path):
    """The process that forks them imports for seconds: it prints nothing, and ends after the command."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        process = start(pathlib.Path(short), "command", "lower", "moe", "--ep", str(RANKS))
        try:
            while not any("forkserver" in command_line(found) for found in session(process.pid)):
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(0.3)  # within its imports
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (130, "moe-lowering: ended by SIGINT\n")
            deadline = time.monotonic() + 30
            while session(process.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert session(process.pid) == []
        finally:
            if process.poll() is None or session(process.pid):
                os.killpg(process.pid, signal.SIGKILL)


def command_line(number):
    with contextlib.suppress(OSError):  # it has ended meanwhile
        return pathlib.Path(f"/proc/{number}/cmdline").read_text()
    return ""


# The context manager itself


@pytest.fixture(autouse=True)
def handlers():
    """The two signals as Python has them; what was there before afterwards."""
    before = {number: signal.getsignal(number) for number in interrupts.ERRORS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handler_of(module):
    def handler(number, frame):
        seen.append(number)

    seen = handler.seen = []
    handler.__module__ = module
    return handler


def raised(number):
    """What a signal raises here; None when it raises nothing."""
    try:
        os.kill(os.getpid(), number)
        time.sleep(0)
    except BaseException as error:
        return type(error)


ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


@pytest.mark.parametrize("number", interrupts.ERRORS)
@pytest.mark.parametrize("module", ["torchair.core._backend", "npugraph_ex", "torch_npu.dynamo.npugraph_ex"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_handlers_of_torch_npu_wait(number, module, when):
    theirs = handler_of(module)
    if when == "before":
        signal.signal(number, theirs)
    with pytest.raises(ENDS[number]), interruptible():
        if when == "meanwhile":
            signal.signal(number, theirs)
        os.kill(os.getpid(), number)
    assert theirs.seen == [] and signal.getsignal(number) is theirs
    assert raised(number) is None and theirs.seen == [number]


@pytest.mark.parametrize("number", interrupts.ERRORS)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_handlers_of_others_stay(number, when):
    theirs = handler_of("torchair_of_somebody_else")
    if when == "before":
        signal.signal(number, theirs)
    with interruptible():
        if when == "meanwhile":
            signal.signal(number, theirs)
        assert raised(number) is None and theirs.seen == [number]
    assert signal.getsignal(number) is theirs


@pytest.mark.parametrize("number", interrupts.ERRORS)
def test_an_ignored_signal_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with interruptible():
        assert raised(number) is None
    assert signal.getsignal(number) is signal.SIG_IGN


def test_inside_itself():
    original = signal.signal
    with pytest.raises(KeyboardInterrupt), interruptible():
        with interruptible():
            pass
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal is original
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_thread_changes_no_handler():
    def enter():
        with interruptible():
            found.append((signal.signal, signal.getsignal(signal.SIGTERM)))

    found = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(signal.signal, signal.SIG_DFL)]


def swallow(number):
    """As Python and C code do that cannot pass on an error."""
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        os.kill(os.getpid(), number)
        time.sleep(1)
        pytest.fail("no signal came")


@pytest.mark.parametrize("number", interrupts.ERRORS)
@pytest.mark.parametrize("error", [None, ValueError("made of it")])
def test_what_was_swallowed_is_raised_at_the_end(number, error):
    with pytest.raises(ENDS[number]), interruptible():
        swallow(number)
        if error is not None:
            raise error


@pytest.mark.parametrize("number", interrupts.ERRORS)
def test_what_was_swallowed_comes_again_until_it_is_not(number):
    began, times = time.monotonic(), 0
    with pytest.raises(ENDS[number]), interruptible():
        swallow(number)
        for times in (1, 2):  # noqa: B007
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                time.sleep(10)
        time.sleep(10)
    assert times == 2 and time.monotonic() - began < 10


@pytest.mark.parametrize("number", interrupts.ERRORS)
def test_what_del_swallows_is_not_printed(number, monkeypatch):
    class Dying:
        def __init__(self, deed):
            self.deed = deed

        def __del__(self):
            self.deed()

    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(unraisable.exc_type))
    ours = sys.unraisablehook
    with pytest.raises(ENDS[number]), interruptible():
        Dying(lambda: 1 / 0)
        Dying(lambda: os.kill(os.getpid(), number))
        time.sleep(10)
    assert printed == [ZeroDivisionError] and sys.unraisablehook is ours


@pytest.mark.parametrize("number", interrupts.ERRORS)
def test_the_import_of_torch_npu_is_not_interrupted(number, monkeypatch):
    """An error within its library's first call aborts the process."""
    imported = []

    def import_module(name):
        os.kill(os.getpid(), number)
        time.sleep(0)
        imported.append(name)

    monkeypatch.setattr(simulator.importlib, "import_module", import_module)
    with pytest.raises(ENDS[number]), interruptible():
        simulator._import_torch_npu()
    assert imported == ["torch_npu"] and not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(interrupts.ERRORS)


@pytest.mark.parametrize("number", interrupts.ERRORS)
def test_cleaning_up_is_not_interrupted(number):
    clean = False
    with pytest.raises(ENDS[number]), interruptible():
        try:
            os.kill(os.getpid(), number)
        finally:
            time.sleep(10 * interrupts.AGAIN)
            clean = True
    assert clean


def test_an_error_without_a_signal_is_itself():
    with pytest.raises(ValueError, match="own"), interruptible():
        raise ValueError("own")


@pytest.mark.parametrize("number", interrupts.ERRORS)
@pytest.mark.parametrize("seconds", [interrupts.SAME, 0.0])
def test_a_second_signal(number, seconds):
    """The same one again, as timeout(1) sends it, lets the first clean up; a later one ends the process at once."""
    script = f"""
import os, signal
from moe_lowering import interrupts, simulator
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupts.SAME = {seconds}
try:
    with interrupts.interruptible():
        try:
            os.kill(os.getpid(), {number:d})
        finally:
            os.kill(os.getpid(), {number:d})
            print("clean")
except KeyboardInterrupt:
    raise SystemExit(130)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    first = (interrupts.exit_code(number), "clean\n")
    assert (ended.returncode, ended.stdout) == (first if seconds else (-number, ""))
