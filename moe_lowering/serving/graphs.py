"""``StepGraphs``: the compiled steps of a server, what they read at fixed addresses, and that nothing compiles after warm-up.

A graph for each range of prompt lengths, which is lowered and not captured, and one for each bucket, which is captured and
replayed. All of them read the same inputs and the same cache, and write into them in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_lowering.serving import cache
from moe_lowering.serving.statistics import Statistics, captures_so_far, graphs_so_far
from moe_lowering.serving.steps import Decode, Prefill, decode_step, prefill_step, rename_function


class RecompileError(RuntimeError):
    """After warm-up a step would have been compiled, or was captured, again."""


class StepGraphs:
    """The graphs of one server.

    Args:
        prefill_lengths: ends of the ranges of prompt lengths that have a graph; () calls the model instead.
        most: rows of the cache, the largest bucket. max_length: entries of a row.
        captures: whether steps of buckets are captured.
        statistics: counts graphs, captures, replays and padding.

    Attributes:
        is_warm: everything is compiled and captured; from then on both raise.
    """

    def __init__(
        self,
        model: nn.Module,
        prefill_lengths: Sequence[int],
        most: int,
        max_length: int,
        captures: bool,
        statistics: Statistics,
    ) -> None:
        self._model, self._lengths, self._max_length = model, prefill_lengths, max_length
        self._captures, self._statistics = captures, statistics
        self.is_warm = False
        self._prefill: dict[int, Prefill] = {}
        self._decode: dict[int, Decode] = {}
        device = next(model.parameters()).device
        # Read by the graphs, and written in place outside of them: tokens, positions and cache entries; the mask.
        self._state = torch.zeros(3, most, dtype=torch.int64, device=device)
        self._mask = torch.zeros(most, dtype=torch.bool, device=device)
        self._columns = torch.arange(max_length, device=device)
        self._slots = self._columns.clone()
        self._stores = cache.allocate(model, most, max_length)
        self._cache = cache.cache_view(self._stores, self._state[2], prefill=False)
        self.eager_prefill = prefill_step(model, cache.cache_view(self._stores, self._slots, prefill=True))

    def compile_prefill(self, length: int, options: dict[str, Any]) -> None:
        """Compile the prefill of up to ``length`` tokens."""
        self._prefill[length] = _compiled(rename_function(self.eager_prefill, f"prefill_{length}"), options)
        self.first_token([0] * length, row=0)

    def compile_decode(self, bucket: int, options: dict[str, Any]) -> None:
        """Compile and capture the step of up to ``bucket`` requests."""
        step = decode_step(self._model, self._cache, self._max_length)
        self._decode[bucket] = _compiled(rename_function(step, f"decode_{bucket}"), options)
        self.next_tokens([0] * bucket, [0] * bucket, bucket)

    def first_token(self, prompt: Sequence[int], row: int) -> int:
        """Fill a row of the cache with a prompt; the token after it."""
        device, real = self._state.device, len(prompt)
        length = next((end for end in self._lengths if end >= real), real)
        tokens = torch.tensor([[*prompt, *[0] * (length - real)]]).to(device)
        last = torch.tensor([real - 1]).to(device)
        torch.add(self._columns, row * self._max_length, out=self._slots)
        if not self._lengths:
            return int(self._guarded("prefill", lambda: self.eager_prefill(tokens, last, None)))
        mask = (torch.arange(length) < real).to(device)
        self._statistics.prefill_padding += (length - real) * self.is_warm
        return int(self._guarded(f"prefill of {length}", lambda: self._prefill[length](tokens, last, mask)))

    def next_tokens(self, tokens: list[int], positions: list[int], bucket: int) -> list[int]:
        """One step: the next token of each row of a bucket, whose first rows have these tokens at these positions.

        The others are padding: at position 0 of free rows, which the mask keeps from the experts.
        """
        padding = [0] * (bucket - len(tokens))
        positions = positions + padding
        slots = [row * self._max_length + position for row, position in enumerate(positions)]
        self._state[:, :bucket].copy_(torch.tensor([tokens + padding, positions, slots]))
        self._mask[:bucket].copy_(torch.arange(bucket) < len(tokens))
        self._statistics.replays += self._captures
        inputs = self._state[0, :bucket, None], self._state[1, :bucket, None], self._mask[:bucket]
        return self._guarded(f"bucket {bucket}", lambda: self._decode[bucket](*inputs)).tolist()

    def move_row(self, source: int, target: int, length: int) -> None:
        """Move the first ``length`` entries of a row of the cache into another one."""
        for store in self._stores:
            store.move(source, target, length)

    def _guarded(self, what: str, call: Callable[[], Tensor]) -> Tensor:
        """Run a compiled function, and count: anything may be compiled and captured in warm-up, nothing after it."""
        graphs, captures = graphs_so_far(), captures_so_far()
        stance = "fail_on_recompile" if self.is_warm else "default"
        try:
            with torch.no_grad(), torch.compiler.set_stance(stance):
                result = call()
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            # dynamo names guards that failed; no guard has failed when it no longer has the graph
            gone = "" if "guard failure" in str(error) else "; dynamo has dropped the graph (torch._dynamo.reset()?)"
            raise RecompileError(f"Server: {what} does not fit its graph after warm-up: {error}{gone}") from error
        graphs, captures = graphs_so_far() - graphs, captures_so_far() - captures
        self._statistics.captures += captures
        if not self.is_warm:
            self._statistics.graphs += graphs
            return result
        self._statistics.recompiles += graphs
        if captures:
            raise RecompileError(
                f"Server: {what} was captured again after warm-up; weights and buffers of the model must stay at their "
                "addresses"
            )
        return result


def _compiled(function: Any, options: dict[str, Any]) -> Any:
    return torch.compile(function, backend="npugraph_ex", fullgraph=True, dynamic=False, options=options)
