"""A toy of each kind of addition, made by the steps of ``docs/adding.md``: one edit for each step of each list.

Edits are of the files as they stand, by lines that must be there once: who changes such a line changes it here, too.
"""

from __future__ import annotations

import dataclasses

from checklist_process import Insert

Edits = dict[tuple[str, int], tuple[Insert, ...]]

RULE = """
[[limit]]
code = "toy.soc"
operator = "toy"
value = "soc"
one_of = ["A2", "A3"]
source = "here.allgather: a toy"
advice = "run the model on A2 or A3"
"""
FACT = """
[[group]]
source = "here.allgather: a toy"
facts = [
  { code = "toy.soc", operators = ["toy"], only = ["soc", ["A2", "A3"]] },
]
"""
FILE = '''"""A toy: AllGather by another name."""

import dataclasses

from moe_lowering.passes.operator_calls import Rules
from moe_lowering.passes.implementations.allgather import ALLGATHER
from moe_lowering.passes.implementations.base import Implementation

TOY = Implementation(
    "toy",
    lambda spec, deployment: Rules("toy", {}),
    lambda deployment: tuple(dataclasses.replace(form, name="toy") for form in ALLGATHER.forms(deployment)),
)
'''
COSTS_OF_A_TOY = "".join(
    f"| {ep} | {weights} | toy | 14 | 4 | 1.0 | 1.0 | 0 |\n"
    for ep in (16, 32)
    for weights in ("bf16", "W8A8", "W4A8", "W4A16")
)
IMPLEMENTATION: Edits = {
    ("An implementation", 1): (Insert("moe_lowering/vocabulary.py", '    "fused_mc2": (', '    "toy": ("toy",),\n'),),
    ("An implementation", 2): (Insert("moe_lowering/passes/implementations/toy.py", "", FILE),),
    ("An implementation", 3): (
        Insert(
            "moe_lowering/passes/implementations/__init__.py",
            "from moe_lowering.vocabulary import",
            "from moe_lowering.passes.implementations.toy import TOY\n",
        ),
        Insert("moe_lowering/passes/implementations/__init__.py", "MC2, FUSED_MC2)}", "TOY, "),
    ),
    ("An implementation", 4): (Insert("moe_lowering/limits/data/implementations.toml", None, RULE),),
    ("An implementation", 5): (Insert("tests/helpers/limit_facts/implementations.toml", None, FACT),),
    ("An implementation", 6): (
        Insert(
            "moe_lowering/matrix/forms.py",
            '        WeightForm(\n            "dispatch_ffn_combine"',
            '        WeightForm("toy", "toy", "toy", ("npu.npu_moe_init_routing_v2",)),\n',
        ),
    ),
    ("An implementation", 7): (Insert("README.md", "| `fused_mc2` (", "| `toy` | AllGather | everywhere |\n"),),
    ("An implementation", 8): (Insert("docs/matrix.md", "; `fused_mc2` as `dispatch_ffn_combine`", "; `toy`"),),
    ("An implementation", 9): (Insert("docs/costs.md", "| 16 | bf16 | allgather |", COSTS_OF_A_TOY),),
}

SOC_RECORD = """        Soc(
            "A9",
            "Ascend990_1",
            r"Ascend990_\\d",
            ("A9",),
            5,
        ),
"""
SOC_ROW = """
[[limit]]
code = "gmm.x_dtype"
operator = "npu_grouped_matmul"
soc = ["A9"]
value = "x_dtype"
one_of = ["float16"]
source = "wheel.docs: a toy"
advice = "run the model in float16"
"""
SOC_FIGURES = """
[A9]
ranks_per_node = 8
memory = 1.0
memory_gib = 1
within = { gb_s = 1.0, latency_us = 1.0 }
between = { gb_s = 1.0, latency_us = 1.0 }
tops = { 16bit = 1.0, int8 = 1.0, float32 = 1.0 }
source = "wheel.docs: a toy"
"""
SOC_FACT = """
[[group]]
source = "wheel.docs: a toy"
facts = [
  { code = "gmm.x_dtype", soc = "A9", only = ["x_dtype", ["float16"]] },
]
"""
# What the tables have of npu_grouped_matmul for the SoCs that there are, each by name.
SOC_ABSENT = """
[[absent]]
codes = [{codes}]
operators = ["npu_grouped_matmul"]
soc = ["A9"]
source = "wheel.docs: a toy"
"""


