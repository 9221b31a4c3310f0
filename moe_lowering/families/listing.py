"""The families: folders of transformers' models whose code has a class of experts. Without torch."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

_EXPERTS = re.compile(r"^class \w*Experts\b", re.MULTILINE)
# Model types of families whose folder is not one.
_TYPES = {"nllb_moe": "nllb-moe", "inkling": "inkling_mm_model"}


@functools.cache
def families() -> tuple[str, ...]:
    """Names of the families, sorted; none where transformers is not installed."""
    return tuple(sorted(folder.name for folder in _folders() if _EXPERTS.search(_code(folder))))


def model_type(family: str) -> str:
    """The model type by which transformers knows the whole model of a family."""
    return _TYPES.get(family, family)


def transformers_version() -> str:
    """Of the installed one; "none" where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformers")
    except PackageNotFoundError:
        return "none"


def _folders() -> list[Path]:
    spec = importlib.util.find_spec("transformers")
    places = (spec.submodule_search_locations or ()) if spec else ()
    return [folder for place in places for folder in Path(place, "models").glob("*") if folder.is_dir()]


def _code(folder: Path) -> str:
    file = folder / f"modeling_{folder.name}.py"
    return file.read_text("utf-8") if file.is_file() else ""
