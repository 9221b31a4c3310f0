"""The two functions that a server compiles for a model: a decode step of one bucket, and the prefill of one prompt."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moe_lowering.integrations.transformers import token_mask

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]
Prefill = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
ATTENTION = ("sdpa", "eager")  # the attention that takes the mask which a decode step makes


def rename_function(function: Any, name: str) -> Any:
    """The same function with a code object of its own: dynamo keeps, checks and limits (to 8) its entries per code object."""
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, None, function.__closure__)


def decode_step(model: nn.Module, cache: Cache, max_length: int) -> Decode:
    """The step of a bucket: (tokens [B, 1], positions [B, 1], mask [B]) -> the next tokens [B].

    Row b attends to positions 0 to ``positions[b]`` of its own row. A row without a request is at position 0 of a free
    row, so that its attention is finite, and its mask is False.
    """
    known: Any = model
    additive = known.config._attn_implementation == "eager"

    def decode(tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        columns = torch.arange(max_length, device=tokens.device)
        attention = columns <= positions[:, None, None, :]
        if additive:
            lowest = torch.finfo(known.dtype).min
            attention = torch.zeros_like(attention, dtype=known.dtype).masked_fill(~attention, lowest)
        with token_mask(mask):
            logits = model(
                input_ids=tokens,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).logits
        return logits[:, -1].argmax(-1)

    return decode


def prefill_step(model: nn.Module, cache: Cache) -> Prefill:
    """The prefill: (tokens [1, S], index of the last real one [1], mask [S] or None) -> the next token [1].

    Padding comes after the prompt, where causal attention does not see it.
    """

    def run(tokens: Tensor, last: Tensor) -> Tensor:
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=last).logits
        return logits[:, -1].argmax(-1)

    def prefill(tokens: Tensor, last: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return run(tokens, last)
        with token_mask(mask):
            return run(tokens, last)

    return prefill
