"""What servers, requests and models refuse, and that nothing is half done after it; token masks without a server."""

import pytest
import torch
from serving_models import TOP_K, VOCABULARY, make, small

from moe_lowering import Deployment, simulator
from moe_lowering.integrations.transformers import register, token_mask
from moe_lowering.serving import Request


@pytest.fixture(scope="module", autouse=True)
def enabled():
    simulator.enable_device()
    register()


REFUSED = {
    "too many buckets": ({"buckets": range(1, 66)}, "buckets has 65 sizes; accepted: at most capture_limit = 64"),
    "own capture limit": ({"buckets": (1, 2), "capture_limit": 1}, "accepted: at most capture_limit = 1"),
    "no capture limit": ({"capture_limit": 0}, r"Server: .*capture_limit is 0"),
    "capture limit": ({"capture_limit": "1"}, r"Server: .*capture_limit is '1'"),
    "unknown option": ({"foo": 1}, "Server: unknown option 'foo'; accepted: npugraph_ex's force_eager, "),
    "value of an option": ({"clone_input": 2}, "Server: option clone_input is 2: "),
    "buckets of text": ({"buckets": ("a",)}, r"Server: buckets\[0\] is 'a'; accepted: an int"),
    "fractions": ({"buckets": (1, 1.5)}, r"Server: buckets\[1\] is 1\.5; accepted: an int"),
    "flags": ({"buckets": (True,)}, r"Server: buckets\[0\] is True; accepted: an int"),
    "one bucket": ({"buckets": 2}, "Server: buckets is 2; accepted: a sequence of batch sizes"),
    "max_length of text": ({"max_length": "16"}, "Server: max_length is '16'; accepted: an int"),
    "a fraction of a prompt": ({"prefill_lengths": (8, 16.0)}, r"prefill_lengths\[1\] is 16\.0; accepted: an int"),
    "no buckets": ({"buckets": ()}, "accepted: ascending batch sizes"),
    "descending buckets": ({"buckets": (2, 1)}, r"buckets is \(2, 1\); accepted: ascending batch sizes"),
    "max_length": ({"max_length": 129}, "max_length is 129; accepted: 2 to max_position_embeddings = 128"),
    "prefill_lengths": ({"prefill_lengths": (4, 8)}, r"prefill_lengths is \(4, 8\); accepted: .* max_length = 16"),
    "expert parallelism": (
        {"deployment": Deployment(ep_size=2, ep_group="g")},
        "deployment.ep_size is 2; accepted: 1",
    ),
    "max_tokens": ({"deployment": Deployment(max_tokens=8)}, "deployment.max_tokens is 8; accepted: 0, or at least 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_servers(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        small(make(), **options)
    assert "\n" not in str(caught.value)  # torch_npu's own message has a traceback in it
    small(make(), buckets=range(1, 65))  # the twin of the first: as many as npugraph_ex takes


def test_refused_models():
    model = make()
    with pytest.raises(ValueError, match="training mode"):
        small(model.train())
    model.eval().set_experts_implementation("grouped_mm")
    with pytest.raises(ValueError, match="experts implementation 'grouped_mm'; accepted: 'moe_lowering'"):
        small(model)
    with pytest.raises(ValueError, match=r"window of 8 tokens; accepted: .* at least max_length = 16"):
        small(make("gpt_oss", "eager", sliding_window=8))
    model = make()
    model.model.layers[1].mlp.experts._apply_gate = lambda x: x
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts ignores token masks \(its _apply_gate is replaced"):
        small(model)


def test_refused_requests():
    server = small(make())
    refused = {
        Request([], 1): "prompt is empty",
        Request([1], 0): "max_new_tokens is 0; accepted: 1 or more",
        Request([1, VOCABULARY], 1): "prompt has token id 96; accepted: 0 to 95",
        Request([1], 1, stop_tokens=[-1]): "stop_tokens has token id -1",
        Request([1] * 11, 6): "prompt has 11 tokens and max_new_tokens is 6, together 17; accepted: .* max_length = 16",
    }
    for request, message in refused.items():
        with pytest.raises(ValueError, match=message):
            server.submit(request)
    assert server.submit(Request([1] * 11, 5)) == 0
    with pytest.raises(RuntimeError, match=r"accepted: warm_up\(\) first"):
        server.step()
    with pytest.raises(RuntimeError, match="submitted requests are running"):
        server.generate([Request([1], 1)])


def test_a_refused_generate_queues_nothing():
    server = small(make())
    with pytest.raises(RuntimeError, match=r"Server: generate before warm_up; accepted: warm_up\(\) first"):
        server.generate([Request([1], 1)])
    for wrong in (None, Request([1], 1)):
        with pytest.raises(ValueError, match=r"Server: requests is .*; accepted: a list of"):
            server.generate(wrong)
    with pytest.raises(ValueError, match="Server: request is None"):
        server.generate([Request([1], 1), None])
    with pytest.raises(ValueError, match=r"number is 0; accepted: .* one of \[\]"):
        server.cancel(0)
    assert server.submit(Request([1], 1)) == 0


def test_numbers_of_a_request_are_integers():
    refused = {
        "prompt\\[1\\] is 1.5": lambda: Request([1, 1.5], 2),
        "prompt\\[0\\] is True": lambda: Request([True], 2),
        "prompt\\[0\\] is 'a'": lambda: Request("ab", 2),
        "prompt is 5; accepted: a sequence of token ids": lambda: Request(5, 2),
        "max_new_tokens is 2.0": lambda: Request([1], 2.0),
        "max_new_tokens is True": lambda: Request([1], True),
        "stop_tokens\\[0\\] is None": lambda: Request([1], 2, stop_tokens=[None]),
    }
    for message, make_request in refused.items():
        with pytest.raises(ValueError, match=f"^Request: {message}"):
            make_request()
    request = Request(torch.tensor([1, 2]), torch.tensor(3), stop_tokens=range(2))
    assert (request.prompt, request.max_new_tokens, request.stop_tokens) == ((1, 2), 3, (0, 1))
    assert {type(n) for n in (*request.prompt, request.max_new_tokens)} == {int}


def test_token_mask_without_a_server():
    """Masked tokens get nothing from the experts, the others what they get without padding; the mask ends with its block."""
    experts = make().model.layers[0].mlp.experts
    x, weights = torch.randn(4, 64), torch.rand(4, TOP_K)
    ids = torch.rand(4, 8).topk(TOP_K).indices
    mask = torch.tensor([True, False, True, False])
    with torch.no_grad():
        whole = experts(x, ids, weights)
        with token_mask(mask):
            found = experts(x, ids, weights)
        torch.testing.assert_close(found[mask], whole[mask])
        assert found[~mask].count_nonzero() == 0 < whole[~mask].count_nonzero()
        assert torch.equal(experts(x, ids, weights), whole)