def soc_edits() -> Edits:
    """A SoC on which ``npu_grouped_matmul`` has a rule of its own, and none of those that name other SoCs."""
    from moe_lowering.limits import load
    from moe_lowering.vocabulary import SOCS

    rows = [row for row in load() if row.operator == "npu_grouped_matmul"]
    everywhere = {row.code for row in rows if set(row.soc) == set(SOCS)} | {"gmm.x_dtype"}
    codes = ", ".join(f'"{code}"' for code in sorted({row.code for row in rows} - everywhere))
    return {
        ("A SoC", 1): (Insert("moe_lowering/vocabulary.py", '        Soc(\n            "310P"', SOC_RECORD),),
        ("A SoC", 2): (
            Insert("moe_lowering/limits/data/grouped_matmul_plain.toml", None, SOC_ROW),
            Insert("moe_lowering/limits/data/absent.toml", None, SOC_ABSENT.format(codes=codes)),
        ),
        ("A SoC", 3): (Insert("tests/helpers/limit_facts/grouped_matmul.toml", None, SOC_FACT),),
        ("A SoC", 4): (
            Insert(
                "moe_lowering/passes/vllm_ascend_rules.py",
                '    if s.soc == "310P":',
                '    if s.soc == "A9":\n        return "allgather"\n',
            ),
        ),
        ("A SoC", 5): (Insert("moe_lowering/prices/data/machines.toml", None, SOC_FIGURES),),
        ("A SoC", 6): (Insert("docs/deployment.md", "| `310P` | `Asc", "| `A9` | `Ascend990_1` | `A9` |\n"),),
    }


SOURCE = """
[toy_docs]
title = "toy"
version = "1.0"
link = "https://example.org/{path}"
[toy_docs.documents]
dispatch = "dispatch.md"
"""
LIMIT_ROW = """
[[limit]]
code = "mc2.toy_dims"
operator = "npu_moe_distribute_dispatch_v2"
value = "toy_dims"
one_of = [2]
source = "toy_docs.dispatch: two axes"
advice = "flatten the tokens"
"""
LIMIT_FACT = """
[[group]]
source = "ops_transformer.dispatch: a toy"
facts = [
  { code = "mc2.toy_dims", operators = ["npu_moe_distribute_dispatch_v2"], only = ["toy_dims", [2]] },
]
"""
LIMIT: Edits = {
    ("A limit", 1): (Insert("moe_lowering/limits/data/mc2_tensors.toml", None, LIMIT_ROW),),
    ("A limit", 2): (Insert("moe_lowering/limits/sources.toml", None, SOURCE),),
    ("A limit", 3): (
        Insert(
            "moe_lowering/limits/calls/communication.py",
            '        "quant_mode": a["quant_mode"],',
            '        "toy_dims": dims(x),\n',
        ),
    ),
    ("A limit", 4): (Insert("tests/helpers/limit_facts/mc2_tensors.toml", None, LIMIT_FACT),),
    ("A limit", 5): (Insert("docs/limits.md", "| commAlg |", "| a toy | `mc2.toy_dims` |\n"),),
}

KERNEL = """    if activation == "toy":
        return gate.relu().mul_(up)
"""
EMITTER = """def _toy(emit: Emitter, gate: Node, up: Node, spec: BlockSpec) -> Halves:
    return emit.call(aten.relu.default, gate), up


"""
ACTIVATION: Edits = {
    ("An activation", 1): (
        Insert("moe_lowering/vocabulary.py", '        Activation("gelu_tanh"),', '        Activation("toy"),\n'),
    ),
    ("An activation", 2): (
        Insert(
            "moe_lowering/custom_ops/grouped_mlp.py",
            '    raise ValueError(f"grouped_mlp: activation is {activation!r}, which has no kernel',
            KERNEL,
        ),
    ),
    ("An activation", 3): (
        Insert("moe_lowering/passes/implementations/activation.py", "def _gelu_tanh(", EMITTER),
        Insert(
            "moe_lowering/passes/implementations/activation.py", '    "gelu_tanh": _gelu_tanh,', '    "toy": _toy,\n'
        ),
    ),
    ("An activation", 4): (
        Insert(
            "tests/helpers/reference.py",
            '    if activation == "gelu":',
            '    if activation == "toy":\n        return torch.where(gate > 0, gate, 0.0) * up\n',
        ),
    ),
    ("An activation", 5): (
        Insert("docs/architecture.md", "    - `gelu` / `gelu_tanh`: ", "    - `toy`: `relu(g)*u`\n"),
    ),
}

