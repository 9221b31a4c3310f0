"""The kernels that a served model needs beside MoE: norms, rotary positions, the paged cache, attention over it.

References are float64 and share no code with the kernels.
"""

import pytest
import torch

from moe_lowering import simulator

pytestmark = pytest.mark.filterwarnings("ignore")
simulator.enable_device("A3")
npu, atb = torch.ops.npu, torch.ops.atb
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK, HEADS, KV_HEADS, WIDTH = 4, 4, 2, 8


def close(actual, expected, dtype):
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    worst = (actual.double() - expected).abs().max() / expected.abs().max()
    assert actual.dtype == dtype and worst < limit, worst


# Norms


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    x, gamma = torch.randn(3, 5, 16).to(dtype), torch.randn(16).to(dtype)
    y, inverse = npu.npu_rms_norm(x, gamma, 1e-3)
    scale = 1 / (x.double().pow(2).sum(-1, keepdim=True) / 16 + 1e-3).sqrt()
    close(y, x.double() * scale * gamma.double(), dtype)
    close(inverse, scale, torch.float32)
    assert inverse.shape == (3, 5, 1) == npu.npu_rms_norm(x.to("meta"), gamma.to("meta"), 1e-3)[1].shape
    with pytest.raises(ValueError, match=r"npu_rms_norm: gamma is \[15\]; accepted: the last axes of x, \[3, 5, 16\]"):
        npu.npu_rms_norm(x, gamma[:15])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype):
    x, other, gamma = torch.randn(5, 16).to(dtype), torch.randn(5, 16).to(dtype), torch.randn(16).to(dtype)
    y, _, total = npu.npu_add_rms_norm(x, other, gamma)
    assert torch.equal(total, x + other)
    close(y, torch.nn.functional.rms_norm(total.double(), (16,), gamma.double(), 1e-6), dtype)
    with pytest.raises(ValueError, match="npu_add_rms_norm: x2 is"):
        npu.npu_add_rms_norm(x, other[:4], gamma)


# Rotary positions: a pair of numbers is a complex number that turns


def turned(x, angles, pairs):
    """x [..., D] in float64 with each pair of ``pairs`` (two index lists) turned by angles [..., D / 2]."""
    first, second = pairs
    numbers = torch.complex(x[..., first].double(), x[..., second].double()) * torch.polar(
        angles.double() * 0 + 1, angles
    )
    out = x.double().clone()
    out[..., first], out[..., second] = numbers.real, numbers.imag
    return out


