"""Which families' routers become ``npu_moe_gating_top_k``, and that they choose and weigh the same."""

from __future__ import annotations

import pytest
import torch
from router_families import EXPERTS, HIDDEN, TOKENS, Family, make_router, trace_layer

from moe_lowering import Deployment, MoeLowering
from moe_lowering.passes.routers.reports import GATING

ROUNDED = "router.rounded_scores"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FAMILIES = {
    "afmoe": Family("AfmoeTokenChoiceRouter"),
    "aria": Family("AriaTextTopKRouter"),
    "axk1": Family("AXK1TopkRouter"),
    "axk2": Family("AXK2TopkRouter", "router.mask_value", "router.mask_value"),
    "bailing_hybrid": Family("BailingHybridTopkRouter"),
    "beam": Family("BeamTopKRouter"),
    "cohere2_moe": Family("Cohere2MoeTopKRouter"),
    "deepseek_ocr2": Family("DeepseekOcr2TextTopkRouter"),
    "deepseek_v2": Family("DeepseekV2TopkRouter"),
    "deepseek_v3": Family("DeepseekV3TopkRouter"),
    "deepseek_v32": Family("DeepseekV32TopkRouter"),
    "deepseek_v4": Family("DeepseekV4TopKRouter", "", ROUNDED, soc="A5"),
    "diffusion_gemma": Family("DiffusionGemmaTextRouter"),
    "dots1": Family("Dots1TopkRouter"),
    "dots3_note": Family("Dots3NoteTextTopkRouter"),
    "ernie4_5_moe": Family("Ernie4_5_MoeTopKRouter"),
    "ernie4_5_vl_moe": Family("Ernie4_5_VLMoeMoeTopKRouter", config="Ernie4_5_VLMoeTextConfig"),
    "exaone_moe": Family("ExaoneMoeTopkRouter"),
    "flex_olmo": Family("FlexOlmoTopKRouter"),
    "flint": Family("FlintTopKRouter"),
    "gemma4": Family("Gemma4TextRouter"),
    "glm4_moe": Family("Glm4MoeTopkRouter"),
    "glm4_moe_lite": Family("Glm4MoeLiteTopkRouter"),
    "glm4v_moe": Family("Glm4vMoeTextTopkRouter"),
    "glm5_next": Family("Glm5NextTextTopkRouter"),
    "glm_moe_dsa": Family("GlmMoeDsaTopkRouter"),
    "gpt_oss": Family("GptOssTopKRouter"),
    "granitemoe": Family("GraniteMoeTopKRouter"),
    "granitemoe_swa": Family("GraniteMoeSWATopKRouter"),
    "granitemoehybrid": Family("GraniteMoeHybridTopKRouter"),
    "granitemoeshared": Family("GraniteMoeSharedTopKRouter"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Gate"),
    "hy_v3": Family("HYV3TopKRouter"),
    "hy_v4": Family("HYV4TopkRouter"),
    "inkling": Family("InklingTopkRouter", "router.other_scores", "router.other_scores", config="InklingTextConfig"),
    "jamba": Family("JambaTopKRouter"),
    "kimi_linear": Family("KimiLinearTopkRouter"),
    "kolibri1": Family("Kolibri1TopKRouter", "router.saturates", "router.saturates"),
    "laguna": Family("LagunaTopKRouter"),
    "lfm2_moe": Family("Lfm2MoeTopKRouter", "", ROUNDED),
    "longcat_flash": Family("LongcatFlashTopkRouter"),
    "mellum": Family("MellumTopKRouter"),
    "mimo_v2_flash": Family("MiMoV2FlashTopkRouter"),
    "minimax": Family("MiniMaxTopKRouter"),
    "minimax_m2": Family("MiniMaxM2TopKRouter"),
    "minimax_m3_vl": Family("MiniMaxM3VLTopKRouter"),
    "mistral4": Family("Mistral4TopkRouter", "", ROUNDED),
    "mistral_large4": Family("MistralLarge4TextTopkRouter", config="MistralLarge4TextConfig"),
    "mixtral": Family("MixtralTopKRouter"),
    "muse_spark": Family("MuseSparkTopkRouter"),
    "nemotron_h": Family("NemotronHTopkRouter"),
    "olmoe": Family("OlmoeTopKRouter"),
    "openai_privacy_filter": Family("OpenAIPrivacyFilterTopKRouter"),
    "qwen2_moe": Family("Qwen2MoeTopKRouter"),
    "qwen3_5_moe": Family("Qwen3_5MoeTopKRouter", config="Qwen3_5MoeTextConfig"),
    "qwen3_moe": Family("Qwen3MoeTopKRouter"),
    "qwen3_next": Family("Qwen3NextTopKRouter"),
    "qwen3_omni_moe": Family("Qwen3OmniMoeThinkerTextTopKRouter", config="Qwen3OmniMoeTextConfig"),
    "qwen3_vl_moe": Family("Qwen3VLMoeTextTopKRouter", config="Qwen3VLMoeTextConfig"),
    "qwen4_exp": Family("Qwen4ExpTextTopKRouter", config="Qwen4ExpTextConfig"),
    "solar_open": Family("SolarOpenTopkRouter"),
    "step3p7": Family("Step3p7TopKRouter"),
    "unlimited_ocr": Family("UnlimitedOcrTextTopkRouter"),
}


def spread(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[T, E]: the weight of each expert, which does not depend on the order of the chosen ones."""
    weights, ids = weights.reshape(TOKENS, -1).double(), ids.reshape(TOKENS, -1).long()
    return torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter(1, ids, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name, dtype):
    family = FAMILIES[name]
    router = make_router(name, family, DTYPES[dtype])
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(8)).to(DTYPES[dtype])
    x = x[None] if name == "afmoe" else x
    graph, arguments, eager = trace_layer(router, DTYPES[dtype], x)
    lowering = MoeLowering(Deployment(soc=family.soc), "allgather", strict=True)
    lowering(graph)
    (report,) = lowering.reports[-1].routers
    code = family.expected(DTYPES[dtype])
    assert (report.became, report.was) == ((None if code else GATING), "aten"), report
    assert report.reason.startswith(f"[{code}] " if code else "proven equal") and (
        not code or "expected: " in report.reason
    )
    if family.soc != "A3":  # which this process simulates
        (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_moe_gating_top_k.default) or (
            None,
        )
        assert (node is None) == bool(code) and (code or node.kwargs["norm_type"] == 2)
        return
    y, weights, ids, _ = graph(*arguments)
    assert weights.dtype == eager[1].dtype and ids.dtype == eager[2].dtype
    # float32: rounding in another order; bfloat16: one unit in the last place
    bound = 1e-5 if dtype == "float32" else 2**-8
    assert (spread(weights, ids) - spread(eager[1], eager[2])).abs().max() <= bound * eager[1].double().abs().max()
    assert (y.double() - eager[0].double()).abs().max() <= (1e-5 if dtype == "float32" else 2e-2) * eager[0].abs().max()


def test_how_many():
    """What issue and documentation promise: the operator for 20 families and more, in bfloat16 too."""
    counts = {dtype: sum(not family.expected(kind) for family in FAMILIES.values()) for dtype, kind in DTYPES.items()}
    assert counts == {"float32": 60, "bfloat16": 57}
