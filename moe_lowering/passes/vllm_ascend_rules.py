"""How vllm-ascend selects a communication method, as pure functions of what its own code reads.

``choose_0_13`` restates 22f253142a (2026-01-17), ``choose_main`` 182b75ea84 (2026-08-22),
``vllm_ascend/ascend_forward_context.py``. Names of methods are ours: ``allgather``, ``mc2``, ``alltoall``, ``fused_mc2``.
Sources: vllm_ascend_0_13.forward_context, vllm_ascend.forward_context: select_moe_comm_method.
"""

from __future__ import annotations

import dataclasses

PER_TP_RANK = 512  # tokens of one TP rank that MC2 and dispatch_ffn_combine take
PER_TP_RANK_MEGA_MOE = 4096


@dataclasses.dataclass(frozen=True)
class Situation:
    """What the selection reads.

    Attributes:
        soc: ``A2``, ``A3``, ``A5`` or ``310P``.
        expert_parallel: whether expert parallelism is on.
        ep_size: EP world size. ``world_size``: ranks across data parallelism (and pipeline stages).
        tokens: tokens of this forward (the largest over DP ranks); None in a profile run of main.
        capacity: MC2's token capacity, see ``capacity_0_13`` and ``capacity_main``.
        experts, top_k: of the model. hidden, intermediate: read by main where ``mega_moe`` is; 0 for sizes that fit.
        quantisation: ``""`` or ``"none"``, ``"w8a8_dynamic"``, ...
        fused_mode: VLLM_ASCEND_ENABLE_FUSED_MC2 / enable_fused_mc2: 0, 1 (dispatch_ffn_combine), and for 0.13 also 2
            (dispatch_gmm_combine_decode).
        draft_model, dynamic_eplb, decode_fusion_allowed: read by 0.13. lora, mega_moe (CANN's operator is installed):
            read by main.
    """

    soc: str
    ep_size: int
    tokens: int | None
    capacity: int
    experts: int = 0
    top_k: int = 1
    hidden: int = 0
    intermediate: int = 0
    quantisation: str = ""
    fused_mode: int = 0
    expert_parallel: bool = True
    world_size: int = 0
    pipeline_stages: int = 1
    draft_model: bool = False
    dynamic_eplb: bool = False
    decode_fusion_allowed: bool = True
    lora: bool = False
    mega_moe: bool = False

    @property
    def world(self) -> int:
        return self.world_size or self.ep_size


def choose_0_13(s: Situation) -> str:
    """The method that 0.13 selects.

    Raises:
        ValueError: a wrong ``fused_mode``; a SoC that 0.13 does not know, with expert parallelism.
    """
    _mode(s, (0, 1, 2))
    if not s.expert_parallel or s.ep_size == 1:
        return "allgather"
    fits = s.tokens is not None and s.tokens <= s.capacity
    if s.soc == "A2":
        return "mc2" if fits and s.world // s.pipeline_stages >= 16 else "allgather"
    if s.soc != "A3":
        raise ValueError(f"vllm_ascend_0_13: soc is {s.soc!r}; accepted with expert parallelism: A2, A3")
    quantised = s.quantisation == "w8a8_dynamic"
    if s.fused_mode == 1 and quantised and s.ep_size <= 32 and not s.draft_model and not s.dynamic_eplb:
        return "fused_mc2"
    if s.fused_mode == 2 and quantised and fits and s.decode_fusion_allowed:
        return "fused_mc2"
    return "mc2" if fits else "alltoall"


def choose_main(s: Situation) -> str:
    """The method that main selects.

    Raises:
        ValueError: a wrong ``fused_mode`` (2 was removed with dispatch_gmm_combine_decode), an unknown SoC.
    """
    _mode(s, (0, 1))
    if not s.expert_parallel or s.ep_size == 1:
        return "allgather"
    if s.lora:
        return "alltoall"
    fits = s.tokens is None or s.tokens <= s.capacity
    if s.soc == "A2":
        ranks = s.world // s.pipeline_stages
        return "mc2" if s.experts // ranks <= 24 and ranks >= 16 and fits else "allgather"
    if s.soc == "A3":
        if fused_in_main(s) and s.ep_size <= (64 if s.mega_moe else 32):
            return "fused_mc2"
        return "mc2" if fits else "alltoall"
    if s.soc == "A5":
        if fits and s.world > 1:
            return "mc2"
        return "allgather" if s.world <= s.top_k else "alltoall"
    if s.soc == "310P":
        return "allgather"
    raise ValueError(f"vllm_ascend_main: soc is {s.soc!r}; accepted: A2, A3, A5, 310P")


def fused_in_main(s: Situation) -> bool:
    """Whether main's fused mode is on: with MegaMoe installed, a model that it does not take switches it off.

    Sources: vllm_ascend.config, vllm_ascend.platform.
    """
    if not s.mega_moe:
        return s.fused_mode == 1
    hidden_fits = not s.hidden or (1024 <= s.hidden <= 8192 and s.hidden % 512 == 0)
    width_fits = not s.intermediate or (1024 <= s.intermediate <= 3072 and s.intermediate % 512 == 0)
    accepted_format = s.quantisation.removesuffix("_dynamic") in ("", "none", "w8a8", "w4a8")
    return s.fused_mode == 1 and hidden_fits and width_fits and accepted_format


def capacity_0_13(tp_size: int, largest_captured: int = 0, requests: int = 0, query_length: int = 1) -> int:
    """MC2's token capacity: the largest captured batch, else requests (at most 512 tokens), rounded up to TP."""
    tokens = largest_captured or min(requests * query_length, PER_TP_RANK)
    return -(-tokens // tp_size) * tp_size


def capacity_main(
    tp_size: int,
    largest_captured: int = 0,
    requests: int = 0,
    query_length: int = 1,
    prefill_batched: int = 0,
    fused: bool = False,
    mega_moe: bool = False,
) -> int:
    """MC2's token capacity: prefill's batched tokens when MC2 prefill is on, else captured, else requests; clamped."""
    tokens = prefill_batched or largest_captured or requests * query_length
    clamp = PER_TP_RANK_MEGA_MOE if fused and mega_moe else PER_TP_RANK
    return min(-(-tokens // tp_size), clamp) * tp_size


def _mode(s: Situation, accepted: tuple[int, ...]) -> None:
    if s.fused_mode not in accepted:
        raise ValueError(f"fused_mode is {s.fused_mode}; accepted: {', '.join(map(str, accepted))}")
