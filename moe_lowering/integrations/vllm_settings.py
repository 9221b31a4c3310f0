"""The settings of the plugin, ``additional_config={"moe_lowering": {...}}``: docs/vllm.md has the table."""

from __future__ import annotations

from typing import Any

from moe_lowering.argument_checks import require_choice, require_flag
from moe_lowering.passes.policy import Policy
from moe_lowering.vocabulary import AUTO, COMMS, POLICIES

KEY = "moe_lowering"  # of additional_config
SETTINGS = {"enable": True, "policy": "vllm_ascend_main", "comm": "auto", "strict": False}


def settings_of(vllm_config: Any) -> dict[str, Any] | None:
    """The settings of the plugin; None where it is not switched on.

    Raises:
        ValueError: an unknown setting, or a value that is not accepted.
    """
    asked = (vllm_config.additional_config or {}).get(KEY)
    if asked is None:
        return None
    what = f"additional_config[{KEY!r}]"
    if not isinstance(asked, dict) or asked.keys() - SETTINGS.keys():
        raise ValueError(f"{what} is {asked!r}; accepted: a dictionary with some of {', '.join(SETTINGS)}")
    settings = {**SETTINGS, **asked}
    require_flag(what, "enable", settings["enable"])
    require_flag(what, "strict", settings["strict"])
    require_choice(what, "comm", settings["comm"], COMMS)
    if settings["comm"] != AUTO and "policy" not in asked:
        settings["policy"] = AUTO  # one of vllm-ascend's rules would choose by itself
    require_choice(what, "policy", settings["policy"], POLICIES)
    try:
        Policy(settings["comm"], settings["policy"])
    except ValueError as error:  # words that do not go together
        raise ValueError(f"{what}: {error}") from error
    return settings if settings["enable"] else None
