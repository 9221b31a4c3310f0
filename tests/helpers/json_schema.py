"""Holds a value against a JSON schema: the keywords that the package's schemas use; another keyword is an error."""

from __future__ import annotations

from typing import Any

KINDS = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}
KNOWN = {
    "$schema", "$defs", "$ref", "title", "type", "properties", "required", "additionalProperties", "items", "anyOf", "const",
}  # fmt: skip


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None, path: str = "$") -> list[str]:
    """What of a value is not as the schema says, with its path; [] when all is."""
    root = schema if root is None else root
    assert schema.keys() <= KNOWN, f"unknown keywords: {sorted(schema.keys() - KNOWN)}"
    if "$ref" in schema:
        return problems(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, path)
    if "anyOf" in schema:
        tried = [problems(value, each, root, path) for each in schema["anyOf"]]
        return [] if [] in tried else tried[-1]
    if "const" in schema:
        return [] if value == schema["const"] else [f"{path} is {value!r}, not {schema['const']!r}"]
    kinds = schema.get("type", list(KINDS))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(KINDS[kind](value) for kind in kinds):
        return [f"{path} is {value!r}, no {' or '.join(kinds)}"]
    found = []
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found += [f"{path} has no {name}" for name in schema.get("required", ()) if name not in value]
        more = schema.get("additionalProperties", True)
        for name, each in value.items():
            if name in known:
                found += problems(each, known[name], root, f"{path}.{name}")
            elif more is False:
                found.append(f"{path} has {name}, which the schema has not")
            elif isinstance(more, dict):
                found += problems(each, more, root, f"{path}.{name}")
    if isinstance(value, list) and "items" in schema:
        for at, each in enumerate(value):
            found += problems(each, schema["items"], root, f"{path}[{at}]")
    return found
