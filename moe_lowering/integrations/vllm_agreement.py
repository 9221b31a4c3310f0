"""Ranks of an EP group compare which MoE layers they have taken over, once, when their weights are loaded.

A layer that one rank has taken over and another has not ends in two different exchanges, and data parallel engines would
pad to different numbers of tokens (``vllm_data_parallel``): the ranks would wait for each other without end. So each rank
that took a layer over waits for the others' answers, as long as a collective of the group would wait. A rank that took none
answers too, in the background: it does not wait, so that it starts as it would without the plugin.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from moe_lowering.agreement_rounds import AgreementError, Session, group_session

KIND = "vllm_layers"
ABSENT = "the plugin is not loaded there (VLLM_PLUGINS, or it is not installed), or the model's weights are not"
LINGER = 10.0  # seconds, for the others to read what differs
NAMED = 3  # layers in a message; the others are counted

log = logging.getLogger("vllm.moe_lowering")


def after_load(module: Any, compare: Callable[[], None]) -> None:
    """Call ``compare()`` when a runner of ``model_runner_v1`` has loaded the model, before its first forward."""
    runner = module.NPUModelRunner
    load = runner.load_model

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        compare()
        return result

    runner.load_model = load_model


def ep_group_name() -> str:
    """The HCCL name of vLLM's EP group; "" where there is none."""
    group = getattr(importlib.import_module("vllm.distributed.parallel_state"), "_EP", None)
    return str(getattr(getattr(group, "device_group", None), "group_name", ""))


def compare_layers(group: str, taken: Mapping[str, str], is_on: bool) -> threading.Thread | None:
    """Compare this rank's layers with those of all ranks of a group; nothing where it has one rank.

    Args:
        group: name of the EP group.
        taken: each MoE layer, "" where it is taken over, else why it is not.
        is_on: whether the plugin is switched on here.

    Returns:
        The thread that answers for a rank that took nothing over; it logs what differs.

    Raises:
        AgreementError: this rank took a layer over, and another did not, or did not answer in time.
    """
    meeting = group_session(group)
    if meeting is None or len(meeting[1]) == 1:
        return None
    with_others, _, patience = meeting
    record = {"is_on": is_on, "layers": dict(taken)}

    def agree() -> None:
        with_others.agree(KIND, record, layer_differences, patience, ABSENT)

    if "" not in taken.values():
        name = "moe_lowering: layers of all ranks"
        listener = threading.Thread(target=_answer, args=(agree, with_others), name=name, daemon=True)
        listener.start()
        atexit.register(_end, listener, with_others)
        return listener
    try:
        agree()
    except AgreementError as error:
        if _is_difference(error):
            _wait_until_all_know(with_others)
        raise
    return None


def _end(listener: threading.Thread, with_others: Session) -> None:
    with_others.stop()
    listener.join(LINGER)


def _answer(agree: Callable[[], None], with_others: Session) -> None:
    with contextlib.suppress(Exception):  # the store is gone where the engine ends meanwhile
        try:
            agree()
        except AgreementError as error:
            if _is_difference(error):  # else others have no plugin, and need none
                log.error("moe_lowering: %s", error)
                _wait_until_all_know(with_others)


def _is_difference(error: AgreementError) -> bool:
    return "ranks disagree" in str(error)


def _wait_until_all_know(with_others: Session) -> None:
    """The store ends with the process of rank 0, which must not end before the others have read what differs."""
    with contextlib.suppress(Exception):
        with_others.agree(f"{KIND}_told", "", lambda *_: [], LINGER)


def layer_differences(a: dict[str, Any], b: dict[str, Any], rank: int) -> list[str]:
    """What differs between the record of ``rank``, a, and that of another one: layers that one of them took over."""
    names = sorted(a["layers"].keys() | b["layers"].keys())
    differ = [name for name in names if (a["layers"].get(name) == "") != (b["layers"].get(name) == "")]
    lines = [f"{name}: {_state(b, name)}; on rank {rank} {_state(a, name)}" for name in differ[:NAMED]]
    more = len(differ) - NAMED
    return [*lines, f"and {more} more layers"] if more > 0 else lines


def _state(record: dict[str, Any], name: str) -> str:
    why = record["layers"].get(name)
    if why == "":
        return "the plugin has taken it over"
    if why is None:
        return "the plugin does not know it" if record["is_on"] else "the plugin is not switched on"
    return f"it stays with vllm-ascend's operator, {why}"
