"""Device "npu" of the simulator, without graphs: what the CPU computes, on memory of the device."""

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from moe_lowering import simulator


@pytest.fixture(scope="module", autouse=True)
def device():
    simulator.enable_device()


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
Q = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([5, 0, 3, 3])


def mutated(a):
    b = a.clone()
    b[b > 0] = 0
    b[1:3, ::2] = 7
    b[:, 0] *= 2
    b.t()[0] += 1
    return b


CASES = {
    "arithmetic": (lambda a: (a + 1) * a / 3 - a.pow(2), X),
    "scalars of the host": (lambda a: a * torch.tensor(2.0), X),
    "casts": (lambda a: a.half().bfloat16().to(torch.int32), X),
    "non-contiguous": (lambda a: a.t().contiguous() + a.t(), X),
    "strided copy": (lambda a: a[:, ::2].clone(), X),
    "casting copy_": (lambda a: torch.empty(8, 6, dtype=torch.float64, device=a.device).copy_(a.t()), X),
    "broadcast copy_": (lambda a: torch.empty(2, 6, 8, device=a.device).copy_(a), X),
    "in-place, slices, masks": (mutated, X),
    "views": (lambda a: [c.contiguous() for c in a.chunk(2, -1)] + [a[:, None].expand(6, 3, 8).reshape(18, 8)], X),
    "reductions": (lambda a: (a.sum(0), a.mean(), a.var(-1), a.amax(-1), a.max(-1), a.norm()), X),
    "sorting": (lambda a: (a.sort(-1), a.topk(3), a.argsort(-1), a.cumsum(0)), X),
    "matmul": (lambda a: (a @ a.t(), F.linear(a, a, a[:, 0]), torch.bmm(a[None], a.t()[None])), X),
    "index": (lambda a, i: (a[i], F.embedding(i, a), a.clone().index_add_(0, i, a[:4])), X, ROWS),
    "gather, scatter": (lambda a, i: torch.zeros_like(a).scatter_add(0, i, a.gather(0, i)), X, ROWS[:, None].expand(4, 8)),
    "sizes from data": (lambda a: (a.nonzero(), a[a > 0], a.unique()), X),
    "repeat_interleave": (lambda a, i: a.repeat_interleave(i, 0), X, torch.arange(6)),
    "one_hot": (lambda i: F.one_hot(i, 6), ROWS),
    "norms": (lambda a: (F.layer_norm(a, (8,)), F.rms_norm(a, (8,)), F.silu(a), F.gelu(a), a.softmax(-1)), X),
    "attention": (lambda a: F.scaled_dot_product_attention(a, a.flip(-1), a), Q),
    "causal attention": (lambda a: F.scaled_dot_product_attention(a, a, a, is_causal=True), Q),
    "masked attention": (
        lambda a, m: F.scaled_dot_product_attention(a, a, a, attn_mask=m), Q, torch.ones(8, 8).tril().bool(),
    ),
    "grouped query attention": (
        lambda a: F.scaled_dot_product_attention(a, a[:, :2], a[:, :2], enable_gqa=True), Q,
    ),
    "complex": (lambda a: torch.view_as_real(torch.view_as_complex(a.reshape(6, 4, 2)) * 2), X),
    "factories": (lambda a: (torch.arange(8, device=a.device), torch.full((2,), 1.5, device=a.device), a.new_zeros(2)), X),
    "read by the host": (lambda a: (a[0, 0].item(), bool(a[0, 0] > 0), a.tolist(), torch.equal(a, a)), X),
    "no kernel in torch_npu": (lambda a: torch.special.airy_ai(a), X),
    "npu operator": (lambda a: torch.ops.npu.npu_swiglu(a), X),
    "moe_lowering operator": (lambda a: torch.ops.moe_lowering.route(a, None, 2, "softmax", True, 1, 1, "max", 1.0), X),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gives_what_the_cpu_gives(case):
    function, *inputs = CASES[case]
    expected = tree_leaves(function(*inputs))
    found = tree_leaves(function(*(x.npu() for x in inputs)))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, torch.Tensor):
            assert a.device.type == "npu" and a.dtype == b.dtype
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6, equal_nan=True)
        else:
            assert a == b