FORMAT_RECORD = """ExpertFormat(
            "w8toy", "w8toy", 8, "int8", int8_rows=True, scale_dtypes=("float32", "bfloat16", "int64"), snr_floor=28.0
        ),
        """
COSTS_OF_A_FORMAT = "".join(
    f"| {ep} | W8TOY | {name} | 16 | 3 | 1.0 | 1.0 | 0 |\n"
    for ep in (16, 32) for name in ("allgather", "alltoall (static)", "mc2")
)  # fmt: skip
FORMAT: Edits = {
    ("A weight format", 1): (Insert("moe_lowering/vocabulary.py", 'ExpertFormat("w4a16"', FORMAT_RECORD),),
    ("A weight format", 2): (Insert("moe_lowering/custom_ops/grouped_mlp.py", '"w4a16"})', '"w8toy", '),),
    ("A weight format", 3): (Insert("moe_lowering/custom_ops/npu_grouped_mlp.py", '"w4a16"})', '"w8toy", '),),
    ("A weight format", 4): (Insert("moe_lowering/passes/implementations/quantised_mlp.py", '"w4a16"})', '"w8toy", '),),
    ("A weight format", 5): (Insert("docs/architecture.md", "`w4a16` 16-bit rows", "`w8toy` the same as `w8a8`. "),),
    ("A weight format", 6): (Insert("docs/matrix.md", "| `w4a16` | 40 dB", "| `w8toy` | 28 dB | 31 | a toy |\n"),),
    ("A weight format", 7): (Insert("docs/costs.md", "| 16 | W4A16 | allgather |", COSTS_OF_A_FORMAT),),
}


WRAPPER = '''"""A toy: dispatch_ffn_combine by another name."""

from moe_lowering.custom_ops import dispatch_ffn_combine as ffn
from moe_lowering.custom_ops.library import register, schema_of

SCHEMA = schema_of("toy_fused", ffn.DispatchFfnCombineCall, "(Tensor y, Tensor expert_token_nums)")
register(SCHEMA, ffn.DispatchFfnCombineCall, cpu=ffn._cpu, fake=ffn._fake, npu=ffn._npu, side_effect=True)
'''
FUSED_ROW = """
[[limit]]
code = "toy_fused.soc"
operator = "toy_fused"
value = "soc"
one_of = ["A3"]
source = "here.allgather: a toy"
advice = "run the model on A3"
"""
FUSED_FACT = """operators = ["toy_fused"]
soc = "A2 A3 A5"

[[group]]
source = "here.allgather: a toy"
facts = [
  { code = "toy_fused.soc", only = ["soc", ["A3"]] },
]
"""
FUSED_SCHEMA = """[[schema]]
operator = "toy_fused"
version = "toy 1.0"
schema = "toy_fused(Tensor x) -> Tensor"
source = "a toy"

"""
TARGET = '    FusedOperator("toy_fused", 1, "sgl_kernel_npu", _ffn_arguments, _bits_or_float, max_output_size),\n'
MATRIX_ROW = """        WeightForm(
            "toy_fused", "fused_mc2", "toy_fused", ("moe_lowering.toy_fused",),
            {"fused_mode": 1, "providers": (("sgl_kernel_npu", "1.0"),)},
        ),
"""
FUSED: Edits = {
    ("A fused operator", 1): (Insert("moe_lowering/vocabulary.py", '"mega_moe", "dispatch_gmm', '"toy_fused", '),),
    ("A fused operator", 2): (Insert("moe_lowering/custom_ops/toy_fused.py", "", WRAPPER),),
    ("A fused operator", 3): (
        Insert("moe_lowering/custom_ops/__init__.py", "    route,\n)", "    toy_fused,\n"),
        Insert("moe_lowering/custom_ops/__init__.py", '    "route",\n]', '    "toy_fused",\n'),
    ),
    ("A fused operator", 4): (
        Insert(
            "moe_lowering/passes/implementations/fused_mc2.py", '    FusedOperator("dispatch_gmm_combine_decode"', TARGET
        ),
    ),
    ("A fused operator", 5): (Insert("moe_lowering/limits/data/toy_fused.toml", "", FUSED_ROW),),
    ("A fused operator", 6): (Insert("tests/helpers/limit_facts/toy_fused.toml", "", FUSED_FACT),),
    ("A fused operator", 7): (
        Insert(
            "moe_lowering/limits/schemas.toml", '[[signature]]\noperator = "mega_moe"\nversion = "cann_ops_transformer of',
            FUSED_SCHEMA,
        ),
    ),
    ("A fused operator", 8): (
        Insert("moe_lowering/limits/calls/fused.py", '    "mega_moe": mega', '    "toy_fused": dispatch_ffn_combine,\n'),
    ),
    ("A fused operator", 9): (
        Insert("moe_lowering/passes/costs/operator_results.py", '    "mega_moe": _fused', '    "toy_fused": _fused,\n'),
    ),
    ("A fused operator", 10): (
        Insert("moe_lowering/backends/ge_converters.py", '    "mega_moe": "no GE', '    "toy_fused": "a toy",\n'),
    ),
    ("A fused operator", 11): (
        Insert("moe_lowering/matrix/forms.py", '        WeightForm(\n            "dispatch_gmm', MATRIX_ROW),
    ),
    ("A fused operator", 12): (
        Insert("provider_tests/forms.py", "DECODE: dispatch_gmm_combine_decode}", '"toy_fused": dispatch_ffn_combine, '),
        Insert("provider_tests/forms.py", "FFN: ffn_forms, DECODE", '"toy_fused": ffn_forms, '),
    ),
}  # fmt: skip

