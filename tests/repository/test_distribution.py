"""What is handed out: the source archive is complete, its metadata current, the pins right for every Python version."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

TOP = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
FOLDERS = ("moe_lowering", "tests", "docs", "benchmarks", "provider_tests", ".ci")
FILES = ("pyproject.toml", "constraints.txt", "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")
KINDS = (".py", ".toml", ".md", ".c", ".h", ".typed")


def source_files() -> set[str]:
    """What somebody needs who has the archive and no checkout."""
    inside = (path for folder in FOLDERS for path in (TOP / folder).rglob("*") if path.suffix in KINDS)
    return {*FILES, *(str(path.relative_to(TOP)) for path in inside)}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> tuple[set[str], str]:
    """Names of the files in the source archive, and its metadata."""
    folder = tmp_path_factory.mktemp("sdist")
    build = f"from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Deprecat" not in done.stderr, done.stderr
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        metadata = next(m for m in tar.getmembers() if m.name.count("/") == 1 and m.name.endswith("/PKG-INFO"))
        return names, tar.extractfile(metadata).read().decode()


def test_the_source_archive_has_all_that_tests_and_documentation_need(archive):
    assert not source_files() - archive[0]
    assert "tests/conftest.py" in source_files()  # the list is of what is there


def test_the_licence_is_an_expression(archive):
    assert "\nLicense-Expression: Apache-2.0\n" in archive[1]
    assert "\nLicense-File: LICENSE\n" in archive[1]


def pins(python: str) -> Counter[str]:
    lines = (line.partition("#")[0].strip() for line in (TOP / "constraints.txt").read_text().splitlines())
    pinned = [Requirement(line) for line in lines if line]
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    return Counter(pin.name for pin in pinned if pin.marker is None or pin.marker.evaluate(environment))


@pytest.mark.parametrize("python", PYTHONS)
def test_each_package_is_pinned_once_for_each_python(python):
    assert pins(python) == Counter(dict.fromkeys(pins("3.11"), 1))
