"""What MLA needs on the simulator beside attention over rows: its cache, its decode layout, a product that permutes. float64."""

import pytest
import torch

from moe_lowering import simulator

pytestmark = pytest.mark.filterwarnings("ignore")
simulator.enable_device("A3")
npu = torch.ops.npu
LATENT, ROPE, BLOCK = 16, 8, 4
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def close(actual, expected, dtype):
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() / expected.abs().max() < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_of_mla(dtype):
    torch.manual_seed(0)
    kv, gamma = torch.randn(3, 1, 1, LATENT + ROPE).to(dtype), torch.rand(LATENT).to(dtype)
    angles = torch.rand(3, 1, 1, ROPE // 2).double()
    cos, sin = (f(angles).repeat(1, 1, 1, 2).to(dtype) for f in (torch.cos, torch.sin))
    caches = torch.zeros(2, BLOCK, 1, ROPE).to(dtype), torch.zeros(2, BLOCK, 1, LATENT).to(dtype)
    slots = torch.tensor([5, -1, 0])
    call = npu.npu_kv_rmsnorm_rope_cache
    result = call(kv, gamma, cos, sin, slots, *caches, epsilon=1e-3, cache_mode="PA", is_output_kv=True)
    wide = kv.double()
    scale = (wide[..., :LATENT].square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    latent = wide[..., :LATENT] * scale * gamma.double()
    pairs = torch.view_as_complex(wide[..., LATENT:].reshape(3, 1, 1, ROPE // 2, 2).contiguous())
    half = ROPE // 2
    turned = pairs * torch.complex(cos[..., :half].double(), sin[..., :half].double())
    rope = torch.cat([turned.real, turned.imag], -1)
    close(result[2], rope, dtype)
    close(result[3], latent, dtype)
    for cache, rows in zip(caches, (rope, latent), strict=True):
        flat = cache.reshape(2 * BLOCK, -1)
        close(flat[[5, 0]], rows.reshape(3, -1)[[0, 2]], dtype)
        assert flat.abs().sum(1).count_nonzero() == 2  # a negative slot stores nothing
    without = call(kv, gamma, cos, sin, slots, *caches, epsilon=1e-3, cache_mode="PA")
    assert without[2].isnan().all() and without[3].isnan().all()
    with pytest.raises(ValueError, match=r"npu_kv_rmsnorm_rope_cache: index is 3 up to 8; accepted: 3 below 8"):
        call(kv, gamma, cos, sin, slots + 3, *caches, cache_mode="PA")
    with pytest.raises(ValueError, match="cache_mode is 'Norm'; the CPU kernel computes only: 'PA'"):
        call(kv, gamma, cos, sin, slots, *caches)


def test_on_the_device_the_callers_caches_are_written():
    kv, gamma = torch.randn(1, 1, 1, LATENT + ROPE).npu(), torch.ones(LATENT).npu()
    cos, sin = torch.ones(1, 1, 1, ROPE).npu(), torch.zeros(1, 1, 1, ROPE).npu()
    caches = torch.zeros(2, BLOCK, 1, ROPE).npu(), torch.zeros(2, BLOCK, 1, LATENT).npu()
    slot = torch.tensor([6]).npu()
    npu.npu_kv_rmsnorm_rope_cache(kv, gamma, cos, sin, slot, *caches, epsilon=1e-5, cache_mode="PA")
    for cache in caches:
        flat = cache.cpu().reshape(2 * BLOCK, -1)
        assert flat[6].abs().sum() > 0 and flat.abs().sum(1).count_nonzero() == 1


def test_decode_over_the_paged_latents():
    """BNSD_NBSD: one query of each request, one key head for all; the values are the latents themselves."""
    torch.manual_seed(0)
    heads, lengths, table = 4, [5, 2], torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)
    latents, ropes = torch.randn(4, 1, BLOCK, LATENT), torch.randn(4, 1, BLOCK, ROPE)
    query, query_rope = torch.randn(2, heads, 1, LATENT), torch.randn(2, heads, 1, ROPE)
    arguments = {
        "query_rope": query_rope, "key_rope": ropes, "num_query_heads": heads, "num_key_value_heads": 1, "softmax_scale": 0.3,
        "input_layout": "BNSD_NBSD", "block_table": table, "block_size": BLOCK, "actual_seq_kvlen": lengths, "sparse_mode": 0,
    }  # fmt: skip
    y, _ = npu.npu_fused_infer_attention_score_v2(query, latents, latents, **arguments)
    assert y.shape == (heads, 2, 1, LATENT)
    for request, length in enumerate(lengths):
        blocks = table[request].long()
        keys = latents[blocks].reshape(-1, LATENT)[:length].double()
        positions = ropes[blocks].reshape(-1, ROPE)[:length].double()
        for head in range(heads):
            scores = keys @ query[request, head, 0].double() + positions @ query_rope[request, head, 0].double()
            expected = torch.softmax(scores * 0.3, 0) @ keys
            torch.testing.assert_close(y[head, request, 0].double(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"query is \[2, 4, 2, 16\]; the CPU kernel computes only: \[B, N, 1, D\]"):
        npu.npu_fused_infer_attention_score_v2(query.repeat(1, 1, 2, 1), latents, latents, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_that_permutes(dtype):
    x, weight = torch.randn(3, 5, 4).to(dtype), torch.randn(3, 4, 6).to(dtype)
    y = npu.npu_transpose_batchmatmul(x, weight, perm_y=[1, 0, 2])
    close(y, torch.einsum("bmk,bkn->mbn", x.double(), weight.double()), dtype)
    assert y.is_contiguous()
    swapped = npu.npu_transpose_batchmatmul(x.transpose(0, 1).contiguous(), weight, perm_x1=[1, 0, 2], perm_y=[1, 0, 2])
    assert torch.equal(swapped, y)
    with pytest.raises(ValueError, match=r"weight is \[3, 3, 6\] after perm_x2; accepted: \[3, 4, N\]"):
        npu.npu_transpose_batchmatmul(x, weight[:, :3], perm_y=[1, 0, 2])
