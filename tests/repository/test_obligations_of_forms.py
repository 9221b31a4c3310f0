"""What each form of a model owes: a gate by its code and by its config, and for a spelling a layer, words and a row of a page.

As ``test_obligations.py``: a test that fails names the step of docs/adding.md that was left out.
"""

from __future__ import annotations

import re

from checklists import forgotten, page, require_words

MODEL = "A model form"
GATES_BY_CODE = "moe_lowering/integrations/expert_gates.py"
GATES_BY_CONFIG = "moe_lowering/explanation/configs.py"
FORMS_FILE = "moe_lowering/passes/raise_foreign/find_foreign_blocks.py"
LAYERS_FILE = "tests/helpers/foreign_forms.py"


def names_of_forms() -> set[str]:
    """Those that are read by what each operator means; the others are chains of torch_npu's, with tables of their own."""
    from moe_lowering.passes.raise_foreign.find_foreign_blocks import FORMS
    from moe_lowering.passes.raise_foreign.npu_forms import NPU_FORMS

    return FORMS.keys() - {form.name for form in NPU_FORMS}


def test_gates_are_known_by_code_and_by_config() -> None:
    """Where a gate is the default one in another precision (no activation), configs need not tell it apart."""
    from moe_lowering.explanation.configs import GATES
    from moe_lowering.integrations.expert_gates import OWN_GATES

    gates = [(model, gate) for gate in OWN_GATES.values() if gate.activation for model in gate.models]
    by_code = {model: (gate.activation, gate.interleaved) for model, gate in gates}
    by_config = {model: (gate["activation"], gate.get("interleaved", False)) for model, gate in GATES.items()}
    missing = by_config.keys() - by_code.keys()
    assert not missing, forgotten(MODEL, GATES_BY_CODE, missing)
    missing = by_code.keys() - by_config.keys()
    assert not missing, forgotten(MODEL, GATES_BY_CONFIG, missing)
    assert by_code == by_config and len(gates) == len(by_code)
    assert all(gate.models for gate in OWN_GATES.values())


def test_form_is_raised() -> None:
    """One layer of each form, with the result that it had; ``tests/passes/test_raise_foreign.py`` has all layers."""
    import foreign_forms
    from raise_graphs import graph_of, lower, run
    from reference import assert_near

    layers, names = {layer.form: layer for layer in reversed(foreign_forms.FORMS.values())}, names_of_forms()
    assert names <= layers.keys(), forgotten(MODEL, LAYERS_FILE, names - layers.keys())
    assert layers.keys() <= names, forgotten(MODEL, FORMS_FILE, layers.keys() - names)
    for name, layer in layers.items():
        gm, made = graph_of(layer)
        (block,) = lower(gm, strict=True).blocks
        assert block.raised_from == name
        assert_near(run(gm, made), layer.reference(made), layer.dtype)


def test_anchors_are_told_where_they_are_left() -> None:
    """By the words of their names; operators of ATen by what they compute (``test_find_foreign.py``)."""
    from moe_lowering.passes.leftovers.foreign_operators import is_moe_name
    from moe_lowering.passes.raise_foreign.find_foreign_blocks import FORMS

    anchors = {anchor for form in FORMS.values() for anchor in form.anchors if not anchor.startswith("aten.")}
    untold = {anchor for anchor in anchors if not is_moe_name(anchor.split(".")[1])}
    assert not untold, forgotten(MODEL, "moe_lowering/passes/leftovers/foreign_operators.py", untold)


def test_form_is_documented() -> None:
    table = page("docs/raising.md").split("| form (`raised_from`) |", 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    require_words(MODEL, "docs/raising.md", rows, names_of_forms())