# Reads what the form ``grouped_mm`` reads, at one of its anchors, and has one that is nowhere.
FORM = """dataclasses.replace(
    match_grouped_mm.FORM,
    name="toy",
    anchors=("transformers.grouped_mm_fallback.default", "toy.everyone_mlp.default"),
    match=lambda *graph: dataclasses.replace(match_grouped_mm.match(*graph), form="toy"),
), """
MODEL: Edits = {
    ("A model form", 1): (
        Insert("moe_lowering/integrations/expert_gates.py", '    "d2280', '    "toy": OwnGate("swiglu_oai", ("toy",)),\n'),
    ),
    ("A model form", 2): (
        Insert("moe_lowering/explanation/configs.py", '    "deepseek_v4": {', '    "toy": {"activation": "swiglu_oai"},\n'),
    ),
    ("A model form", 3): (
        Insert("moe_lowering/passes/raise_foreign/find_foreign_blocks.py", "from collections.abc", "import dataclasses\n"),
        Insert("moe_lowering/passes/raise_foreign/find_foreign_blocks.py", "match_grouped_mm.FORM, match", FORM),
    ),
    ("A model form", 4): (
        Insert(
            "tests/helpers/foreign_forms.py", '    "gpt-fast": ', '    "toy": Foreign("toy", grouped(), NK, nk(), FLOAT),\n'
        ),
    ),
    ("A model form", 5): (
        Insert("moe_lowering/passes/leftovers/foreign_operators.py", '"grouped_mm", "grouped_m', '"everyone_mlp", '),
    ),
    ("A model form", 6): (Insert("docs/raising.md", "| `gathered_weights` |", "| `toy` | a toy | nobody |\n"),),
}  # fmt: skip


def all_edits() -> Edits:
    """The edit of each step, by kind and number."""
    return {**IMPLEMENTATION, **soc_edits(), **LIMIT, **ACTIVATION, **FORMAT, **FUSED, **MODEL}


def broken(edits: tuple[Insert, ...], old: str, new: str) -> tuple[Insert, ...]:
    """The same edits with one thing wrong in them."""
    assert sum(old in edit.text for edit in edits) == 1
    return tuple(dataclasses.replace(edit, text=edit.text.replace(old, new)) for edit in edits)
