"""Options that several commands have. Imports no torch."""

from __future__ import annotations

from typing import Any

from moe_lowering.cli.assumed_machine import ASSUMED_PROVIDERS, HCCL_BUFFER_MB, WEIGHT_FORMAT
from moe_lowering.cli.option_values import parse_buffer, parse_file, parse_positive, parse_provider, parse_version
from moe_lowering.cli.usage import UsageError
from moe_lowering.prices.rows import MeasuredError, Row, require_rows
from moe_lowering.vocabulary import (
    AUTO,
    FIXED,
    IMPLEMENTATION_FORMS,
    POLICIES,
    TOKEN_UNPERMUTE,
    UNPERMUTE_OPERATORS,
    WEIGHT_FORMATS,
)

DTYPES = ("float32", "float16", "bfloat16")


def add_provider(add: Any) -> None:
    """Add ``--provider`` to a command."""
    assumed = "=".join(ASSUMED_PROVIDERS[0])
    add(
        "--provider",
        type=parse_provider,
        action="append",
        metavar="NAME=VERSION",
        help=f"installed library with fused operators, once for each, or none (default {assumed})",
    )


def add_machine(add: Any, tokens: str) -> None:
    """Add what a command may say of the machine and of token counts; ``tokens``: the field of the bound that is declared."""
    add(
        "--max-tokens",
        dest=tokens,
        type=parse_positive,
        default=0,
        metavar="T",
        help="bound on the tokens of a rank that the deployment declares",
    )
    add("--unequal-tokens", action="store_true", help="ranks may have different T, up to --max-tokens")
    add("--buffer-mb", type=parse_buffer, metavar="MB", help=f"HCCL_BUFFSIZE (default {HCCL_BUFFER_MB})")
    add("--weight-format", choices=WEIGHT_FORMATS, help=f"of the experts on the device (default {WEIGHT_FORMAT})")
    add("--cann", type=parse_version, metavar="V", help="CANN version (default unknown: all rules apply)")
    add("--hierarchy", action="store_true", help="MC2 in two levels, within and between nodes")
    add_unpermute_operator(add)


def add_unpermute_operator(add: Any) -> None:
    """Add ``--unpermute-operator`` to a command."""
    add(
        "--unpermute-operator",
        choices=UNPERMUTE_OPERATORS,
        default=TOKEN_UNPERMUTE,
        metavar="OPERATOR",
        help=f"of AllGather and AllToAll: {' or '.join(UNPERMUTE_OPERATORS)} (default {TOKEN_UNPERMUTE})",
    )


def add_policy(add: Any) -> None:
    """Add ``--policy`` to a command."""
    add(
        "--policy",
        choices=POLICIES,
        default=AUTO,
        metavar="POLICY",
        help=f"how to choose among what is legal, of {', '.join(POLICIES)} (default auto: by cost; fixed: with --comm, what "
        "that asks for)",
    )


def check_policy(comm: str, policy: str) -> None:
    """Refuse a policy that does not go with ``--comm``.

    Raises:
        UsageError: see above.
    """
    if comm == AUTO and policy == FIXED:
        names = ",".join(IMPLEMENTATION_FORMS)
        raise UsageError(f"argument --policy: is {FIXED} without --comm; accepted: with --comm {{{names}}}")
    if comm != AUTO and policy not in (AUTO, FIXED):
        raise UsageError(
            f"argument --policy: is {policy} with --comm {comm}, which leaves nothing to choose; accepted: {FIXED}, or "
            "without --comm"
        )


def add_prices(add: Any) -> None:
    """Add what prices depend on to a command."""
    add(
        "--ranks-per-node",
        type=parse_positive,
        default=0,
        metavar="N",
        help="ranks of a node, for prices (default the SoC's)",
    )
    rows = "CSV file of measured rows, in place of constants of prices"
    add("--measured", type=parse_file, metavar="FILE", help=rows)


def read_measured(path: str | None, soc: str) -> tuple[Row, ...]:
    """The rows of ``--measured``; none where it is not given.

    Raises:
        UsageError: the file is wrong.
    """
    try:
        return () if path is None else require_rows("argument --measured:", path, soc)
    except MeasuredError as error:
        raise UsageError(str(error)) from error
