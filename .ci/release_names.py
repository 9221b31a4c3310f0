"""The names of a release: the version in pyproject.toml, the newest one in CHANGELOG.md, and the git tag are one.

python .ci/release_names.py             # of this checkout; tags that stand on its commit count
python .ci/release_names.py v0.2.0      # before that tag is set
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNRELEASED = "Unreleased"
VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")


def declared_version(pyproject: str) -> str:
    """The version of ``[project]``."""
    project = pyproject.partition("\n[project]\n")[2].partition("\n[")[0]
    found = re.search(r'^version = "([^"]*)"$', project, re.M)
    return found[1] if found else ""


def mistakes(pyproject: str, changelog: str, tags: list[str]) -> list[str]:
    """What does not agree, a line each; empty where all does.

    Args:
        pyproject, changelog: texts of the two files.
        tags: that stand on the commit, or are about to; those that do not begin with ``v`` and a digit are left alone.
    """
    wrong = []
    version = declared_version(pyproject)
    if not VERSION.fullmatch(version):
        wrong.append(f"pyproject.toml: version is {version!r}; accepted: like 1.2.3 or 1.2.3rc1")
    heads = re.findall(r"^## (.*)$", changelog, re.M)
    if heads[:1] != [UNRELEASED]:
        wrong.append(f"CHANGELOG.md: its first section is {heads[:1]}; accepted: {UNRELEASED}, for what comes next")
    dated = [re.fullmatch(r"(\S+) \((\d{4}-\d\d-\d\d)\)", head) for head in heads if head != UNRELEASED]
    for head, match in zip([head for head in heads if head != UNRELEASED], dated, strict=True):
        if match is None or not VERSION.fullmatch(match[1]) or not _is_date(match[2]):
            wrong.append(f"CHANGELOG.md: a section is {head!r}; accepted: VERSION (YEAR-MONTH-DAY), the newest first")
    known = [match[1] for match in dated if match is not None]
    days = [match[2] for match in dated if match is not None]
    if known[:1] != [version]:
        wrong.append(f"CHANGELOG.md: its newest version is {known[:1]}; accepted: {version}, as in pyproject.toml")
    if days != sorted(days, reverse=True) or len(set(known)) < len(known):
        wrong.append("CHANGELOG.md: versions are not in order, the newest first and each once")
    wrong += [
        f"the tag is {tag}; accepted: v{version}, as in pyproject.toml"
        for tag in tags
        if re.match(r"v\d", tag) and tag != f"v{version}"
    ]
    return wrong


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def check_names(tags: list[str] | None = None) -> str:
    """The version of this checkout, when all agrees. ``tags``: None for those of its commit, none where git is not there.

    Raises:
        RuntimeError: something does not.
    """
    if tags is None:
        asked = ["git", "-C", str(ROOT), "tag", "--points-at", "HEAD"]
        try:
            tags = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError):  # a source archive
            tags = []
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if wrong := mistakes(pyproject, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), tags):
        raise RuntimeError("\n".join(wrong))
    return declared_version(pyproject)


if __name__ == "__main__":
    try:
        print(check_names(sys.argv[1:] or None))
    except RuntimeError as error:
        sys.exit(str(error))
