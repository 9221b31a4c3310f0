"""docs/provider.md: the table of entries is that of limits/schemas.toml, and what it says of versions is what the rules say."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lowering.custom_ops import dispatch_ffn_combine, dispatch_gmm_combine_decode
from moe_lowering.custom_ops.fused import FORMATS
from moe_lowering.limits import limits_for

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = (Path(__file__).parents[2] / "docs" / "provider.md").read_text("utf-8")
PUBLISHED = tomllib.loads((resources.files("moe_lowering.limits") / "schemas.toml").read_text("utf-8"))
DECODE = dispatch_gmm_combine_decode.NAME


def entry_rows() -> list[str]:
    """The table as it must stand in the page."""
    rows = ["| operator | vllm-ascend | weights | entry | arguments |", "|---|---|---|---|---|"]
    for entry in PUBLISHED["entry"]:
        version, formats = entry["version"].removeprefix("vllm-ascend "), ", ".join(entry["quantisation"])
        cells = [f"`{entry['operator']}`", version, formats, f"`{entry['entry']}`", ", ".join(entry["arguments"])]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def test_the_table_of_entries() -> None:
    inside = PAGE.partition("<!-- entries -->\n")[2].partition("<!-- end of entries -->")[0]
    assert inside.splitlines() == entry_rows()
    assert inside.splitlines() != [*entry_rows()[:-1], entry_rows()[-2]]


@pytest.mark.parametrize("entry", PUBLISHED["entry"], ids=lambda e: f"{e['entry']}-{e['version']}")
def test_an_entry_names_the_values_of_its_schema(entry: dict[str, Any]) -> None:
    """Each argument and result once, in the order of the schema but for optional ones and outputs; a twin is noticed."""
    [published] = [s for s in PUBLISHED["schema"] if all(s[key] == entry[key] for key in ("operator", "version"))]
    schema = torch._C.parse_schema(published["schema"])
    known = [value.name for value in (*schema.arguments, *schema.returns)]
    names = entry["arguments"]
    assert set(names) <= set(known) and len(set(names)) == len(names)
    required = [a.name for a in schema.arguments if not a.has_default_value() and a.name in names]
    assert [name for name in names if name in required] == required
    assert [names[1], names[0], *names[2:]] != required
    assert names[-2:] == [value.name for value in schema.returns]


def test_each_format_of_each_version_has_one_entry() -> None:
    for published in PUBLISHED["schema"]:
        operator, version = published["operator"], published["version"]
        here = [e for e in PUBLISHED["entry"] if (e["operator"], e["version"]) == (operator, version)]
        formats = sorted(q for e in here for q in e["quantisation"])
        accepted = sorted(q for q in FORMATS if operator != DECODE or q != "w4a8")
        assert formats in (accepted, [])  # [] for what is older than the wheels that were looked at
    assert {e["operator"] for e in PUBLISHED["entry"]} == {dispatch_ffn_combine.NAME, DECODE}


def version_rows() -> list[tuple[str, bool]]:
    """(version, whether it has dispatch_gmm_combine_decode), of the page's table."""
    inside = PAGE.partition("\n## Which version has which operator\n")[2].partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in inside.splitlines() if line.startswith("| ")][1:]
    return [(version, row[3].startswith("yes")) for row in cells for version in row[0].split(", ")]


def test_the_versions_are_those_of_the_rule() -> None:
    found = version_rows()
    assert len(found) > 8 and {has for _, has in found} == {True, False}
    for version, has in found:
        codes = {row.code for row in limits_for(DECODE, "A3", {"vllm_ascend": version})}
        assert ("fused_decode.removed" in codes) != has, version


def test_the_results_are_there() -> None:
    """Dated, and for both versions that ``make provider`` takes; all passed."""
    inside = PAGE.partition("written by make provider -->\n")[2].partition("<!-- end of results -->")[0]
    assert re.match(r"20\d\d-\d\d-\d\d; ", inside)
    rows = [line for line in inside.splitlines() if re.match(r"\| \d", line)]
    assert rows[0].startswith("| 0.23.0 |") and len(rows) > 1
    assert all(row.endswith("| all passed |") for row in rows)


def test_only_what_passed_is_called_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the table: the operators that a library names, and counts; a test that failed or was skipped shows."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / ".ci"))
    provider = importlib.import_module("provider")
    (tmp_path / "vllm_ascend").mkdir()
    (tmp_path / "vllm_ascend/vllm_ascend_C.cpython.so").write_bytes(b"..dispatch_ffn_combine(Tensor x..")
    (tmp_path / "vllm_ascend/_build_info.py").write_text("__device_type__ = 'A2'\n")
    good = Counter({"passed": 3, "calls passed": 2, "metas passed": 1})
    row = provider.row("0.26.0rc1", tmp_path, (0, good))
    assert row.startswith("| 0.26.0rc1 | A2 | `dispatch_ffn_combine` | `dispatch_gmm_combine_decode` | 2 | 1 | 0 |")
    assert row.endswith("| all passed |")
    for code, more in ((1, {"failure": 1}), (0, {"skipped": 1}), (0, {"passed": -3}), (4, {})):
        counts = good + Counter()
        counts.update({**more, "calls failed": 1})
        row = provider.row("0.26.0rc1", tmp_path, (code, counts))
        assert "| 2 of 3 |" in row and f"did not pass, pytest ended with {code} |" in row
