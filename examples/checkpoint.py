"""A checkpoint of transformers on two ranks, each with its own experts, in W8A8, with ``generate``:

torchrun --nproc-per-node 2 examples/checkpoint.py [npu [FOLDER]]

Without CANN, TORCH_DEVICE_BACKEND_AUTOLOAD=0 stands before it: torchrun imports
torch by itself.
"""

import argparse
import os
import tempfile
from pathlib import Path

import moe_lowering  # before torch, where torch_npu is installed without CANN

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("device", nargs="?", choices=("cpu", "npu"), default="cpu")
parser.add_argument("folder", nargs="?", help="of a checkpoint in 16 bit; a small one is made without it")
arguments = parser.parse_args()
device = arguments.device
if "RANK" not in os.environ:
    before = "TORCH_DEVICE_BACKEND_AUTOLOAD=0 " if device == "cpu" else ""
    parser.error(f"torchrun makes its ranks: {before}torchrun --nproc-per-node 2 examples/checkpoint.py")
if arguments.folder and not Path(arguments.folder).is_dir():
    parser.error(f"{arguments.folder} is no folder; a checkpoint has to be downloaded first")
if device == "cpu":
    moe_lowering.simulator.enable("A3")  # the line that a machine with NPUs does without

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, Qwen3MoeConfig, logging

from moe_lowering.integrations.transformers import register

logging.set_verbosity_error()
logging.disable_progress_bar()
register()
if device == "npu" and not hasattr(torch, "npu"):
    parser.error(
        "npu: torch_npu is not loaded (under `moe-lowering simulate` set TORCH_DEVICE_BACKEND_AUTOLOAD=1); "
        "without that word it runs on the simulator"
    )
if device == "npu":
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("gloo" if device == "cpu" else "hccl")
rank = dist.get_rank()


def small_checkpoint() -> str:
    """The folder of a random Qwen3-MoE, which rank 0 writes."""
    name = [tempfile.mkdtemp()]
    dist.broadcast_object_list(name)
    if rank == 0:
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=256,
            moe_intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=16,
            num_experts_per_tok=2,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(name[0])
    dist.barrier()
    return name[0]


folder = arguments.folder or small_checkpoint()
deployment = moe_lowering.Deployment.from_groups(ep=dist.group.WORLD, max_tokens=16)
with torch.device("meta"):
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="moe_lowering").eval()
moe_lowering.load_experts(model.requires_grad_(False), folder, deployment, device=device)
moe_lowering.quantise_experts(model, "w8a8")

lowering = moe_lowering.MoeLowering(deployment, strict=True)
options = moe_lowering.npugraph_ex_options(deployment, lowering=lowering, force_eager=device == "cpu")
compile_config = CompileConfig(backend="npugraph_ex", fullgraph=True, dynamic=False, mode=None, options=options)
compile_config._compile_all_devices = True  # transformers compiles on its list of devices alone, on which npu is not
prompt = torch.tensor([[1, 5, 7, 11], [2, 3, 5, 8]], device=device)
tokens = model.generate(
    prompt,
    max_new_tokens=6,
    do_sample=False,
    cache_implementation="static",
    compile_config=compile_config,
    pad_token_id=0,
    prefill_chunk_size=8,  # without it transformers compiles decode alone; 2 prompts of 8 are max_tokens
)

if rank == 0:
    for report in lowering.reports:
        for block in report.blocks:
            print(f"{block.name}: {block.comm}\n  {block.reason}")
for each in range(dist.get_world_size()):
    dist.barrier()  # one rank prints after the other
    if each == rank:
        weight = model.model.layers[0].mlp.experts.gate_up_proj
        print(f"rank {rank}: experts {list(weight.shape)} {weight.dtype}, wrote {tokens[0, 4:].tolist()}", flush=True)
dist.destroy_process_group()
