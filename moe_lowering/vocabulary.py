"""The words of a deployment and of a block, each once, with what belongs to it. Without torch, so that commands start fast.

A word that is not here is refused (``lookup.look_up``). What a new word needs beside its line here stands in
``docs/adding.md``.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Soc:
    """An Ascend system on chip.

    Attributes:
        name: as a ``Deployment`` has it.
        runtime_name: one name that ``aclrtGetSocName`` returns for it, which the simulator's does.
        runtime_pattern: all of them, a regular expression. torch_npu 2.13 knows the names (SocVersion in libtorch_npu.so);
            its Ascend910B without a number is the first 910, which has no MC2.
        device_types: vllm-ascend's words for it (``_build_info.__device_type__``).
        generation: its place among them in the order of appearance.
        aliases: other names of it that people use, of the chip or of its series, which commands take (``soc_named``).
        clips_swiglu: it has a kernel of ``npu_clipped_swiglu`` (op-plugin's documentation of that operator).
        weighs_before_sending: MC2's dispatch takes the weights of the tokens and combine gets them back, since its ranks
            exchange in two levels always (op-plugin's documentation of ``npu_moe_distribute_dispatch_v2``: expert_scales).
        two_level_tp_world: ``tp_world_size`` of MC2's two-level algorithm where there is no TP; both 0 and 1 say so.
        graph_mode_group_tp: MC2 in GE graphs takes the EP group as ``group_tp`` (the same documentation).

    What its memory and links take: ``prices/data/machines.toml``. Source: op_plugin.dispatch.
    """

    name: str
    runtime_name: str
    runtime_pattern: str
    device_types: tuple[str, ...]
    generation: int
    aliases: tuple[str, ...] = ()
    clips_swiglu: bool = False
    weighs_before_sending: bool = False
    two_level_tp_world: int = 0
    graph_mode_group_tp: bool = False


SOCS = {
    soc.name: soc
    for soc in (
        Soc(
            "A2",
            "Ascend910B3",
            r"Ascend910B\d.*",
            ("A2",),
            2,
            aliases=("910B",),
            clips_swiglu=True,
            weighs_before_sending=True,
            graph_mode_group_tp=True,
        ),
        Soc(
            "A3",
            "Ascend910_9391",
            r"Ascend910_93\d\d.*",
            ("A3",),
            3,
            aliases=("910C", "910_93"),
            clips_swiglu=True,
            two_level_tp_world=1,
        ),
        Soc(
            "A5",
            "Ascend950DT_9591",
            r"Ascend950(DT|PR)_.*",
            ("A5",),
            4,
            aliases=("950", "950DT", "950PR"),
        ),
        Soc(
            "310P",
            "Ascend310P3",
            r"Ascend310P\d.*",
            ("310P", "_310P"),
            1,
            aliases=("310",),
        ),
    )
}


def soc_named(text: str) -> Soc | None:
    """The SoC of a name in any case: its own, an alias, or one of the runtime's, with ``Ascend`` or without; None for another."""
    word = re.sub(r"^ascend[ _-]?", "", text.strip(), flags=re.IGNORECASE)
    for soc in SOCS.values():
        names = (soc.name, *soc.aliases, *soc.device_types)
        if word.upper() in (name.upper() for name in names):
            return soc
        if re.fullmatch(soc.runtime_pattern, f"Ascend{word}", re.IGNORECASE):
            return soc
    return None


@dataclasses.dataclass(frozen=True)
class ExpertFormat:
    """How experts' weights are stored, and what their matmuls take: the ``quantisation`` of ``grouped_mlp``.

    Attributes:
        name: as arguments spell it. ``vllm_ascend``: as vllm-ascend's rules do.
        bits: of one weight; 0 for those in the dtype of the activations.
        weight_dtype: of a weight tensor, as torch spells it; "" for that of the activations.
        int8_rows: the matmuls take int8 rows with a scale each, which tokens are quantised to; and tokens may be int8.
        has_offset, has_scale_bias: beside scales, there may be offsets, or there are scale biases (the compensation that
            int4 weights with int8 rows need).
        bits_of_scales: ``npu_grouped_matmul`` takes float32 scales as their bits in int64.
        scale_dtypes: of scales, as torch spells them; () for those of the activations, or none.
        snr_floor: the least signal-to-noise ratio, in dB, of a token's result against float64 with dequantised weights
            (measured; ``docs/matrix.md``).
    """

    name: str
    vllm_ascend: str
    bits: int = 0
    weight_dtype: str = ""
    int8_rows: bool = False
    has_offset: bool = False
    has_scale_bias: bool = False
    bits_of_scales: bool = False
    scale_dtypes: tuple[str, ...] = ()
    snr_floor: float = 42.0

    @property
    def quantised(self) -> bool:
        """Whether weights are integers with scales."""
        return self.bits > 0

    @property
    def weight_only(self) -> bool:
        """Whether the matmuls take rows as they are, and turn the weights into their dtype."""
        return self.quantised and not self.int8_rows

    @property
    def packed(self) -> int:
        """Weights in one element of a weight tensor."""
        return 32 // self.bits if self.weight_dtype == "int32" else 1


EXPERT_FORMATS = {
    record.name: record
    for record in (
        ExpertFormat("none", "none"),
        ExpertFormat(
            "w8a8",
            "w8a8_dynamic",
            8,
            "int8",
            int8_rows=True,
            scale_dtypes=("float32", "bfloat16", "int64"),
            snr_floor=28.0,
        ),
        ExpertFormat(
            "w4a8",
            "w4a8",
            4,
            "int32",
            int8_rows=True,
            has_scale_bias=True,
            bits_of_scales=True,
            scale_dtypes=("float32", "int64"),
            snr_floor=28.0,
        ),
        ExpertFormat("w4a16", "w4a16", 4, "int32", has_offset=True, snr_floor=40.0),
    )
}


@dataclasses.dataclass(frozen=True)
class Activation:
    """What ``grouped_mlp`` computes between its two matmuls.

    Attributes:
        clamped: it has a ``limit``.
        gated: the first matmul makes a gate beside what is gated, so that w13 is twice as wide as w2 is high.
    """

    name: str
    clamped: bool = False
    gated: bool = True

    @property
    def parts(self) -> int:
        """Columns of w13 for each line of w2."""
        return 2 if self.gated else 1


def swiglu_alpha() -> float:
    """gpt-oss's alpha of g * sigmoid(alpha * g) (transformers, ``GptOssExperts.alpha``; the default of npu_clipped_swiglu).

    An operator is given it for an activation that does not read it, too, so that equal blocks have equal arguments. Code that
    is traced calls this: of a module's float Dynamo makes an input of the graph where sizes are dynamic, and traces again.
    """
    return 1.702


SWIGLU_ALPHA = swiglu_alpha()

ACTIVATIONS = {
    record.name: record
    for record in (
        Activation("swiglu"),
        Activation("swiglu_clamp", clamped=True),
        Activation("swiglu_oai", clamped=True),
        Activation("gelu"),
        Activation("gelu_tanh"),
        Activation("swiglu_softcap", clamped=True),
        Activation("swiglu_clamp_after", clamped=True),
        Activation("relu", gated=False),
        Activation("relu2", gated=False),
        Activation("silu", gated=False),
        Activation("gelu_ungated", gated=False),
        Activation("gelu_tanh_ungated", gated=False),
    )
}

# Implementations, and the forms in which each is written down (``passes/implementations``), in the order of reports.
IMPLEMENTATION_FORMS = {
    "allgather": ("allgather",),
    "alltoall": ("static", "buffers", "exact"),
    "mc2": ("mc2",),
    "fused_mc2": ("dispatch_ffn_combine", "mega_moe", "dispatch_gmm_combine_decode"),
}
# Those that are one operator of a library, which ``Deployment.fused_mode`` chooses; their forms are those operators.
ONE_OPERATOR = frozenset({"fused_mc2"})
AUTO = "auto"  # the cheapest legal implementation
COMMS = (AUTO, *IMPLEMENTATION_FORMS)
FIXED = "fixed"  # the implementation that is named, and no other
VLLM_POLICIES = ("vllm_ascend_0_13", "vllm_ascend_main")  # what vllm-ascend selects
POLICIES = (AUTO, FIXED, *VLLM_POLICIES)

WEIGHT_FORMATS = ("nd", "nz")  # memory formats on a device: rows, or FRACTAL_NZ
GUARDS = ("allow", "forbid")
RAISE_FOREIGN = ("auto", "report", "off")  # MoE layers that others wrote: raise and lower them, name them, do not look
# Which fused operators a deployment takes, by ``Deployment.fused_mode`` (vllm-ascend's VLLM_ASCEND_ENABLE_FUSED_MC2).
FUSED_MODES = {0: "none", 1: "dispatch_ffn_combine, mega_moe", 2: "dispatch_gmm_combine_decode"}
MODES = ("npugraph_ex", "ge")
# Which operator brings rows back to tokens in AllGather and AllToAll; the first is the default.
UNPERMUTE_OPERATORS = TOKEN_UNPERMUTE, FINALIZE_ROUTING = ("token_unpermute", "finalize_routing")
# Of each provider the versions that were looked at (provider.md), rising; the first is taken where none is said.
PROVIDER_VERSIONS = {"vllm_ascend": ("0.23.0", "0.26.0rc1"), "cann_ops_transformer": ("9.1.0",)}
# Of the providers whose wheels are builds for one SoC: which. For another they are built from source (install.md).
WHEEL_BUILDS = {"vllm_ascend": "A2"}
# The versions of CANN from which on rules for older ones no longer hold, rising; a test compares them with the limits.
CANN_VERSIONS = ("8.5.0", "9.1.0", "9.2.0")
PROVIDERS = ("vllm_ascend", "cann_ops_transformer", "sgl_kernel_npu")

MOST_BUFFER_MB = 65535  # HCCL_BUFFSIZE must fit 16 bits (vllm-ascend 182b75ea, tiling of dispatch_ffn_combine)
