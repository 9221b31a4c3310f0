"""Serving with statistics, on one rank: python examples/serve.py [npu]"""

import argparse

import moe_lowering  # before torch, where torch_npu is installed without CANN

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("device", nargs="?", choices=("cpu", "npu"), default="cpu")
device = parser.parse_args().device
if device == "cpu":
    moe_lowering.simulator.enable_device()  # the line that a machine with NPUs does without

import torch

if device == "npu" and not hasattr(torch, "npu"):
    parser.error(
        "npu: torch_npu is not loaded (under `moe-lowering simulate` set TORCH_DEVICE_BACKEND_AUTOLOAD=1); "
        "without that word it runs on the simulator"
    )

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_lowering.integrations.transformers import register
from moe_lowering.serving import Request, Server

register()
torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=96,
    hidden_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
)
model = Qwen3MoeForCausalLM(config).eval().to("npu")
model.set_experts_implementation("moe_lowering")

server = Server(model, buckets=(2, 4), max_length=64, prefill_lengths=(16, 64))
server.warm_up()
server.submit(Request([1, 5, 7], 12))
server.submit(Request([2], 5))
results = []
for step in range(100):
    results += server.step()
    if step == 1:  # a request that joins a batch which is running
        server.submit(Request([9, 8], 6))
    if len(results) == 3:
        break
for result in sorted(results, key=lambda each: len(each.tokens)):
    print(f"{len(result.tokens)} tokens: {result.tokens}")
statistics = server.statistics
print(f"graphs {statistics.graphs}, captures {statistics.captures}, replays {statistics.replays}")
print(f"compiled again {statistics.recompiles}, steps by bucket {dict(statistics.steps)}")
