"""What is handed out: the source archive is complete, its metadata current, the pins right for every Python version."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

TOP = Path(__file__).parents[2]
sys.path.insert(0, str(TOP / ".ci"))

import release  # noqa: E402
import release_names  # noqa: E402

from moe_lowering.limits import table  # noqa: E402
from moe_lowering.limits.row import LimitsError  # noqa: E402

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
FOLDERS = ("moe_lowering", "tests", "docs", "benchmarks", "provider_tests", "vllm_tests", "examples", ".ci", ".github")
NAMES = ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")
FILES = ("pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "mkdocs.yml", *(f"{name}.md" for name in NAMES))
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


def pinned_versions(name: str) -> list[str]:
    """Of constraints.txt: one, or one for some Pythons and another for others."""
    text = (TOP / "constraints.txt").read_text()
    return re.findall(rf"^{re.escape(name)}==([\w.]+)", text, re.M)


@pytest.mark.parametrize("python", PYTHONS)
def test_each_package_is_pinned_once_for_each_python(python):
    assert pins(python) == Counter(dict.fromkeys(pins("3.11"), 1))


def test_wheel_and_archive_run_away_from_the_checkout(tmp_path):
    """The wheel is made of the archive, has every file of the package, and is run in a folder of its own."""
    wheel, _ = release.build(tmp_path)
    package = {name for name in source_files() if name.startswith("moe_lowering/") and not name.endswith(".md")}
    with zipfile.ZipFile(wheel) as files:
        assert package <= set(files.namelist())
    (tmp_path / "away").mkdir()
    release.install_beside(wheel, tmp_path / "target")
    home = release.check(Path(sys.executable), tmp_path / "target", tmp_path / "away")
    assert Path(home).is_relative_to(tmp_path)


def test_a_package_without_its_tables_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(table.resources, "files", lambda package: tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(LimitsError, match="there are no limit tables"):
        table.load.__wrapped__()


def test_the_metadata_says_what_it_is_for(archive):
    lines = archive[1].splitlines()
    for python in PYTHONS:
        assert f"Classifier: Programming Language :: Python :: {python}" in lines
    assert "Classifier: Typing :: Typed" in lines
    assert any(line.startswith("Keywords: mixture-of-experts") for line in lines)


def test_extras_stop_at_what_was_run(archive):
    """What docs/versions.md has rows or words for; the pins of CI are within."""
    extras = [
        Requirement(line.partition(": ")[2]) for line in archive[1].splitlines() if line.startswith("Requires-Dist")
    ]
    bounded = {extra.name: extra.specifier for extra in extras if extra.name in ("torch-npu", "transformers")}
    assert bounded["torch-npu"].contains("2.14.0") and not bounded["torch-npu"].contains("2.15.0")
    assert bounded["transformers"].contains("5.23.0") and not bounded["transformers"].contains("5.25.0")
    of_extras = [extra for extra in extras if extra.marker and "extra ==" in str(extra.marker)]
    assert len(of_extras) > 15
    for extra in of_extras:
        assert {each.operator for each in extra.specifier} & {"<", "=="}, f"{extra.name} may be of any later version"
        assert all(extra.specifier.contains(version) for version in pinned_versions(extra.name)), extra.name


CURRENT = tuple((TOP / name).read_text() for name in ("pyproject.toml", "CHANGELOG.md"))
HEAD = re.search(r"^## \d.*$", CURRENT[1], re.M)[0]
VERSION = HEAD.split()[1]


def test_version_changelog_and_tag_agree():
    assert release_names.check_names() == VERSION == release_names.declared_version(CURRENT[0])
    assert not release_names.mistakes(*CURRENT, [f"v{VERSION}", "someone-elses"])


@pytest.mark.parametrize(
    ("old", "new", "tags", "says"),
    [
        (f'version = "{VERSION}"', 'version = "9.9.9"', [], "its newest version is"),
        (f'version = "{VERSION}"', 'version = "next"', [], "version is 'next'"),
        ("## Unreleased\n", "", [], "its first section is"),
        (HEAD, f"## {VERSION} (unreleased)", [], "a section is"),
        (HEAD, f"## {VERSION} (2026-02-30)", [], "a section is"),
        (HEAD, f"{HEAD}\n\n## 0.0.1 (2999-01-01)", [], "versions are not in order"),
        (HEAD, f"{HEAD}\n\n{HEAD}", [], "versions are not in order"),
        ("", "", ["v9.9.9"], "the tag is v9.9.9; accepted: v"),
        ("", "", [f"v{VERSION}rc1"], f"the tag is v{VERSION}rc1"),
    ],
)
def test_names_that_do_not_agree(old, new, tags, says):
    assert old in CURRENT[0] + CURRENT[1]
    (said,) = release_names.mistakes(*(text.replace(old, new, 1) if old else text for text in CURRENT), tags)[:1]
    assert says in said
