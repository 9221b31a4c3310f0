"""``Server``: a decode loop. Requests join and leave a batch between steps, and every step replays the graph of its bucket.

Requests that are being continued always hold the first rows of the cache: when one leaves, the last one moves into its
row. So the rows of a step are a prefix, the smallest bucket that holds them is used, and the rest of it is padding, which
the token mask keeps from the experts: padding that is routed overloads few experts (vllm-ascend, issue 8320). What is compiled
and captured, and what it reads, is in ``graphs``.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from moe_lowering.argument_checks import require_instance
from moe_lowering.backends.npugraph_ex import check_options, npugraph_ex_options
from moe_lowering.deployment import Deployment
from moe_lowering.interrupts import interruptible
from moe_lowering.passes.pipeline import MoeLowering
from moe_lowering.serving.checks import check_buckets, check_lengths, check_model, deployment_for
from moe_lowering.serving.graphs import StepGraphs
from moe_lowering.serving.process_settings import Settings
from moe_lowering.serving.requests import ActiveRequest, Request, Result, integer, integers
from moe_lowering.serving.statistics import Statistics

CAPTURE_LIMIT = 64  # npugraph_ex's default (torch_npu 2.13.0, configs/compiler_config.py)


class Server:
    """Continues prompts with a transformers model, in batches of changing size, on graphs captured beforehand.

    Args:
        model: a causal language model in evaluation mode, with the experts implementation ``moe_lowering``, attention
            ``sdpa`` or ``eager``, and layers that attend to all tokens. Its weights must stay where they are.
        deployment: as for ``npugraph_ex_options``; one EP rank. ``mask_is_prefix`` is set, as it holds.
        buckets: batch sizes to capture, ascending. The last one is the largest batch.
        max_length: tokens of the longest request, prompt and new ones together.
        prefill_lengths: ends of ranges of prompt lengths, ascending, the last one ``max_length``. Each is a graph, lowered
            and not captured; a prompt is padded to the end of its range with masked tokens. () calls the model instead,
            which needs kernels of the generic operators (CPU, simulator). None: a quarter, half and all of ``max_length``.
        comm: the implementation of decode steps, see ``npugraph_ex_options``; prefill's is always chosen.
        options: more options of npugraph_ex for decode steps. On device npu all buckets share one memory pool unless
            ``use_graph_pool`` is given. ``force_eager=True`` captures nothing, and is the only way on CPU.

    Attributes:
        statistics: counters.
        lowering, prefill_lowering: the passes, with their reports.

    Raises:
        ValueError: an argument that is out of range, or a model that cannot be served, with what is accepted.
    """

    def __init__(
        self,
        model: nn.Module,
        deployment: Deployment | None = None,
        *,
        buckets: Sequence[int] = (1, 2, 4, 8),
        max_length: int = 1024,
        prefill_lengths: Sequence[int] | None = None,
        comm: str = "auto",
        **options: Any,
    ) -> None:
        self.model: Any = model
        self.buckets = integers("Server: buckets", buckets, "batch sizes")
        self.max_length = max_length = integer("Server: max_length", max_length)
        check_options("Server", options)
        limit = integer("Server: capture_limit", options.get("capture_limit", CAPTURE_LIMIT))
        check_buckets(self.buckets, limit)
        check_model(model, max_length)
        if prefill_lengths is None:
            prefill_lengths = sorted({-(-max_length // part) for part in (1, 2, 4)})
        self.prefill_lengths = integers("Server: prefill_lengths", prefill_lengths, "lengths")
        if self.prefill_lengths:
            check_lengths(self.prefill_lengths, max_length)
        deployment = deployment_for(deployment, max(max_length, self.buckets[-1])).replace(mask_is_prefix=True)
        self.statistics = Statistics()
        self.lowering = MoeLowering(deployment, comm, strict=True)
        self.prefill_lowering = MoeLowering(deployment, strict=True)
        captures, device = not options.get("force_eager", False), next(model.parameters()).device
        if captures and device.type == "npu":
            pool: dict[str, Any] = {"use_graph_pool": torch.get_device_module(device).graph_pool_handle()}
            options = {**pool, "reuse_graph_pool_in_same_fx": False, **options}
        self._options = npugraph_ex_options(deployment, lowering=self.lowering, **options)
        lengths, most = self.prefill_lengths, self.buckets[-1]
        self._graphs = StepGraphs(model, lengths, most, max_length, captures, self.statistics)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: list[ActiveRequest] = []
        self._finished: list[Result] = []  # results of a step that ended with an error: the next step returns them
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._busy_with = ""
        self._settings = Settings()

    def warm_up(self, progress: Callable[[str], object] | None = None) -> None:
        """Compile and capture everything; a second call does nothing.

        Args:
            progress: called with a line of text after each graph, e.g. ``print``.
        """
        with self._alone("warm_up"):
            if not self._graphs.is_warm:
                self._warm_up(progress)

    def _warm_up(self, progress: Callable[[str], object] | None) -> None:
        total = len(self.buckets) + len(self.prefill_lengths)
        done, began = 0, time.perf_counter()

        def report(what: str) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                seconds = time.perf_counter() - began
                progress(f"warm-up {done} of {total}: {what}, {seconds:.1f} s")

        eager = npugraph_ex_options(self.prefill_lowering.deployment, lowering=self.prefill_lowering, force_eager=True)
        for length in reversed(self.prefill_lengths):
            self._graphs.compile_prefill(length, eager)
            report(f"prefill of up to {length} tokens")
        for bucket in reversed(self.buckets):  # the largest first, so that the others reuse its memory
            self._graphs.compile_decode(bucket, self._options)
            report(f"decode of up to {bucket} requests")
        self._graphs.is_warm = True

    def submit(self, request: Request) -> int:
        """Queue a request; its number. Any thread may, also while another one is in ``step``.

        Raises:
            ValueError: a request that the server cannot hold.
        """
        self._check_request(request)
        number = next(self._numbers)
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> Result:
        """End a request that is waiting or running, and return its tokens so far. ``step`` returns nothing more for it.

        The row of a running request is free at once; the tokens of the others do not change. Between steps, from the
        thread that steps.

        Args:
            number: what ``submit`` returned.

        Raises:
            ValueError: no such request is waiting or running: it has finished, was cancelled, or never was.
            RuntimeError: another thread is in ``step``, ``generate`` or ``warm_up``.
        """
        with self._alone("cancel"):
            for position, (waiting, _) in enumerate(self._waiting):
                if waiting == number:
                    del self._waiting[position]
                    return self._cancelled(number, [])
            for index, row in enumerate(self._rows):
                if row.number == number:
                    self._leave(index)
                    return self._cancelled(number, row.tokens)
        alive = sorted([waiting for waiting, _ in self._waiting] + [row.number for row in self._rows])
        raise ValueError(
            f"Server: cancel: number is {number!r}; accepted: a request that waits or runs, one of {alive}"
        )

    def _cancelled(self, number: int, tokens: list[int]) -> Result:
        self.statistics.cancelled += 1
        return Result(number, tokens, "cancelled")

    def step(self) -> list[Result]:
        """Prefill waiting requests while rows are free, then one decode step for all rows; what has finished.

        An error of the model's own leaves every request where it was, and what has finished for the next step.

        Raises:
            RuntimeError: ``warm_up`` has not been called; another thread is in ``step``, ``generate`` or ``warm_up``.
            RecompileError: a graph does not fit any more; the server is of no use from there on.
        """
        with self._alone("step"):
            return self._step()

    def _step(self) -> list[Result]:
        self._require_warm("step")
        while self._waiting and len(self._rows) < self.buckets[-1]:
            number, request = self._waiting[0]
            running = ActiveRequest(number, request, len(request.prompt), [])
            # After an error the request still waits
            result = running.add(self._graphs.first_token(request.prompt, row=len(self._rows)))
            self._waiting.popleft()
            self.statistics.prefill_tokens += len(request.prompt)
            if result is None:
                self._rows.append(running)
            else:
                self._finish(result)
        if self._rows:
            self._decode_rows()
        finished, self._finished = self._finished, []
        return finished

    def _finish(self, result: Result) -> None:
        self.statistics.requests += 1
        self._finished.append(result)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """The results of all requests, in their order. Not while others that were submitted are running.

        Raises:
            ValueError: a request that the server cannot hold; nothing is generated then.
            RuntimeError: ``warm_up`` has not been called, or requests are running; nothing is queued then.
        """
        require_instance("Server", "requests", requests, (list, tuple), "a list of moe_lowering.serving.Request")
        for request in requests:
            self._check_request(request)
        with self._alone("generate"):
            if self._waiting or self._rows:
                raise RuntimeError(
                    "Server: generate while submitted requests are running; accepted: step() until they end"
                )
            self._require_warm("generate")  # checked first, so that no request is left in the queue after an error
            numbers = [self.submit(request) for request in requests]
            results: dict[int, Result] = {}
            try:
                while not results.keys() >= set(numbers):
                    results.update({result.number: result for result in self._step()})
            finally:  # what other threads submitted meanwhile is for the next step
                self._finished += [result for number, result in results.items() if number not in numbers]
            return [results[number] for number in numbers]

    def _require_warm(self, what: str) -> None:
        if not self._graphs.is_warm:
            raise RuntimeError(f"Server: {what} before warm_up; accepted: warm_up() first")

    def _check_request(self, request: Request) -> None:
        require_instance("Server", "request", request, Request, "a moe_lowering.serving.Request")
        request.check(self.max_length, self.model.config.get_text_config(decoder=True).vocab_size)

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Raises in a second thread: rows, cache and the process's settings belong to one thread at a time."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"Server: {what} while another call is in {self._busy_with or 'the server'}; accepted: one call at a time "
                "(submit may come from any thread; step, generate, warm_up and cancel from the one that steps)"
            )
        self._busy_with = what
        try:
            with interruptible(), self._settings:
                yield
        finally:
            self._busy_with = ""
            self._lock.release()

    def _decode_rows(self) -> None:
        count = len(self._rows)
        bucket = next(b for b in self.buckets if b >= count)
        positions = [row.length for row in self._rows]
        tokens = self._graphs.next_tokens([row.tokens[-1] for row in self._rows], positions, bucket)
        counters = self.statistics
        counters.steps[bucket] = counters.steps.get(bucket, 0) + 1
        counters.real_tokens += count
        counters.padded_tokens += bucket - count
        # From the end: a request that moves into a free row has been handled already
        for index in reversed(range(count)):
            self._rows[index].length += 1
            result = self._rows[index].add(tokens[index])
            if result is not None:
                self._finish(result)
                self._leave(index)

    def _leave(self, index: int) -> None:
        """Free a row; the last one moves into it."""
        last = self._rows.pop()
        if index < len(self._rows):
            self._rows[index] = last
            self._graphs.move_row(len(self._rows), index, last.length)
