"""JSON schemas of what reports and commands print as JSON, and their version.

``schema_version`` rises when a field goes, or gets another meaning or kind; a new field alone does not change it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from moe_lowering.lookup import look_up

SCHEMA_VERSION = 1
# What each is the schema of.
SCHEMAS = {
    "report": "LoweringReport.to_json()",
    "lower": "moe-lowering lower --json",
    "explain": "Explanation.to_json(), moe-lowering explain --json",
    "explain_table": "moe-lowering explain --json about several deployments",
    "matrix": "moe-lowering matrix --json",
    "models": "moe-lowering models --json FILE",
}


def json_value(value: Any) -> Any:
    """A value as JSON has it, before it is written: lists in place of tuples, which are no arrays to a validator."""
    if isinstance(value, dict):
        return {name: json_value(each) for name, each in value.items()}
    return [json_value(each) for each in value] if isinstance(value, (list, tuple)) else value


def json_fields(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON has them."""
    fields: dict[str, Any] = json_value(dataclasses.asdict(record))
    return fields


def schema(name: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of that name.

    Raises:
        ValueError: there is none; the message has those that there are.
    """
    look_up(SCHEMAS, name, "schema")
    loaded: dict[str, Any] = json.loads((Path(__file__).parent / f"{name}.json").read_text("utf-8"))
    return loaded