def pairs_of(width, mode):
    half = width // 2
    return (range(half), range(half, width)) if mode == "half" else (range(0, width, 2), range(1, width, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary_mul_and_apply(dtype, mode):
    x, angles = torch.randn(2, 3, 4, 8).to(dtype), torch.rand(2, 3, 1, 4).double() * 6
    pairs = [list(p) for p in pairs_of(8, mode)]
    both = torch.empty(2, 3, 1, 8, dtype=torch.float64)
    both[..., pairs[0]], both[..., pairs[1]] = angles, angles
    cos, sin = both.cos().float(), both.sin().float()
    expected = turned(x, angles, pairs)
    close(npu.npu_rotary_mul(x, cos, sin, mode), expected, dtype)
    query, key = npu.npu_apply_rotary_pos_emb(x, x[:, :, :1], cos, sin, "BSND", mode)
    close(query, expected, dtype)
    close(key, expected[:, :, :1], dtype)
    with pytest.raises(ValueError, match="rotary_mode is 'quarter'; the CPU kernel computes only"):
        npu.npu_rotary_mul(x, cos, sin, "quarter")


def test_interleave_rope_sorts_pairs_into_halves():
    x, angles = torch.randn(2, 1, 3, 8), torch.rand(2, 1, 3, 4).double() * 6
    cos, sin = (f(torch.cat([angles, angles], -1)).float() for f in (torch.cos, torch.sin))
    by_pairs = turned(x, angles, [list(p) for p in pairs_of(8, "interleave")])
    expected = torch.cat([by_pairs[..., ::2], by_pairs[..., 1::2]], -1)
    close(npu.npu_interleave_rope(x, cos, sin), expected, torch.float32)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_rotary_embedding_in_place(neox, width, device):
    positions = torch.tensor([3, 0, 6])
    angles = torch.rand(7, width // 2).double() * 6
    cache = torch.cat([angles.cos(), angles.sin()], -1).float()
    query, key = torch.randn(3, 2 * 8), torch.randn(3, 8)
    pairs = [list(p) for p in pairs_of(width, "half" if neox else "interleave")]
    expected = [turned(t.view(3, -1, 8), angles[positions][:, None], pairs).reshape(t.shape) for t in (query, key)]
    given = [t.to(device) for t in (positions, query, key)]
    atb._npu_rotary_embedding(*given, 8, cache.to(device), neox)
    for actual, right in zip(given[1:], expected, strict=True):
        close(actual.cpu(), right, torch.float32)
    with pytest.raises(ValueError, match="positions is 0 to 7; accepted: 0 to 6"):
        atb._npu_rotary_embedding(torch.tensor([7, 0, 6]), query, key, 8, cache, neox)


# The paged cache and attention


def test_reshape_and_cache_writes_slots_and_leaves_negative_ones():
    key, value = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    caches = [torch.zeros(3, BLOCK, 2, 8, device="npu") for _ in range(2)]
    slots = torch.tensor([9, -1, 2, 3], dtype=torch.int32)
    atb._npu_reshape_and_cache(key.npu(), value.npu(), *caches, slots.npu())
    for rows, cache in zip((key, value), caches, strict=True):
        expected = torch.zeros(12, 2, 8)
        expected[9], expected[2], expected[3] = rows[0], rows[2], rows[3]
        assert torch.equal(cache.cpu().view(12, 2, 8), expected)
    with pytest.raises(ValueError, match="slot_indices is 4 up to 12; accepted: 4 below 12"):
        atb._npu_reshape_and_cache(key, value, *(c.cpu() for c in caches), slots + 3)


def test_matmul_add():
    x, weight, total = torch.randn(2, 4).half(), torch.randn(2, 3).half(), torch.randn(4, 3)
    expected = total.double() + x.double().t() @ weight.double()
    atb._npu_matmul_add_fp32(x, weight, total)
    close(total, expected, torch.float32)
    with pytest.raises(ValueError, match=r"C is torch.float16 \[4, 3\]; accepted: float32"):
        atb._npu_matmul_add_fp32(x, weight, total.half())


class Batch:
    """Requests with their keys in a paged cache: the last of each request's tokens are its queries."""

    def __init__(self, dtype, queries=(3, 1, 6), keys=(9, 1, 6), padding=2):
        torch.manual_seed(0)
        self.dtype, self.queries, self.keys = dtype, queries, keys
        self.query = torch.randn(sum(queries) + padding, HEADS, WIDTH).to(dtype)
        self.rows = [
            (torch.randn(n, KV_HEADS, WIDTH).to(dtype), torch.randn(n, KV_HEADS, WIDTH).to(dtype)) for n in keys
        ]
        order = torch.randperm(16)
        self.table = order[:12].reshape(3, 4).int()
        self.caches = [torch.full((16, BLOCK, KV_HEADS, WIDTH), float("nan"), dtype=dtype) for _ in range(2)]
        for request, rows in enumerate(self.rows):
            for cache, values in zip(self.caches, rows, strict=True):
                for place, value in enumerate(values):
                    cache[self.table[request, place // BLOCK], place % BLOCK] = value
        self.ends = torch.tensor(queries).cumsum(0).tolist()

    def reference(self, window=None):
        """One query at a time, in float64."""
        outputs, logarithms = [], []
        for request, (keys, values) in enumerate(self.rows):
            for i in range(self.queries[request]):
                query = self.query[self.ends[request] - self.queries[request] + i].double()
                last = self.keys[request] - self.queries[request] + i
                first = 0 if window is None else max(0, last - window)
                each = []
                for head in range(HEADS):
                    group = head // (HEADS // KV_HEADS)
                    scores = keys[first : last + 1, group].double() @ query[head] * 0.3
                    each.append(
                        (torch.softmax(scores, 0) @ values[first : last + 1, group].double(), scores.exp().sum().log())
                    )
                outputs.append(torch.stack([y for y, _ in each]))
                logarithms.append(torch.stack([logarithm for _, logarithm in each]))
        return torch.stack(outputs), torch.stack(logarithms).unsqueeze(-1)

    def arguments(self, **changes):
        return {
            "query": self.query, "key": self.caches[0], "value": self.caches[1], "block_table": self.table,
            "atten_mask": torch.ones(2048, 2048, dtype=torch.int8), "actual_seq_lengths": self.ends,
            "actual_seq_lengths_kv": list(self.keys), "num_heads": HEADS, "num_key_value_heads": KV_HEADS, "scale": 0.3,
            "input_layout": "TND", "sparse_mode": 3, "block_size": BLOCK, "next_tokens": 0, "softmax_lse_flag": True, **changes,
        }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("paged", [True, False])
def test_attention(dtype, window, paged):
    """Prefill (all queries), chunks (some of them) and decode (one) in one batch."""
    batch = Batch(dtype)
    changes = {} if window is None else {"sparse_mode": 4, "pre_tokens": window}
    if not paged:
        key, value = (torch.cat(rows) for rows in zip(*batch.rows, strict=True))
        ends = torch.tensor(batch.keys).cumsum(0).tolist()
        changes |= {"key": key, "value": value, "block_table": None, "block_size": 0, "actual_seq_lengths_kv": ends}
    y, logarithm = npu.npu_fused_infer_attention_score(**batch.arguments(**changes))
    expected, expected_logarithm = batch.reference(window)
    close(y[:10], expected, dtype)
    close(logarithm[:10], expected_logarithm, torch.float32)
    assert y[10:].isnan().all()  # no request has these


def test_the_second_version_and_rows_of_heads():
    """Other names, and a cache whose heads are one axis."""
    batch = Batch(torch.float32)
    names = {"num_heads": "num_query_heads", "scale": "softmax_scale", "actual_seq_lengths": "actual_seq_qlen",
             "actual_seq_lengths_kv": "actual_seq_kvlen", "softmax_lse_flag": "return_softmax_lse"}  # fmt: skip
    flat = {name: batch.caches[i].flatten(2) for i, name in enumerate(("key", "value"))}
    given = {names.get(name, name): value for name, value in batch.arguments(**flat).items()}
    y, _ = npu.npu_fused_infer_attention_score_v2(**given)
    close(y[:10], batch.reference()[0], torch.float32)


def test_a_query_without_keys_gives_zero():
    """What pads a batch in a captured graph."""
    batch = Batch(torch.float32)
    y, _ = npu.npu_fused_infer_attention_score(**batch.arguments(actual_seq_lengths_kv=[9, 0, 6]))
    expected = batch.reference()[0]
    expected[3] = 0
    close(y[:10], expected, torch.float32)


def test_positions_have_a_part_of_their_own():
    """MLA: query and key are the content's part, then the positions'."""
    batch = Batch(torch.float32)
    parts = {"query": batch.query[..., :6], "query_rope": batch.query[..., 6:], "key": batch.caches[0][..., :6],
             "key_rope": batch.caches[0][..., 6:]}  # fmt: skip
    y, _ = npu.npu_fused_infer_attention_score(**batch.arguments(**parts))
    close(y[:10], batch.reference()[0], torch.float32)


ROWS = torch.zeros(12, KV_HEADS, 8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input_layout": "BSH"}, "input_layout is 'BSH'; the CPU kernel computes only: 'TND'"),
        ({"sparse_mode": 2}, "sparse_mode is 2; the CPU kernel computes only"),
        ({"atten_mask": None}, "atten_mask is None; accepted: a mask"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; accepted: a divisor of num_heads = 4"),
        ({"actual_seq_lengths": [3, 2, 10]}, "actual_seq_lengths is .* never decrease"),
        ({"actual_seq_lengths_kv": [9, 1]}, "actual_seq_lengths_kv is .* one for each of 3 requests"),
        ({"actual_seq_lengths_kv": [9, 1, 99]}, "block_size is 4; accepted: .* 99 keys within the block table"),
        ({"block_size": 8}, "block_size is 8; accepted: that of the cache"),
        ({"query_rope": torch.zeros(12, HEADS, 2)}, "key_rope is None; accepted: a tensor, as query_rope is one"),
        (
            {"sparse_mode": 4, "pre_tokens": 3, "next_tokens": 2},
            "next_tokens is 2; the CPU kernel computes only: 0 with",
        ),
        *(
            ({"antiquant_scale": scale}, "antiquant_scale is given; the CPU kernel computes only: none of quantisation")
            for scale in (torch.ones(1), torch.zeros(1), torch.ones(3))
        ),
        *(
            (
                {"block_table": None, "key": ROWS, "value": ROWS, "actual_seq_lengths_kv": ends},
                "actual_seq_lengths_kv is .* never",
            )
            for ends in ([9, 3, 10], [9, 10, 13])
        ),
    ],
)
def test_attention_refuses(changes, says):
    batch = Batch(torch.float32)
    with pytest.raises(ValueError, match=f"npu_fused_infer_attention_score: {says}"):
        npu.npu_fused_infer_attention_score(**batch.arguments(**changes))


def on_npu(arguments):
    return {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def test_attention_into_given_tensors_eager_and_captured():
    batch = Batch(torch.float32, padding=0)
    expected = batch.reference()[0]
    given = on_npu(batch.arguments())
    out = [torch.empty(10, HEADS, WIDTH, device="npu"), torch.empty(10, HEADS, 1, device="npu")]
    returned = npu.npu_fused_infer_attention_score.out(**given, out=out)
    assert returned[0] is out[0]
    close(out[0].cpu(), expected, torch.float32)
    workspace = npu._npu_fused_infer_attention_score_get_max_workspace(**given)
    assert workspace.dtype == torch.uint8 and workspace.device.type == "npu"
    out[0].zero_()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        npu.npu_fused_infer_attention_score.out(**given, workspace=workspace, out=out)
    assert not out[0].cpu().any()  # recorded, not computed
    graph.replay()
    close(out[0].cpu(), expected, torch.float32)


# Device


def test_generators():
    """Equal seeds give equal numbers, calls differ, a state that is put back gives them again."""
    first, second = (torch.Generator(device="npu").manual_seed(7) for _ in range(2))
    state = first.get_state()
    a, b = (torch.empty(64, device="npu").uniform_(generator=first).cpu() for _ in range(2))
    assert torch.equal(torch.empty(64, device="npu").uniform_(generator=second).cpu(), a) and not torch.equal(a, b)
    first.set_state(state)
    assert torch.equal(torch.empty(64, device="npu").uniform_(generator=first).cpu(), a)
    second.manual_seed(8)
    assert not torch.equal(torch.rand(64, device="npu", generator=second).cpu(), a)
    with pytest.raises(RuntimeError, match="Expected a 'npu' device type for generator but found 'cpu'"):
        torch.empty(4, device="npu").uniform_(generator=torch.Generator())


def test_free_memory_shrinks_by_what_is_allocated():
    before, total = torch.npu.mem_get_info()
    kept = torch.empty(2**26, device="npu")
    after, same = torch.npu.mem_get_info()
    assert same == total == 64 * 2**30 and 0 <= before - after - 4 * 2**26 < 2**25
    del kept
