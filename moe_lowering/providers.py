"""Installed libraries with fused operators (``vocabulary.PROVIDERS``): their versions and builds, read without an import.

Here are also the checks of what a deployment declares of them. vllm-ascend writes the SoC that it was built for into
``_build_info.py`` (``__device_type__``; its setup.py). The wheels on the public index are builds for A2
(``vocabulary.WHEEL_BUILDS``): the fused operators' schemas are there and their kernels are not, so that the first call fails.
The other libraries' builds do not say a SoC.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from moe_lowering.vocabulary import PROVIDERS, SOCS

UNKNOWN = "unknown"  # a build that does not say for which SoC it was made
# Of the providers that are built for one SoC: the file that says which, and vllm-ascend's words for ours.
_BUILD_FILES = {"vllm_ascend": "_build_info.py"}
_DEVICE_TYPES = {word: soc.name for soc in SOCS.values() for word in soc.device_types}
# A number, then parts that have a digit each or are a word of releases, as CANN, torch_npu and the providers write them:
# 8.2.RC1, 0.18.0rc1, 2.9.0.post2, 8.1.RC1.beta
_VERSION = re.compile(r"\d+(\.((?=\w*\d)\w+|alpha|beta|dev|post))*", re.ASCII)
VERSIONS = "a version such as 8.5.0 or 8.2.RC1"  # what is accepted, in words
_RELEASE = re.compile(r"v?(\d+(?:\.\d+)*)(.*)")


@dataclasses.dataclass(frozen=True)
class Package:
    """An installed provider. ``build`` is a SoC, ``unknown``, or "" where builds do not differ; ``where`` it was read."""

    name: str
    version: str
    build: str
    where: str

    @property
    def record(self) -> tuple[str, str, str]:
        return self.name, self.version, self.build

    @property
    def version_text(self) -> str:
        built = {"": "", UNKNOWN: ", for a SoC that its build does not name"}
        return f"{self.name} {self.version}" + built.get(self.build, f", built for {self.build}")


def installed_providers() -> tuple[Package, ...]:
    """The providers that this Python would import now."""
    return _packages_in(tuple(sys.path))


def declarable() -> tuple[tuple[str, str], ...]:
    """(name, version) of those, as ``Deployment.providers`` takes them; what has no version is not among them."""
    packages = installed_providers()
    return tuple((package.name, package.version) for package in packages if is_version(package.version))


@functools.lru_cache(maxsize=8)  # to look up a package that is not installed reads every directory of the path
def _packages_in(path: tuple[str, ...]) -> tuple[Package, ...]:
    packages = (_find(name) for name in PROVIDERS)
    return tuple(package for package in packages if package is not None)


def _find(name: str) -> Package | None:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    version = str(distribution.version or UNKNOWN).partition("+")[0]  # what follows names a build, not a version
    file = _BUILD_FILES.get(name)
    if file is None:
        return Package(name, version, "", f"metadata of {name}")
    for place in (Path(str(distribution.locate_file(name))), *_directories(name)):
        if (place / file).is_file():
            return Package(name, version, _device_type(place / file), str(place / file))
    return Package(name, version, UNKNOWN, f"metadata of {name}, which has no {file}")


def _directories(name: str) -> list[Path]:
    """Where Python would import a package from: an editable install's files are not beside its metadata."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module that something put into sys.modules by hand
        return []
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec is not None else []


def _device_type(file: Path) -> str:
    """The SoC in a ``_build_info.py``, whose text is read and not run."""
    try:
        statements = ast.parse(file.read_text("utf-8")).body
    except (OSError, ValueError, SyntaxError):
        return UNKNOWN
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            if "__device_type__" in names:
                return soc_of_device_type(statement.value.value)
    return UNKNOWN


def soc_of_device_type(word: object) -> str:
    """Our name of the SoC that vllm-ascend's ``__device_type__`` names, ``UNKNOWN`` for a word that is not known."""
    return _DEVICE_TYPES.get(str(word), UNKNOWN)


def is_version(text: str) -> bool:
    """Whether a text is a version; ``9.x`` and words are none."""
    return _VERSION.fullmatch(text) is not None


def same_version(a: str, b: str) -> bool:
    """Whether two versions are one: ``0.23`` is ``0.23.0``, and what follows a plus sign names a build."""
    return _comparable(a) == _comparable(b)


def _comparable(version: str) -> tuple[str, str]:
    match = _RELEASE.fullmatch(version.strip().partition("+")[0])
    if match is None:
        return version, ""
    release, rest = match.groups()
    return re.sub(r"(\.0+)+$", "", release), rest.lower().lstrip("._-")


def check_providers(providers: Any) -> None:
    """Raises a ValueError unless ``providers`` is a tuple of pairs (name, version)."""
    accepted = f"accepted: pairs (name, version) in a tuple; names: {', '.join(PROVIDERS)}"
    if not isinstance(providers, tuple) or not all(isinstance(p, tuple) and len(p) == 2 for p in providers):
        raise ValueError(f"Deployment: providers is {providers!r}; {accepted}")
    for name, version in providers:
        if name not in PROVIDERS:
            raise ValueError(f"Deployment: providers names {name!r}; {accepted}")
        check_version(f"providers[{name!r}]", version, optional=False)


def check_installed(installed: Any, socs: Collection[str]) -> None:
    """Raises a ValueError unless ``installed`` is a tuple of triples (name, version, build)."""
    builds = ("", UNKNOWN, *socs)
    accepted = (
        f"accepted: triples (name, version, build) in a tuple, or None to look; names: {', '.join(PROVIDERS)}; builds: "
        f"{', '.join(map(repr, builds))}"
    )
    shaped = isinstance(installed, tuple) and all(isinstance(p, tuple) and len(p) == 3 for p in installed)
    if not shaped or not all(
        name in PROVIDERS and isinstance(version, str) and version and build in builds
        for name, version, build in installed
    ):
        raise ValueError(f"Deployment: installed is {installed!r}; {accepted}")


def check_version(name: str, value: Any, optional: bool) -> None:
    """Raises a ValueError unless ``value`` is a version; "" for one that is not known is one too when ``optional``."""
    if (optional and value == "") or (isinstance(value, str) and is_version(value)):
        return
    raise ValueError(f"Deployment: {name} is {value!r}; accepted: {VERSIONS}")
