"""Token counts of data parallel engines of vLLM, with stand-ins for vLLM's configuration and runner."""

from types import SimpleNamespace

import pytest

from moe_lowering.integrations import vllm
from moe_lowering.integrations.vllm_data_parallel import check_data_parallel
from moe_lowering.integrations.vllm_refusals import Refused

CONSUMER = SimpleNamespace(is_kv_consumer=True, kv_role="kv_consumer")
PRODUCER = SimpleNamespace(is_kv_consumer=False, kv_role="kv_producer")


def config(ranks, **changes):
    parallel = SimpleNamespace(data_parallel_size=ranks)
    return SimpleNamespace(
        **{"parallel_config": parallel, "use_v2_model_runner": False, "kv_transfer_config": None, **changes}
    )


@pytest.mark.parametrize("changes", [{"use_v2_model_runner": True}, {"kv_transfer_config": CONSUMER}])
def test_ranks_that_do_not_agree_on_tokens_are_refused(changes):
    with pytest.raises(Refused, match=r"^\[vllm.data_parallel\] .* of data parallel engines is .*; accepted: "):
        check_data_parallel(config(2, **changes))
    check_data_parallel(config(1, **changes))  # no other rank to agree with
    check_data_parallel(config(2, kv_transfer_config=PRODUCER))


@pytest.mark.parametrize(("taken", "padded"), [({"0": "", "1": "[vllm.x]"}, True), ({"0": "[vllm.x]"}, False)])
def test_every_forward_is_padded_where_a_layer_is_taken_over(monkeypatch, taken, padded):
    """The runner asks for padding only where the graph is captured."""
    asked = []

    class Runner:
        def _sync_metadata_across_dp(self, num_tokens, allow_dp_padding=False):
            asked.append(allow_dp_padding)
            return num_tokens

        def load_model(self):
            pass

    module = SimpleNamespace(NPUModelRunner=Runner)
    for _ in range(2):
        vllm._watch_runner(module)
    monkeypatch.setattr(vllm, "_taken", taken)
    assert Runner()._sync_metadata_across_dp(num_tokens=3, allow_dp_padding=False) == 3
    assert Runner()._sync_metadata_across_dp(num_tokens=3, allow_dp_padding=True) == 3
    assert asked == [padded, True]
