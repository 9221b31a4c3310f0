"""What each fused operator owes: a wrapper, rows, a reader, schemas, a place in the matrix and in every table by name.

As ``test_obligations.py``: a test that fails names the step of docs/adding.md that was left out.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from checklists import RECORD, ROOT, forgotten, require_words

from moe_lowering.vocabulary import IMPLEMENTATION_FORMS

FUSED = "A fused operator"
NAMES = IMPLEMENTATION_FORMS["fused_mc2"]


def require(file: str, words: Any) -> None:
    """``file`` has each fused operator; it may have others."""
    missing = sorted({*NAMES} - {*words})
    assert not missing, forgotten(FUSED, file, f"has no {', '.join(missing)}")


def test_fused_operator_has_a_target() -> None:
    from moe_lowering.passes.implementations.fused_mc2 import TARGETS

    targets = [target.name for target in TARGETS]
    require_words(FUSED, "moe_lowering/passes/implementations/fused_mc2.py", targets, NAMES)


def test_fused_operator_is_wrapped() -> None:
    """An operator that writes its result is not dropped as dead code, and its schema has what all of them take."""
    folder = "moe_lowering/custom_ops"
    require(f"{folder}/<name>.py", {name for name in NAMES if (ROOT / folder / f"{name}.py").is_file()})
    import torch

    from moe_lowering import custom_ops

    require(f"{folder}/__init__.py", custom_ops.__all__)
    for name in NAMES:
        schema = getattr(torch.ops.moe_lowering, name).default._schema
        assert {"x", "ids", "weights", "w13", "w2", "mask", "group", "ep_size"} <= {a.name for a in schema.arguments}


def test_fused_operator_has_rows() -> None:
    from moe_lowering.limits import load

    rows = {row.operator for row in load() if row.value.text == "soc" and row.one_of}
    require("moe_lowering/limits/data/<name>.toml", rows)


def test_fused_operator_has_facts() -> None:
    from fact_tables import cases

    from moe_lowering.limits import load

    illegal = {(case.operator, case.code) for case in cases() if not case.legal}
    missing = {(row.operator, row.code) for row in load() if row.operator in NAMES} - illegal
    assert not missing, forgotten(FUSED, "tests/helpers/limit_facts/<name>.toml", missing)


def read_schemas() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    return tomllib.loads((ROOT / "moe_lowering/limits/schemas.toml").read_text("utf-8"))


def test_fused_operator_has_a_schema() -> None:
    schemas = read_schemas()
    require("moe_lowering/limits/schemas.toml", {s["operator"] for s in (*schemas["schema"], *schemas["signature"])})


def test_fused_operator_is_read() -> None:
    from moe_lowering.limits.calls.fused import READERS
    from moe_lowering.passes.costs.operator_results import RESULTS

    require_words(FUSED, "moe_lowering/limits/calls/fused.py", READERS, NAMES)
    require("moe_lowering/passes/costs/operator_results.py", RESULTS)


def test_fused_operator_in_graphs_of_ge() -> None:
    from moe_lowering.backends.ge_converters import REFUSED, TYPES

    require("moe_lowering/backends/ge_converters.py", (*REFUSED, *TYPES))
    assert not REFUSED.keys() & TYPES.keys()


def test_fused_operator_has_a_row_in_the_matrix() -> None:
    from moe_lowering.matrix.forms import FORMS

    rows = [row.form for row in FORMS.values() if row.comm == "fused_mc2"]
    require_words(FUSED, "moe_lowering/matrix/forms.py", rows, NAMES)


def test_fused_operator_is_called_in_provider_tests() -> None:
    file = "provider_tests/forms.py"
    spec = importlib.util.spec_from_file_location("provider_forms", ROOT / file)
    assert spec is not None and spec.loader is not None
    module = sys.modules["provider_forms"] = importlib.util.module_from_spec(spec)  # its dataclasses look there
    spec.loader.exec_module(module)
    operators = {schema["operator"] for schema in read_schemas()["schema"]} & {*NAMES}
    missing = operators - module.MODULES.keys()
    assert not missing, forgotten(FUSED, file, f"has no {', '.join(sorted(missing))}")
    assert all(module.forms(name) for name in operators)


def test_a_step_is_named_by_its_file() -> None:
    assert forgotten(FUSED, RECORD).startswith(f"docs/adding.md, {FUSED}, step 1: {RECORD}: its name among the forms")
