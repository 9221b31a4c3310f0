"""SIGINT and SIGTERM while something is compiled: commands, ranks and servers end, and leave nothing behind."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_lowering import interrupts
from moe_lowering.interrupts import Terminated, interruptible

SCRIPT = pathlib.Path(__file__).with_name("interrupted.py")
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
        "asked: KeyboardInterrupt Terminated",
        "not asked: BackendCompilerFailed BackendCompilerFailed",
        "server: KeyboardInterrupt",
    ], err[-2000:]
    assert process.returncode == 143
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number, to_all", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_command_on_ranks(tmp_path, number, to_all):
    """Ctrl-C goes to all processes of a terminal, SIGTERM to the one that was started."""
    process = start(tmp_path, "command", "lower", "moe", "--ep", str(RANKS), "--layers", "1", "--tokens", "4")
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
        assert list((tmp_path / "tmp").iterdir()) == []
    finally:
        if process.poll() is None or session(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


# The context manager itself


@pytest.fixture(autouse=True)
def handlers():
    """The two signals as Python has them; what was there before afterwards."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
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


ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@pytest.mark.parametrize("number", interrupts.SIGNALS)
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


@pytest.mark.parametrize("number", interrupts.SIGNALS)
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


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_an_ignored_signal_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with interruptible():
        assert raised(number) is None
    assert signal.getsignal(number) is signal.SIG_IGN


def test_inside_itself_and_elsewhere():
    original = signal.signal
    with interruptible():
        with interruptible():
            pass
        thread = threading.Thread(target=lambda: interruptible().__enter__())
        thread.start()
        thread.join()
        with pytest.raises(KeyboardInterrupt):
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


@pytest.mark.parametrize("error", [None, ValueError("made of it")])
def test_sigterm_is_not_lost(error):
    """Whoever catches it, or makes another error of it, does not keep the process alive."""
    with pytest.raises(Terminated) as ended, interruptible():
        assert raised(signal.SIGTERM) is Terminated
        if error is not None:
            raise error
    assert ended.value.code == 143


def test_an_error_without_a_signal_is_itself():
    with pytest.raises(ValueError, match="own"), interruptible():
        raise ValueError("own")


@pytest.mark.parametrize("seconds, code", [(interrupts.SAME, 143), (0.0, -signal.SIGTERM)])
def test_a_second_sigterm(seconds, code):
    """The same one again, as timeout(1) sends it, lets the first clean up; a later one ends the process at once."""
    script = f"""
import os, signal
from moe_lowering import interrupts
interrupts.SAME = {seconds}
with interrupts.interruptible():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("clean")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (code, "clean\n" if code > 0 else "")
