"""CPU kernels of npu_fused_infer_attention_score and its second version.

They compute attention over a packed batch, with keys and values from a paged cache or from rows. Only the form that
vllm-ascend calls: layout TND, no quantisation, no prefix, no position bias; others are refused. float32 inside, rounded
once.

Meaning: torch_npu 2.13.0's documentation, aclnnFusedInferAttentionScoreV3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moe_lowering.simulator.kernels.common import Kernel, make_undefined, refuse, refuse_unsimulated

NAME, NAME_V2 = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"
LAYOUT = "TND"
# [B, N, 1, D] -> [N, B, 1, D]: one query of each request, as MLA decodes.
DECODE_LAYOUT = "BNSD_NBSD"
WHOLE, CAUSAL, BAND = 0, 3, 4  # sparse_mode; 3 aligns the last query with the last key, 4 looks back over a window too
# What the second version calls the arguments that are read here.
V2_NAMES = {
    "num_query_heads": "num_heads",
    "softmax_scale": "scale",
    "actual_seq_qlen": "actual_seq_lengths",
    "actual_seq_kvlen": "actual_seq_lengths_kv",
    "return_softmax_lse": "softmax_lse_flag",
}


class AttentionCall(NamedTuple):
    """What the kernel reads of a call's arguments."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    actual_seq_lengths: Sequence[int] | None
    actual_seq_lengths_kv: Sequence[int] | None
    block_table: torch.Tensor | None
    query_rope: torch.Tensor | None
    key_rope: torch.Tensor | None
    atten_mask: torch.Tensor | None
    num_heads: int
    num_key_value_heads: int
    scale: float
    input_layout: str
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    block_size: int
    softmax_lse_flag: bool


# Arguments that change nothing here: how exactly a device computes, and of what dtype it takes what is not there to be.
WITHOUT_EFFECT = {"inner_precise", "workspace", "antiquant_mode", "key_antiquant_mode", "value_antiquant_mode"}


