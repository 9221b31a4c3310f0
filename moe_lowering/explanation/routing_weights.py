"""In which dtype the models of transformers give their experts the routing weights, by the model type of their (text) config.

Of each type a statement of its router is named, of the installed transformers (5.23), by which the weights are in that dtype:
those of ``ACTIVATIONS`` make or leave them in the dtype of the activations, those of ``FLOAT32`` in float32 whatever that is.
Tests look for each statement in the model's code, and run a small model of each type. A type that is not here is not known.

Not here, though they have experts: ``hunyuan_v1_moe``, whose router computes in the dtype in which its weight was loaded;
``switch_transformers``, in one that its config names; ``jetmoe`` and ``nllb-moe``, whose experts are not lowered.
"""

from __future__ import annotations

import functools

FLOAT32, ACTIVATIONS = "float32", "activations"
WORDS = (FLOAT32, ACTIVATIONS)

# By the statement, in the words of the model's code.
_STATEMENTS = {
    ACTIVATIONS: {
        "router_top_value = router_top_value.to(router_logits.dtype)": (
            "flex_olmo", "mellum", "olmoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
            "qwen3_omni_moe_text", "qwen3_vl_moe_text", "qwen4_exp_text",
        ),
        "routing_weights = routing_weights.to(hidden_states.dtype)": ("ernie4_5_moe", "ernie4_5_vl_moe_text", "laguna"),
        "top_k_weights = torch.softmax(top_k_logits, dim=-1).type_as(hidden_states)": (
            "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
        ),
        "top_k_weights = nn.functional.softmax(top_k_logits, dim=-1)": ("aria_text",),
        "router_scores = router_scores.to(hidden_states.dtype)": ("cohere2_moe",),
        "router_logits = torch.nn.functional.softmax(router_logits, dim=1, dtype=router_logits.dtype)": ("dbrx",),
        "logits = F.linear(flat, self.weight)": ("deepseek_v4",),
        "router_scores = torch.nn.functional.softmax(router_top_value, dim=1, dtype=router_top_value.dtype)": ("gpt_oss",),
        "topk_weights = topk_weights.to(hidden_states.dtype)": ("inkling_text",),
        "return router_logits, top_k_weights.to(hidden_states.dtype), top_k_index": ("jamba",),
        "routing_weights = router_logits.sigmoid()": ("lfm2_moe",),
        "router_scores = torch.nn.functional.sigmoid(router_scores.float()).to(router_scores.dtype)": ("llama4_text",),
        "scores = router_logits.softmax(-1)": ("mistral4",),
        "router_logits = super().forward(hidden_states)": ("phimoe",),
        "router_probs = torch.softmax(router_logits, dim=-1)": ("zaya",),
    },
    FLOAT32: {
        "router_logits = F.linear(hidden_states.type(torch.float32), self.weight.type(torch.float32))": (
            "axk1", "axk2", "bailing_hybrid", "deepseek_ocr2_text", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
            "dots3_note_text", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "glm5_next_text", "glm_moe_dsa",
            "hy_v4", "kimi_linear", "kolibri1", "mimo_v2_flash", "muse_spark_text", "nemotron_h", "solar_open",
            "unlimited_ocr_text",
        ),
        "router_logits = F.linear(hidden_states.type(torch.float32), self.classifier.weight.type(torch.float32))": (
            "longcat_flash",
        ),
        "router_logits = F.linear(hidden_states.float(), self.weight.float())": (
            "beam", "flint", "hy_v3", "mistral_large4_text",
        ),
        "router_logits = self.gate(hidden_states).to(torch.float32)": ("afmoe",),
        "router_probabilities = nn.functional.softmax(expert_scores, dim=-1, dtype=torch.float32)": (
            "diffusion_gemma_text", "gemma4_text",
        ),
        "router_probs = torch.nn.functional.softmax(router_logits.float(), dim=-1)": ("minimax", "mixtral"),
        "routing_weights = nn.functional.sigmoid(router_logits.float())": ("minimax_m2",),
        "routing_weights = F.sigmoid(router_logits.float())": ("minimax_m3_vl_text", "step3p5"),
        "hidden_states.float(), self.weight.float(), self.bias.float()": ("openai_privacy_filter",),
        "hidden_states = hidden_states.float()": ("inkling2_text",),
    },
}  # fmt: skip


@functools.cache
def statements() -> dict[str, tuple[str, str]]:
    """(word, statement) by model type."""
    return {
        kind: (word, statement)
        for word, by_statement in _STATEMENTS.items()
        for statement, kinds in by_statement.items()
        for kind in kinds
    }


def routing_weights_of(kind: str) -> str | None:
    """``float32`` or ``activations`` for a model type; None where it is not known."""
    known = statements().get(kind)
    return None if known is None else known[0]
