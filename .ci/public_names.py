"""Writes docs/reference.md: every public name in one line, and below the directives that the site puts docstrings for.

python .ci/public_names.py    # `make reference`; tests/repository/test_pages.py compares
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "reference.md"
TOP = "moe_lowering"
HEAD = """# Reference

**What:** every public name in one line, and below with its arguments, results and errors.
**For:** whoever writes code with this package. **Next:** [the user guide](use.md).

Written by `make reference` from the docstrings; do not edit. The lines with `:::` at the end are where the site has the
docstrings in full: `make docs` builds it into `build/site`. In a shell `python -m pydoc moe_lowering.MoE` prints one of them.
"""
SECTIONS: dict[str, tuple[str, ...]] = {
    "A model": (
        "MoE", "route", "moe_experts", "shard_experts", "load_experts", "CheckpointError", "quantise_experts", "list_experts",
        "log2phy_from_expert_maps", "drop_unit_smooth_scales",
    ),
    "A deployment": ("Deployment", "check_agreement", "AgreementError"),
    "The pass": (
        "MoeLowering", "LoweringError", "npugraph_ex_options", "lowering_backend", "torchair_config", "interruptible",
    ),
    "Asking": ("explain", "BlockDescription"),
}  # fmt: skip
MODULES = {
    "transformers": "integrations.transformers",
    "Serving": "serving",
    "Testing": "testing",
    "The simulator": "simulator",
}


def main() -> int:
    PAGE.write_text(page(), "utf-8")
    return 0


def page() -> str:
    """The whole page, from the docstrings that are there now."""
    package, parts, full = importlib.import_module(TOP), [HEAD], ["## In full\n"]
    listed = [name for names in SECTIONS.values() for name in names]
    if sorted(listed) != sorted(package.__all__):
        differ = set(listed) ^ set(package.__all__)
        raise ValueError(f"SECTIONS of {Path(__file__).name} and moe_lowering.__all__ differ in {differ}")
    for title, names in SECTIONS.items():
        parts.append(table(title, {f"{TOP}.{name}": getattr(package, name) for name in names}))
        full += [f"::: {TOP}.{name}" for name in names]
    for title, place in MODULES.items():
        module = importlib.import_module(f"{TOP}.{place}")
        parts.append(table(title, {f"{module.__name__}.{name}": getattr(module, name) for name in module.__all__}))
        full.append(f"::: {module.__name__}")
    return "\n".join([*parts, *full]) + "\n"


def table(title: str, values: dict[str, object]) -> str:
    lines = [f"| `{name}` | {first_sentence(name, value)} |" for name, value in values.items()]
    return "\n".join([f"## {title}", "", "| name | what it is |", "|---|---|", *lines, ""])


def first_sentence(name: str, value: object) -> str:
    """Of a docstring; of a constant its value."""
    text = inspect.getdoc(value) if callable(value) or inspect.ismodule(value) else None
    if text is None:
        return f"`{value!r}`"
    first = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=\.)\s(?=[A-Z`])", first)[0].removesuffix(".")
    if not sentence:
        raise ValueError(f"{name} has no docstring")
    return sentence.replace("|", "\\|").replace("``", "`")


if __name__ == "__main__":
    sys.exit(main())