def attention(operator: str, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """query [T, N, D], key and value [T_kv, N_kv, D] or a cache [blocks, block_size, N_kv, D] (or N_kv * D in one axis) ->
    y [T, N, D_v], and the logarithm of the softmax's sum [T, N, 1] float32 (one undefined number without the flag).

    ``actual_seq_lengths`` are where each request's queries end, ``actual_seq_lengths_kv`` how many keys it has in the cache, or,
    without a cache, where they end. Rows past the last end are undefined; a query without any key gives zero.
    """
    call = _read_call(operator, arguments)
    ends, key_ends = _lengths(operator, call)
    y = make_undefined((*call.query.shape[:2], call.value.shape[-1] if call.block_table is None else _value_width(call)),
                       call.query.dtype)  # fmt: skip
    logarithms = make_undefined((*call.query.shape[:2], 1), torch.float32)
    start = 0
    for request, end in enumerate(ends):
        if end > start:
            keys, values = _keys_of(operator, call, request, key_ends)
            queries = _joined(call.query, call.query_rope)[start:end]
            out, logarithm = _attend(operator, call, queries.float(), keys.float(), values.float())
            y[start:end], logarithms[start:end] = out.to(y.dtype), logarithm
        start = max(start, end)
    return y, logarithms if call.softmax_lse_flag else make_undefined((1,), torch.float32)


def decode_attention(operator: str, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """``attention`` in layout BNSD_NBSD: query [B, N, 1, D] -> y [N, B, 1, D_v] and the logarithms [B, N, 1, 1]."""
    rows = {name: arguments[name] for name in ("query", "query_rope") if arguments[name] is not None}
    for name, tensor in rows.items():
        if tensor.dim() != 4 or tensor.shape[2] != 1:
            refuse_unsimulated(operator, name, f"{list(tensor.shape)}", f"[B, N, 1, D] in layout {DECODE_LAYOUT}")
    requests = len(arguments["query"])
    ends = next(name for name in ("actual_seq_qlen", "actual_seq_lengths") if name in arguments)
    packed = {name: tensor.squeeze(2) for name, tensor in rows.items()}
    y, logarithms = attention(
        operator, {**arguments, **packed, ends: list(range(1, requests + 1)), "input_layout": LAYOUT}
    )
    return y.unsqueeze(2).transpose(0, 1).contiguous(), logarithms.unsqueeze(2) if logarithms.dim() == 3 else logarithms


def _read_call(operator: str, arguments: dict[str, Any]) -> AttentionCall:
    given = {V2_NAMES.get(name, name): value for name, value in arguments.items()}
    others = {
        name: value
        for name, value in given.items()
        if name not in AttentionCall._fields and name not in WITHOUT_EFFECT and not _is_left_out(value)
    }
    if others:
        refuse_unsimulated(
            operator, ", ".join(others), "given", "none of quantisation, prefix, padding, bias and sinks"
        )
    call = AttentionCall(**{name: given[name] for name in AttentionCall._fields})
    if call.input_layout != LAYOUT:
        refuse_unsimulated(operator, "input_layout", repr(call.input_layout), f"{LAYOUT!r}, {DECODE_LAYOUT!r}")
    if call.sparse_mode not in (WHOLE, CAUSAL, BAND) or (call.sparse_mode == WHOLE and call.atten_mask is not None):
        refuse_unsimulated(operator, "sparse_mode", call.sparse_mode, "0 without a mask, 3 (causal), 4 (a window)")
    if call.sparse_mode == BAND and call.next_tokens:
        refuse_unsimulated(
            operator, "next_tokens", call.next_tokens, "0 with sparse_mode 4: no key after the query's own"
        )
    if (call.sparse_mode == WHOLE) != (call.atten_mask is None):
        refuse(operator, "atten_mask", "None", "a mask [2048, 2048] with sparse_mode 3 or 4")
    if call.query_rope is not None and call.block_table is not None and call.key_rope is None:
        refuse(operator, "key_rope", "None", "a tensor, as query_rope is one")
    if call.query.dim() != 3 or call.query.shape[1] != call.num_heads:
        refuse(operator, "query", f"{list(call.query.shape)}", f"[T, num_heads = {call.num_heads}, D]")
    heads = call.num_key_value_heads or call.num_heads
    if call.num_heads % heads:
        refuse(operator, "num_key_value_heads", heads, f"a divisor of num_heads = {call.num_heads}")
    return call._replace(num_key_value_heads=heads)


def _is_left_out(value: Any) -> bool:
    """Whether an argument is None, or a number that is zero. A tensor is given, whatever it holds."""
    return value is None or (isinstance(value, (int, float)) and value == 0)


def _lengths(operator: str, call: AttentionCall) -> tuple[list[int], list[int]]:
    ends = [int(end) for end in call.actual_seq_lengths or ()]
    key_ends = [int(end) for end in call.actual_seq_lengths_kv or ()]
    if not ends or sorted(ends) != ends or ends[0] < 0 or ends[-1] > len(call.query):
        refuse(operator, "actual_seq_lengths", ends, f"ends that never decrease, up to {len(call.query)} queries")
    if len(key_ends) < len(ends) or min(key_ends) < 0:
        refuse(operator, "actual_seq_lengths_kv", key_ends, f"one for each of {len(ends)} requests, 0 or more")
    if call.block_table is None and (sorted(key_ends) != key_ends or key_ends[-1] > len(call.key)):
        refuse(operator, "actual_seq_lengths_kv", key_ends, f"ends that never decrease, up to {len(call.key)} keys")
    return ends, key_ends


def _joined(rows: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    return rows if rope is None else torch.cat([rows, rope], dim=-1)


def _value_width(call: AttentionCall) -> int:
    return call.value.shape[-1] if call.value.dim() == 4 else call.value.shape[-1] // call.num_key_value_heads


def _keys_of(operator: str, call: AttentionCall, request: int, ends: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys (with their positions' part) and values [S, N_kv, D] of one request."""
    if call.block_table is None:
        start = ends[request - 1] if request else 0
        rows = slice(start, ends[request])
        return _joined(call.key, call.key_rope)[rows], call.value[rows]
    length, size = ends[request], call.block_size
    count = -(-length // size)
    if (
        size != call.key.shape[1 if call.key.dim() < 4 or call.key.shape[1] == size else 2]
        or count > call.block_table.shape[1]
    ):
        refuse(
            operator,
            "block_size",
            size,
            f"that of the cache {list(call.key.shape)}, {length} keys within the block table",
        )
    blocks = call.block_table[request, :count].long()
    if count and (int(blocks.min()) < 0 or int(blocks.max()) >= len(call.key)):
        refuse(operator, "block_table", blocks.tolist(), f"0 to {len(call.key) - 1}")

    def gather(cache: torch.Tensor) -> torch.Tensor:
        """Of [blocks, size, N_kv, D], [blocks, N_kv, size, D] (which MLA writes for one head) or [blocks, size, N_kv * D]."""
        taken = cache[blocks]
        if cache.dim() == 4 and cache.shape[1] != size:
            taken = taken.transpose(1, 2)
        width = cache[0].numel() // (size * call.num_key_value_heads)
        return taken.reshape(count * size, call.num_key_value_heads, width)[:length]

    key = gather(call.key)
    return _joined(key, None if call.key_rope is None else gather(call.key_rope)), gather(call.value)


def _attend(
    operator: str, call: AttentionCall, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """queries [n, N, D], keys and values [S, N_kv, D] -> [n, N, D_v] and [n, N, 1]."""
    shared = call.num_heads // call.num_key_value_heads
    keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * call.scale
    places = len(keys) - len(queries) + torch.arange(len(queries)).unsqueeze(1)  # of each query among the keys
    offsets = torch.arange(len(keys)).unsqueeze(0) - places
    if call.sparse_mode in (CAUSAL, BAND):
        scores = scores.masked_fill(offsets > 0, float("-inf"))
    if call.sparse_mode == BAND:
        scores = scores.masked_fill(offsets < -call.pre_tokens, float("-inf"))
    logarithm = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = torch.exp(scores - logarithm.where(logarithm.isfinite(), torch.zeros_like(logarithm)))
    return torch.einsum("hqk,khd->qhd", weights, values), logarithm.permute(1, 0, 2)


def _in_layout(operator: str, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return (decode_attention if arguments["input_layout"] == DECODE_LAYOUT else attention)(operator, arguments)


def fused_infer_attention_score(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``attention``, ``decode_attention``."""
    return _in_layout(NAME, arguments)


def fused_infer_attention_score_v2(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``attention``, ``decode_attention``."""
    return _in_layout(NAME_V2, arguments)


KERNELS: dict[str, Kernel] = {NAME: fused_infer_attention_score, NAME_V2: fused_infer_attention_score_v2}
