"""A model of your own on two ranks:

torchrun --nproc-per-node 2 examples/own_model.py [npu]

Without CANN, TORCH_DEVICE_BACKEND_AUTOLOAD=0 stands before it: torchrun imports
torch by itself.
"""

import argparse
import os

import moe_lowering  # before torch, where torch_npu is installed without CANN

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("device", nargs="?", choices=("cpu", "npu"), default="cpu")
device = parser.parse_args().device
if "RANK" not in os.environ:
    before = "TORCH_DEVICE_BACKEND_AUTOLOAD=0 " if device == "cpu" else ""
    parser.error(f"torchrun makes its ranks: {before}torchrun --nproc-per-node 2 examples/own_model.py")
if os.environ["WORLD_SIZE"] != "2":
    parser.error(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; accepted: 2, for which its tokens are made")
if device == "cpu":
    moe_lowering.simulator.enable("A3")  # the line that a machine with NPUs does without

import torch
import torch.distributed as dist
from torch import nn

if device == "npu" and not hasattr(torch, "npu"):
    parser.error(
        "npu: torch_npu is not loaded (under `moe-lowering simulate` set TORCH_DEVICE_BACKEND_AUTOLOAD=1); "
        "without that word it runs on the simulator"
    )
if device == "npu":
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("gloo" if device == "cpu" else "hccl")
rank = dist.get_rank()


class Layer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, dtype=torch.bfloat16)
        self.experts = moe_lowering.MoE(hidden, 512, num_experts=16, top_k=2, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.experts(self.norm(x))


torch.manual_seed(0)  # every rank makes the same model and keeps its own experts of it
model = nn.Sequential(Layer(1024), Layer(1024)).eval().requires_grad_(False)
x = torch.randn(2, 32, 1024, dtype=torch.bfloat16)[rank]  # each rank has tokens of its own
expected = model(x)  # all experts on one rank

deployment = moe_lowering.Deployment.from_groups(ep=dist.group.WORLD, max_tokens=32)
moe_lowering.shard_experts(model, deployment)
# With another comm the error may be 0.2: it rounds otherwise, and a token whose
# experts are nearly tied then takes another one
lowering = moe_lowering.MoeLowering(deployment, comm="mc2", strict=True)
options = moe_lowering.npugraph_ex_options(deployment, lowering=lowering, force_eager=device == "cpu")
compiled = torch.compile(model.to(device), backend="npugraph_ex", fullgraph=True, options=options)
y = compiled(x.to(device)).cpu()

error = float((y - expected).abs().max() / expected.abs().max())
if rank == 0:
    for block in lowering.reports[0].blocks:  # print(lowering.reports[0]) prints the whole report
        print(f"{block.name}: {block.comm}\n  {block.reason}")
        print("  " + "\n  ".join(block.ops_after))
for each in range(dist.get_world_size()):
    dist.barrier()
    if each == rank:
        own = deployment.own_experts(16)
        print(f"rank {rank} has experts {own.start} to {own.stop - 1}, largest error {error:.3f}", flush=True)
dist.destroy_process_group()
