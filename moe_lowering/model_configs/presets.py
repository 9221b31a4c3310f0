"""Published models by name, with the values of their config.json that an MoE layer depends on. Without torch and transformers.

A model type of transformers (``qwen3_moe``) means the defaults of its config class, which may be no published size; a preset
means one checkpoint, whose repository on the Hugging Face hub is named with it. Nothing is downloaded: the values were written
down by hand and compared with ``source``. Tests compare those that are defaults of transformers, and of all presets the
parameters that they give with ``billions``, of the model card.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
        name: as commands take it. hub: its repository. billions: of parameters, as its model card says.
        kind: the model type of transformers. values: of its config, beside the type.
        source: what the values were compared with (2026-11-26).
    """

    name: str
    hub: str
    billions: float
    kind: str
    values: dict[str, Any]
    source: str = ""

    @property
    def config(self) -> dict[str, Any]:
        """The values of a config.json."""
        return {"model_type": self.kind, "dtype": "bfloat16", "hidden_act": "silu", **self.values}


DEFAULTS = "transformers: the defaults of the type's config class"
_SOURCES = {
    "deepseek_v2": "NVIDIA NeMo: DeepSeekV2Config",
    "deepseek_v2_lite": "AMD-AGI/Primus (3aa8772c): primus/configs/models/megatron/deepseek_v2_lite.yaml",
    "deepseek_v3": DEFAULTS,
    "glm_4_5": "zyzshishui/slime (ffec5340): scripts/models/glm4.5-355B-A32B.sh",
    "glm_4_5_air": DEFAULTS,
    "gpt_oss_120b": DEFAULTS,
    "gpt_oss_20b": "EchoCog/gpt-oss-20b: docs/gpt-oss-20b-architecture.md, of its config.json",
    "kimi_k2": "zyzshishui/slime (34bba0b8): scripts/models/kimi-k2.sh",
    "mixtral_8x7b": DEFAULTS,
    "mixtral_8x22b": "huggingface.co/mistral-community/Mixtral-8x22B-v0.1: config.json",
    "qwen3_30b": "zyzshishui/slime (e0be9a07): scripts/models/qwen3-30B-A3B.sh",
    "qwen3_235b": "zyzshishui/slime (a2938638): scripts/models/qwen3-235B-A22B.sh",
    "qwen3_coder_480b": "zyzshishui/miles (b2699705): scripts/models/qwen3-coder-480B-A35B.sh",
}


def _qwen3(
    name: str, hub: str, billions: float, hidden: int, expert: int, experts: int, layers: int, **rest: int
) -> Preset:
    return Preset(name, hub, billions, "qwen3_moe", {
        "hidden_size": hidden, "moe_intermediate_size": expert, "num_experts": experts, "num_experts_per_tok": 8,
        "num_hidden_layers": layers, "head_dim": 128, "num_key_value_heads": 4, "vocab_size": 151936, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], **rest,
    })  # fmt: skip


def _deepseek(name: str, hub: str, billions: float, kind: str, **values: Any) -> Preset:
    return Preset(name, hub, billions, kind, {"n_shared_experts": 1, "moe_layer_freq": 1, **values})


def _glm4(
    name: str, hub: str, billions: float, hidden: int, expert: int, experts: int, layers: int, **rest: float
) -> Preset:
    return Preset(name, hub, billions, "glm4_moe", {
        "hidden_size": hidden, "moe_intermediate_size": expert, "n_routed_experts": experts, "num_experts_per_tok": 8,
        "num_hidden_layers": layers, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "n_shared_experts": 1, "vocab_size": 151552, **rest,
    })  # fmt: skip


def _gpt_oss(name: str, hub: str, billions: float, experts: int, layers: int) -> Preset:
    return Preset(name, hub, billions, "gpt_oss", {
        "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": experts, "num_experts_per_tok": 4,
        "num_hidden_layers": layers, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
        "swiglu_limit": 7.0,
    })  # fmt: skip


def _mixtral(name: str, hub: str, billions: float, hidden: int, expert: int, layers: int, heads: int) -> Preset:
    return Preset(name, hub, billions, "mixtral", {
        "hidden_size": hidden, "intermediate_size": expert, "num_local_experts": 8, "num_experts_per_tok": 2,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 32000,
    })  # fmt: skip


