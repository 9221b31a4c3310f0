"""transformers' own expert parallelism through the generic operators, as torchrun starts it; prints what came of it as JSON."""

import json
import sys

import moe_lowering

moe_lowering.simulator.enable("A3")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, logging  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402

from moe_lowering.integrations.expert_parallel import deployment_of, register_expert_parallelism  # noqa: E402

torch._C._get_accelerator = lambda: torch.device("cpu")  # else transformers' mesh is on the simulated device
torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), sys.argv[1]
options = {"experts_implementation": "grouped_mm", "attn_implementation": "eager"}
config = Qwen3MoeConfig(
    vocab_size=64, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, num_experts=8, num_experts_per_tok=2,
)  # fmt: skip
if rank == 0:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
dist.barrier()
register_expert_parallelism(max_tokens=32, soc="A3")
parallel = DistributedConfig(tp_size=2, ep_size=2, ep_implementation="moe_lowering")
model = (
    AutoModelForCausalLM.from_pretrained(folder, distributed_config=parallel, **options).eval().requires_grad_(False)
)
whole = AutoModelForCausalLM.from_pretrained(folder, **options).eval().requires_grad_(False)
ids = torch.arange(3, 35).reshape(2, 16)
arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
expected = whole(**arguments).logits


def error(run) -> float:
    return float((run(**arguments).logits - expected).abs().max() / expected.abs().max())


deployment = deployment_of(model)
experts = model.model.layers[0].mlp.experts
lowering = moe_lowering.MoeLowering(deployment)
result = {
    "experts": list(experts.gate_up_proj.to_local().shape),
    "sizes": [deployment.ep_size, deployment.tp_size],
    "eager": error(model),
    "lowered": error(torch.compile(model, backend=moe_lowering.lowering_backend(lowering), fullgraph=True)),
    "blocks": [block.comm for report in lowering.reports for block in report.blocks],
}
experts.down_proj.to_local().zero_()
result["without its experts"] = error(model)
if rank == 0:
    print(json.dumps(result), flush=True)
dist.destroy_process_group()
