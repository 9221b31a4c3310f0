"""A static key-value cache whose rows are at positions of their own, in transformers' cache interface.

transformers' ``StaticLayer`` has one position for the whole batch, so requests of different lengths cannot share it
without padding on the left. Here keys and values of a layer lie in one tensor [rows * max_length, heads, size]; token t
of row r is entry r * max_length + t. All buckets use the same tensors: a batch of B requests is the first B rows.

The entries to write come from a persistent tensor ``slots``, written outside of the graph. ``index_copy_`` is on the
whole tensor, a graph input, so that npugraph_ex's ``input_inplace_pass`` keeps it in place (a write through a view of an
input would copy the cache in every step).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache, StaticLayer

__all__ = ["KeyValues", "RowLayer", "allocate", "cache_view", "check_layers"]


@dataclasses.dataclass
class KeyValues:
    """The memory of one layer: keys and values, each [rows * max_length, heads, size]."""

    keys: Tensor
    values: Tensor
    max_length: int

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a row to another row."""
        for tensor in (self.keys, self.values):
            rows = tensor.view(-1, self.max_length, *tensor.shape[1:])
            rows[target, :length].copy_(rows[source, :length])


class RowLayer(CacheLayerMixin):
    """One layer of the cache as a model sees it.

    Args:
        store: the memory.
        slots: int64, the entry of each token that ``update`` is given, in order; read from its beginning.
        prefill: return what was given instead of the rows: the prompt begins with it.
    """

    is_compileable = True

    def __init__(self, store: KeyValues, slots: Tensor, prefill: bool) -> None:
        super().__init__()
        self.store, self.slots, self.prefill = store, slots, prefill
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, heads, S, size]; with prefill the same, else the first B rows [B, heads, L, size]."""
        batch, _, tokens, _ = key_states.shape
        slots = self.slots[: batch * tokens]
        updated = []
        for stored, new in ((self.store.keys, key_states), (self.store.values, value_states)):
            stored.index_copy_(0, slots, new.transpose(1, 2).reshape(batch * tokens, *stored.shape[1:]))
            rows = stored[: batch * self.store.max_length].view(batch, self.store.max_length, *stored.shape[1:])
            updated.append(new if self.prefill else rows.transpose(1, 2))
        return updated[0], updated[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("RowLayer has its memory from the beginning")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the prefill; decode steps bring their mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: a prefill begins at position 0; decode steps bring their positions."""
        return 0

    def get_max_length(self) -> int:
        return self.store.max_length


def cache_view(stores: list[KeyValues], slots: Tensor, prefill: bool) -> Cache:
    """The cache as one kind of call sees it."""
    return Cache(layers=[RowLayer(store, slots, prefill) for store in stores])


def check_layers(config: Any, max_length: int) -> None:
    """Refuse a model with a layer that needs more than keys and values of all tokens.

    Raises:
        ValueError: a layer with a state of its own (linear attention, an indexer), or with a window that is smaller than
            ``max_length``: decode steps mask nothing but the future.
    """
    for index, layer in enumerate(StaticCache(config=config, max_cache_len=max_length).layers):
        whole = isinstance(layer, StaticLayer) and layer.max_cache_len >= max_length
        if not whole or type(layer).__name__ not in ("StaticLayer", "StaticSlidingWindowLayer"):
            window = f" with a window of {layer.max_cache_len} tokens" if isinstance(layer, StaticLayer) else ""
            raise ValueError(
                f"Server: layer {index} has a {type(layer).__name__}{window}; accepted: attention over all tokens, or a "
                f"window of at least max_length = {max_length}"
            )


def allocate(model: nn.Module, rows: int, max_length: int) -> list[KeyValues]:
    """Zeroed memory for each layer, of the sizes that one token has; they are found with fake tensors."""
    device = next(model.parameters()).device
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), past_key_values=cache, use_cache=True)
    stores = []
    for layer in cache.layers:
        sizes = [((rows * max_length, t.shape[1], t.shape[3]), t.dtype) for t in (layer.keys, layer.values)]
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in sizes)
        for tensor in (keys, values):
            torch._dynamo.mark_static_address(tensor)
        stores.append(KeyValues(keys, values, max_length))
    return stores