PRESETS = {
    preset.name: dataclasses.replace(preset, source=_SOURCES[preset.name])
    for preset in (
        _deepseek(
            "deepseek_v2", "deepseek-ai/DeepSeek-V2", 236, "deepseek_v2", hidden_size=5120, moe_intermediate_size=1536,
            n_routed_experts=160, num_experts_per_tok=6, num_hidden_layers=60, first_k_dense_replace=1,
            intermediate_size=12288, num_attention_heads=128, num_key_value_heads=128, vocab_size=102400, n_group=8,
            topk_group=3, n_shared_experts=2, topk_method="group_limited_greedy", routed_scaling_factor=16.0,
        ),
        _deepseek(
            "deepseek_v2_lite", "deepseek-ai/DeepSeek-V2-Lite", 16, "deepseek_v2", hidden_size=2048,
            moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6, num_hidden_layers=27,
            first_k_dense_replace=1, intermediate_size=10944, num_attention_heads=16, num_key_value_heads=16,
            vocab_size=102400, n_group=1, topk_group=1, n_shared_experts=2, topk_method="greedy", q_lora_rank=None,
        ),
        _deepseek(
            "deepseek_v3", "deepseek-ai/DeepSeek-V3", 671, "deepseek_v3", hidden_size=7168, moe_intermediate_size=2048,
            n_routed_experts=256, num_experts_per_tok=8, num_hidden_layers=61, first_k_dense_replace=3,
            intermediate_size=18432, num_attention_heads=128, num_key_value_heads=128, vocab_size=129280, n_group=8,
            topk_group=4, routed_scaling_factor=2.5,
        ),
        _glm4("glm_4_5", "zai-org/GLM-4.5", 355, 5120, 1536, 160, 92, first_k_dense_replace=3, intermediate_size=12288,
              routed_scaling_factor=2.5),
        _glm4("glm_4_5_air", "zai-org/GLM-4.5-Air", 106, 4096, 1408, 128, 46, first_k_dense_replace=1, intermediate_size=10944,
              routed_scaling_factor=1.0),
        _gpt_oss("gpt_oss_120b", "openai/gpt-oss-120b", 117, 128, 36),
        _gpt_oss("gpt_oss_20b", "openai/gpt-oss-20b", 21, 32, 24),
        _deepseek(
            "kimi_k2", "moonshotai/Kimi-K2-Instruct", 1000, "deepseek_v3", hidden_size=7168, moe_intermediate_size=2048,
            n_routed_experts=384, num_experts_per_tok=8, num_hidden_layers=61, first_k_dense_replace=1,
            intermediate_size=18432, num_attention_heads=64, num_key_value_heads=64, vocab_size=163840, n_group=1,
            topk_group=1, routed_scaling_factor=2.827,
        ),
        _mixtral("mixtral_8x7b", "mistralai/Mixtral-8x7B-v0.1", 46.7, 4096, 14336, 32, 32),
        _mixtral("mixtral_8x22b", "mistralai/Mixtral-8x22B-v0.1", 141, 6144, 16384, 56, 48),
        _qwen3("qwen3_30b", "Qwen/Qwen3-30B-A3B", 30.5, 2048, 768, 128, 48, num_attention_heads=32),
        _qwen3("qwen3_235b", "Qwen/Qwen3-235B-A22B", 235, 4096, 1536, 128, 94, num_attention_heads=64),
        _qwen3("qwen3_coder_480b", "Qwen/Qwen3-Coder-480B-A35B-Instruct", 480, 6144, 2560, 160, 62, num_attention_heads=96,
               num_key_value_heads=8),
    )
}  # fmt: skip


def presets_of(kind: str) -> tuple[str, ...]:
    """The presets of a model type."""
    return tuple(preset.name for preset in PRESETS.values() if preset.kind == kind)


def preset_of_hub(hub: str) -> Preset | None:
    """The preset of a repository on the hub, whatever the case of its name."""
    return next((preset for preset in PRESETS.values() if preset.hub.lower() == hub.lower()), None)


def preset_of_hub_name(name: str) -> Preset | None:
    """The preset whose hub id ends with a name."""
    return next((preset for preset in PRESETS.values() if preset.hub.lower().rpartition("/")[2] == name.lower()), None)
