"""The records that ranks compare, and the text of a difference between two of them. Nothing is sent from here.

A record of *settings* holds what decisions depend on beside the blocks: the deployment's fields, the pass's settings,
versions, digests of the package's code and limit tables, operators that other libraries bring. A record of *blocks* holds,
for one graph, each kind of MoE block that exchanges tokens and the order in which they follow: ``strict`` must be the same
on every rank; ``told`` may differ as long as the decision and the exchange do not, and is shown where they do.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

KINDS_SHOWN = 4  # kinds of blocks of one rank whose differences are listed
LONGEST_SHOWN = 160  # characters of a value that are shown: of longer ones the part where two begin to differ
ABSENT = object()  # what is shown for a rank whose record has no such field
SETTINGS_ABSENT = "it has neither compiled nor run a lowered graph with an MoE block, or runs without agreement"
BLOCKS_ABSENT = (
    "it has not come to a graph with these MoE blocks; it may run a graph on which all agreed before, have failed, or run "
    "without agreement"
)
COMPARE_EVERY_RUN = "MOE_LOWERING_COMPARE_EVERY_RUN"  # environment variable, see ``custom_ops.assert_agreement``
RUN_ABSENT = (
    "it has not come to a graph with MoE blocks; it may run one whose layers were left as they were written, have failed, or "
    "run without agreement"
)


def setting_differences(a: dict[str, Any], b: dict[str, Any], rank: int) -> list[str]:
    """The differences of a record of settings ``b`` from ``a``, which is that of ``rank``."""
    where = f"on rank {rank}"
    lines = [
        _write_difference(label, ours, theirs, where)
        for part, prefix in (("deployment", "Deployment."), ("settings", "MoeLowering's "))
        for label, ours, theirs in _unequal(a[part], b[part], prefix)
    ]
    lines += [text for text in (b["misplaced"], a["misplaced"] and f"on rank {rank} {a['misplaced']}") if text]
    ours, theirs = _loaded(a), _loaded(b)
    words = {True: "loaded", False: "not loaded"}
    lines += [
        f"{name} is {words[name in theirs]}, on rank {rank} {words[name in ours]}" for name in sorted(ours ^ theirs)
    ]
    if a["version"] != b["version"]:
        lines.append(f"moe_lowering is {b['version']}, on rank {rank} {a['version']}")
    elif a["limits"] != b["limits"]:
        lines.append(f"its limit tables differ: their digest is {b['limits']!r}, on rank {rank} {a['limits']!r}")
    elif a["code"] != b["code"]:
        lines.append(f"moe_lowering's code differs: its digest is {b['code']!r}, on rank {rank} {a['code']!r}")
    return lines


def _loaded(settings: dict[str, Any]) -> set[str]:
    """torch_npu and the operators of other libraries, as far as a process has them."""
    return {*settings.get("libraries", ()), *(["torch_npu"] if settings["torch_npu"] else [])}


def _unequal(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*a, *b}):
        if a.get(name, ABSENT) != b.get(name, ABSENT):
            yield f"{prefix}{name}", a.get(name, ABSENT), b.get(name, ABSENT)


def block_key(blocks: dict[str, Any]) -> str:
    """What must be the same on every rank, as text: graphs with the same need to be compared only once."""
    return json.dumps([[kind["strict"] for kind in blocks["kinds"]], blocks["order"]], sort_keys=True)


def block_differences(a: dict[str, Any], b: dict[str, Any], rank: int) -> list[str]:
    """The differences of a record of blocks ``b`` from ``a``, which is that of ``rank``.

    Each is ``{"kinds": [...], "order": [[index, how many], ...], "T": of the run that compares, or None}``. T is None where
    ranks may have other ones. ``every_run``: whether that rank compares at every run.
    """
    if a.get("every_run") != b.get("every_run"):
        words = {True: "set", False: "not set"}
        return [
            f"{COMPARE_EVERY_RUN} is {words[bool(b.get('every_run'))]}, on rank {rank} {words[bool(a.get('every_run'))]}"
        ]
    return _block_differences(a, b, f"on rank {rank}")


def block_changes(earlier: dict[str, Any], later: dict[str, Any]) -> str:
    """What a record of blocks has otherwise than an earlier one of the same rank; "" where nothing differs."""
    return "; ".join(_block_differences({**earlier, "T": None}, {**later, "T": None}, "there"))


def _block_differences(a: dict[str, Any], b: dict[str, Any], where: str) -> list[str]:
    lines = []
    tokens_differ = a["T"] is not None and b["T"] is not None and a["T"] != b["T"]
    if tokens_differ:
        lines.append(f"T is {b['T']}, {where} {a['T']}, and Deployment.equal_tokens says that all are equal")
    ours, theirs = list(_expand(a)), list(_expand(b))
    if len(ours) != len(theirs):
        lines.append(f"the graph has {len(theirs)} MoE blocks that exchange tokens, {where} {len(ours)}")
    pairs = dict.fromkeys(zip(ours, theirs, strict=False))
    shown = itertools.islice(
        (line for pair in pairs if (line := _compare_kinds(a, b, *pair, where, tokens_differ))), KINDS_SHOWN
    )
    return lines + list(shown)


def _expand(blocks: dict[str, Any]) -> Iterator[int]:
    for index, count in blocks["order"]:
        yield from itertools.repeat(index, count)


def _compare_kinds(a: dict[str, Any], b: dict[str, Any], i: int, j: int, where: str, tokens_differ: bool) -> str:
    """The differences of two kinds of blocks at the same place, of fields that must be the same; "" when there are none."""
    ours, theirs = a["kinds"][i], b["kinds"][j]
    strict = [
        difference
        for difference in _unequal(ours["strict"], theirs["strict"])
        if difference[0] != "T" or not (tokens_differ or _one_is_symbolic(difference))
    ]
    if not strict:
        return ""
    left = any(
        str(value).startswith("none") for name, *values in strict if name == "implementation" for value in values
    )
    unsaid = ("name",) if left else ("name", "reason")  # shown in full: the reason why a block was left as it was
    tolerated = [d for d in _unequal(ours["told"], theirs["told"]) if d[0] not in unsaid]
    words = "; ".join(_write_difference(name, x, y, where) for name, x, y in _order_causes_first(strict, tolerated))
    return f"{theirs['told']['name']}: {words}"


def _one_is_symbolic(difference: tuple[str, Any, Any]) -> bool:
    """A graph for one T beside a graph for many runs as long as the values are equal, which is compared apart."""
    _, ours, theirs = difference
    return isinstance(ours, int) != isinstance(theirs, int)


def _order_causes_first(
    strict: Iterable[tuple[str, Any, Any]], tolerated: Iterable[tuple[str, Any, Any]]
) -> list[tuple[str, Any, Any]]:
    """Causes before what came of them."""
    results = ("implementation", "exchange", "reason")
    both = [*strict, *tolerated]
    return sorted(both, key=lambda difference: results.index(difference[0]) + 1 if difference[0] in results else 0)


def _write_difference(name: str, ours: Any, theirs: Any, where: str) -> str:
    """A difference with both values."""
    a, b = _write_value(ours), _write_value(theirs)
    if max(len(a), len(b)) > LONGEST_SHOWN:
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        a, b = (_excerpt(text, same) for text in (a, b))
    return f"{name} is {b}, {where} {a}"


def _excerpt(text: str, at: int) -> str:
    """The text around a place where two long texts begin to differ; "..." marks what is cut."""
    start = max(0, min(at - LONGEST_SHOWN // 4, len(text) - LONGEST_SHOWN))
    end = start + LONGEST_SHOWN
    return f"{'...' if start else ''}{text[start:end]}{'...' if end < len(text) else ''}"


def _write_value(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else repr(value)
