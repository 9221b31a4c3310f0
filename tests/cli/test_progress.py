"""What the commands say of their progress."""

from __future__ import annotations

import io
import sys
import threading
import types

from test_explain import BLOCK

from moe_lowering.cli import commands, progress
from moe_lowering.cli.explain.command import run_explain


class Clock:
    """Time that passes when a test says so, and its timers."""

    def __init__(self):
        self.now, self.timers = 0.0, []

    def timer(self, seconds, function):
        made = types.SimpleNamespace(due=self.now + seconds, function=function, cancelled=False, daemon=False)
        made.cancel = lambda: setattr(made, "cancelled", True)
        made.start = lambda: self.timers.append(made)
        return made

    def wait(self, seconds):
        self.now += seconds
        due, self.timers = [t for t in self.timers if t.due <= self.now], [t for t in self.timers if t.due > self.now]
        for timer in due:
            if not timer.cancelled:
                self.running = timer
                timer.function()


def test_progress_is_for_who_waits(monkeypatch):
    stream, clock = io.StringIO(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(
        progress,
        "threading",
        types.SimpleNamespace(Lock=threading.Lock, Timer=clock.timer, current_thread=lambda: clock.running),
    )
    shown = progress.Progress(shown=True)
    shown("first")
    shown("second")
    clock.wait(progress.QUIET / 2)
    assert stream.getvalue() == "", "what is done at once is not said"
    clock.wait(progress.QUIET)
    assert stream.getvalue() == f"[{progress.QUIET * 1.5:6.1f} s] second\n"
    shown("third")
    assert stream.getvalue().endswith("s] third\n") and not {"\r", "\033"} & set(stream.getvalue())
    clock.wait(progress.QUIET)
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["second", "third"], "each is said once"
    shown.close()
    shown("fourth")
    clock.wait(progress.QUIET)
    assert "fourth" not in stream.getvalue()
    short = progress.Progress(shown=True)
    short("short")
    short.close()
    clock.wait(progress.QUIET * 2)
    assert "short" not in stream.getvalue()


def test_progress_is_as_wide_as_the_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    monkeypatch.setattr(progress, "QUIET", 0.0)
    monkeypatch.setenv("COLUMNS", "80")
    progress.Progress(shown=True)("word " * 40)
    first, *others = stream.getvalue().splitlines()
    assert (
        len(first) <= 80 and others and all(len(line) <= 80 and line.startswith(" " * 11 + "word") for line in others)
    )
    assert stream.getvalue().split().count("word") == 40


def test_progress_is_for_terminals(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "QUIET", 0.0)
    progress.Progress()("piped")
    assert stream.getvalue() == ""
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    shown = progress.Progress("rank 0")
    shown("seen")
    shown.close()
    assert stream.getvalue().startswith("[rank 0 ") and "seen" in stream.getvalue()


def test_explain_says_what_it_is_at(tmp_path):
    messages: list[str] = []
    run_explain(commands.parse(["explain", *BLOCK.split(), "--ep", "4,8"]), messages.append)
    assert messages == ["deployment 1 of 2: A3, EP 4, none", "deployment 2 of 2: A3, EP 8, none"]
    messages.clear()
    run_explain(commands.parse(["explain", *BLOCK.split(), "--html", str(tmp_path / "page.html")]), messages.append)
    assert messages == ["judging the implementations", "working out the choice over tokens and EP sizes for the page"]