def test_views_share_memory_and_copies_do_not():
    x = torch.zeros(4, 6, device="npu")
    view, copy_ = x[1:3].t(), x.clone()
    view += 1
    assert x.sum().item() == 12 and copy_.sum().item() == 0
    assert view.data_ptr() == x.data_ptr() + 6 * 4


def test_out_arguments():
    a = X.npu()
    given, empty = torch.zeros(6, 6, device="npu"), torch.empty(0, device="npu")
    torch.mm(a, a.t(), out=given)
    torch.mm(a, a.t(), out=empty)
    assert torch.equal(given.cpu(), empty.cpu()) and torch.allclose(given.cpu(), X @ X.t())
    with pytest.raises(RuntimeError, match="resize"):  # what the CPU only warns about, memory of the device cannot do
        torch.mm(a, a.t(), out=torch.zeros(2, 2, device="npu"))


def test_modules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    there = copy.deepcopy(model).to("npu")
    torch.testing.assert_close(there(X.npu()).cpu(), model(X))
    loss, expected = there(X.npu()).square().sum(), model(X).square().sum()
    loss.backward(), expected.backward()
    torch.testing.assert_close(there[0].weight.grad.cpu(), model[0].weight.grad)
    stream = io.BytesIO()
    torch.save(there.state_dict(), stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, map_location="cpu")["0.bias"], model[0].bias)
    assert nn.Linear(4, 4, device="npu", dtype=torch.bfloat16).weight.isfinite().all().item()


def test_results_outlive_their_operands():
    """A result must not lie on memory that a dead temporary gave back."""
    results, expected = [], []
    for step in range(50):
        x = torch.full((64, 64), float(step), device="npu")
        results.append((x + 1) * 2)
        expected.append((step + 1) * 2.0)
        del x
        gc.collect() if step % 10 == 0 else None
    assert [r.unique().tolist() for r in results] == [[e] for e in expected]


def test_memory_comes_back():
    torch.npu.empty_cache()
    before = torch.npu.memory_allocated()
    x = torch.ones(1 << 20, device="npu")
    assert torch.npu.memory_allocated() >= before + (4 << 20)
    del x
    assert torch.npu.memory_allocated() == before


@pytest.mark.parametrize("other", ["cpu", "meta"])
def test_two_devices_do_not_mix(other):
    with pytest.raises(RuntimeError, match=r"same device|expected device"):
        X.npu() + X.to(other)
    assert torch.equal((X.npu() + torch.tensor(1.0)).cpu(), X + 1)  # a scalar may stay on the host
    assert torch.equal(X.npu()[ROWS].cpu(), X[ROWS])  # and so may indices


def test_a_generator_of_another_device_is_refused():
    with pytest.raises(RuntimeError, match="Expected a 'npu' device type for generator but found 'cpu'"):
        torch.empty(4, device="npu").normal_(generator=torch.Generator())


def test_npu_operators_refuse_on_the_device_what_they_refuse_on_the_cpu():
    call = torch.ops.npu.npu_moe_token_unpermute
    rows, indices = torch.randn(4, 8, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 9], dtype=torch.int32)
    for inputs in ((rows, indices), (rows.npu(), indices.npu())):
        with pytest.raises(ValueError, match="0 to 3"):
            call(*inputs)
    good = torch.arange(4, dtype=torch.int32)
    assert torch.equal(call(rows.npu(), good.npu()).cpu(), call(rows, good))


def test_streams_and_events():
    x, stream, event = torch.ones(4, device="npu"), torch.npu.Stream(), torch.npu.Event()
    with torch.npu.stream(stream):
        y = x * 2
        event.record()
    torch.npu.current_stream().wait_event(event)
    event.synchronize()
    assert y.tolist() == [2.0] * 4 and event.query()


def test_enabling_twice_changes_nothing():
    from moe_lowering.simulator.device import registration

    simulator.enable_device()
    assert registration.register() == 0
    assert tree_map(float, (torch.ones(1, device="npu") + 1).tolist()) == [2.0]
