"""The command ``moe-lowering``. This file turns reports and failures into output and exit codes; no torch is imported
before the arguments are known to be good.

Only the report goes to stdout: everything that libraries print meanwhile is sent to stderr, so that ``--json`` prints
one JSON object whatever they say.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from moe_lowering.cli import collection, terminal
from moe_lowering.cli.commands import PageReport, Report, Request, parse, run
from moe_lowering.cli.files import UNENCODABLE, write_file
from moe_lowering.cli.option_names import name_options
from moe_lowering.cli.progress import Progress
from moe_lowering.cli.simulate.request import SimulateRequest
from moe_lowering.cli.usage import RunError, UsageError, first_sentence
from moe_lowering.interrupts import Terminated, exit_code, interruptible
from moe_lowering.model_configs.errors import ModelError

OK, FAILED, USAGE = 0, 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. SIGINT and SIGTERM end it with 130 and 143, once everything is cleaned up."""
    try:
        with interruptible(), collection.of_command():
            return _main(arguments)
    except KeyboardInterrupt:
        number = signal.SIGINT
    except Terminated:
        number = signal.SIGTERM
    _complain(f"ended by {number.name}")
    return exit_code(number)


def _main(arguments: list[str] | None) -> int:
    try:
        request = _parse(arguments)
        progress = Progress()
        try:
            with contextlib.nullcontext() if isinstance(request, SimulateRequest) else _stdout_to_stderr():
                report = run(request, progress)
        finally:
            progress.close()
        if page := getattr(request, "html", None):
            assert isinstance(report, PageReport)  # of each request that has the option
            write_file("html", Path(page), report.to_html())
            _complain(f"wrote {page} ({max(1, Path(page).stat().st_size // 1000)} KB)")
        _print(report.to_json() if getattr(request, "json", False) else _text(report))
    except (UsageError, ModelError) as error:
        _complain(f"error: {'argument MODEL: ' if isinstance(error, ModelError) else ''}{error}")
        return USAGE
    except RunError as error:
        if error.verbose:
            with contextlib.suppress(OSError):
                traceback.print_exception(error.__cause__)
        _complain(f"error: {error}")
        return FAILED
    except Exception as error:  # not a wrong command: lowering or running failed
        with contextlib.suppress(OSError):
            traceback.print_exc()
        _complain(f"error: {type(error).__name__}: {first_sentence(str(error))}")
        return FAILED
    problems = report.problems()
    for problem in problems:
        _complain(problem)
    return FAILED if problems else OK


def _parse(arguments: list[str] | None) -> Request:
    """``parse``. A help that stdout does not take is an error of one line, like a report that it does not take."""
    try:
        return parse(arguments)
    except SystemExit:
        _print("", end="")
        raise
    except OSError as error:  # the version
        raise _stdout_error(error) from error


def _text(report: Report) -> str:
    """A report for a person, as wide as the terminal; below it the options for the fields that refusals name."""
    from moe_lowering.report.text import labelled_text  # with it torch, which the report has imported
    from moe_lowering.report.width import use_width

    with use_width(terminal.width()):
        text = report.to_text()
        options = name_options(text)
        return f"{text}\n\n{labelled_text('options', options)}" if options else text


def _complain(text: str) -> None:
    """Print one line to stderr, if it is open. A terminal breaks it: commands in it stay as they are to be copied."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"moe-lowering: {' '.join(text.split())}", file=sys.stderr)


def _print(text: str, end: str = "\n") -> None:
    """To stdout. A reader that closes the pipe early, such as ``head``, is no error, and neither is a narrow encoding."""
    if sys.stdout is None:
        return  # only a help gets here: a report needs stdout from the start
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=UNENCODABLE)
    try:
        print(text, end=end)
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            raise _stdout_error(error) from error
        _discard_stdout()


def _stdout_error(error: OSError) -> UsageError:
    _discard_stdout()
    return UsageError(f"stdout cannot be written: {error.strerror}; accepted: an open file, pipe or terminal")


def _discard_stdout() -> None:
    """Or Python complains once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what Python, C libraries and child processes write to stdout to stderr."""
    try:
        sys.stdout.flush()
        os.fstat(2)  # first: where it is closed, a copy of stdout would get its number
        kept = os.dup(1)
    except (AttributeError, OSError) as error:  # a closed one is None
        raise UsageError("stdout or stderr is closed; accepted: both open, e.g. 2>/dev/null") from error
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
