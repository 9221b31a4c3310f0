"""The command ``moe-lowering``. This file parses, dispatches and turns failures into exit codes; no torch is imported
before the arguments are known to be good.

Only the report goes to stdout: everything that libraries print meanwhile is sent to stderr, so that ``--json`` prints
one JSON object whatever they say.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_lowering.cli.arguments import Request, UsageError, parse

if TYPE_CHECKING:
    from moe_lowering.cli.explain import Explanation
    from moe_lowering.cli.explain_arguments import ExplainRequest
    from moe_lowering.cli.outcome import Outcome

OK, FAILED, USAGE = 0, 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    try:
        request = parse(arguments)
        with _stdout_to_stderr():
            outcome = _lower(request) if isinstance(request, Request) else _explain(request)
    except UsageError as error:
        print(f"moe-lowering: error: {' '.join(str(error).split())}", file=sys.stderr)  # one line
        return USAGE
    except Exception as error:  # not a wrong command: lowering or running failed
        traceback.print_exc()
        print(
            f"moe-lowering: error: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", file=sys.stderr
        )
        return FAILED
    print(outcome.to_json() if request.json else outcome.to_text())
    problems = outcome.problems()
    for problem in problems:
        print(f"moe-lowering: {problem}", file=sys.stderr)
    return FAILED if problems else OK


def _explain(request: ExplainRequest) -> Explanation:
    from moe_lowering.cli.explain import explain

    return explain(request)


def _lower(request: Request) -> Outcome:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is built from its config, never downloaded
    started = time.perf_counter()

    def progress(message: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {message}", file=sys.stderr, flush=True)

    if request.fake:
        from moe_lowering.cli.fake import lower_fake

        return lower_fake(request, progress)
    from moe_lowering.cli.run import lower_and_compare

    return lower_and_compare(request, progress)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what Python, C libraries and child processes write to stdout to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
