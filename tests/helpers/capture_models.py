"""Small transformers models, of four layers if not told otherwise, and token ids that move and skew their routing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc

import torch
import transformers
from torch import nn

from moe_lowering import Deployment, MoeLowering, npugraph_ex_options, simulator
from moe_lowering.cli.lower.models import randomise
from moe_lowering.integrations.transformers import register

LAYERS, VOCABULARY, EXPERTS, TOP_K = 4, 64, 8, 2
BUCKETS = (4, 8, 16)  # token counts
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_experts_per_tok": TOP_K,
}  # fmt: skip
CONFIGS = {
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"num_key_value_heads": 2, "head_dim": 8, "num_experts": EXPERTS},
        0,  # layers without experts
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        {
            "num_key_value_heads": 4, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
            "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8,
        },
        1,
    ),
}  # fmt: skip


@dataclasses.dataclass
class Pair:
    """The same weights twice: unlowered on the CPU, lowered on device npu. ``chosen``: expert ids of the unlowered one.

    ``captured`` runs as NPU graphs, ``eager`` is compiled again, from the same modules, to run without them.
    """

    reference: nn.Module
    captured: object
    eager: object
    lowering: MoeLowering
    chosen: list[torch.Tensor]


def build(name: str, dtype: torch.dtype = torch.float32, **changes: int) -> nn.Module:
    """The model on the CPU; ``changes`` are other sizes than those above."""
    register()
    config, sizes, _ = CONFIGS[name]
    # not sdpa: torch_npu's decomposition of it asks for the length, and each size would be compiled anew
    model = transformers.AutoModelForCausalLM.from_config(
        config(**{**COMMON, **sizes, **changes}), dtype=dtype, attn_implementation="eager"
    )
    randomise(model)
    return model.eval().requires_grad_(False)


def moe_layers(name: str, layers: int = LAYERS) -> int:
    """How many of ``layers`` layers have experts."""
    return layers - CONFIGS[name][2]


def pair(name: str, masked: bool = False, layers: int = LAYERS, **options: bool) -> Pair:
    """``masked``: the model is given an attention mask. ``options`` are npugraph_ex's, of the captured one."""
    torch._dynamo.reset()
    reference = build(name, num_hidden_layers=layers)
    reference.set_experts_implementation("grouped_mm")
    lowered = copy.deepcopy(reference)
    lowered.set_experts_implementation("moe_lowering")
    lowered.to("npu")
    chosen: list[torch.Tensor] = []
    for layer in reference.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(lambda module, given: chosen.append(given[1].clone()))
    deployment = Deployment(max_tokens=max(BUCKETS))
    lowering = MoeLowering(deployment, strict=True)

    def compiled(**given):
        def run(ids):
            mask = torch.ones_like(ids) if masked else None
            return lowered(ids, attention_mask=mask, use_cache=False).logits

        given = npugraph_ex_options(deployment, **given)
        return torch.compile(run, backend="npugraph_ex", fullgraph=True, dynamic=True, options=given)

    return Pair(
        reference, compiled(lowering=lowering, **options), compiled(strict=True, force_eager=True), lowering, chosen
    )


def tokens(step: int, length: int) -> torch.Tensor:
    """[1, length]: random; every fourth the same token everywhere, which sends all to the same experts."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (1, length), generator=generator)
    return ids[:, :1].expand(1, length).contiguous() if step % 4 == 3 else ids


def graphs_of_this_process():
    """What npugraph_ex made of the models compiled so far."""
    from npugraph_ex._acl_concrete_graph.acl_graph import AclGraph

    return [found for found in gc.get_objects() if type(found) is AclGraph]


@contextlib.contextmanager
def without_graphs(graphs):
    """The compiled model runs its lowered graphs operator by operator, as with ``force_eager``: no capture, no replay."""
    assert graphs
    for graph in graphs:
        graph.config["force_eager"] = True
    before = simulator.device.counts()
    try:
        yield
    finally:
        for graph in graphs:
            graph.config["force_eager"] = False
    assert simulator.device.counts() == before
