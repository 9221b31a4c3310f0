"""Makes a virtual environment with pip, by ``python make_venv.py FOLDER``; also where Python cannot by itself.

Debian's python3 has no ensurepip: it comes with the package python3-venv. There the wheel of pip is taken from PyPI, or from
the index that ``PIP_INDEX_URL`` names, and installs itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

PYPI = "https://pypi.org/simple"
WHEEL = "pip-25.3-py3-none-any.whl"
SHA256 = "9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd"
SECONDS = 60  # for one answer of the index


class NoEnvironmentError(RuntimeError):
    """Why there is none, in a line."""


def make_venv(python: str, folder: Path) -> None:
    """An environment of ``python``. Where it fails a folder that was there is left as far as it got, and a new one is removed.

    Raises:
        NoEnvironmentError: it could not be made, or pip could not be had.
    """
    is_new, has_pip = not folder.exists(), True
    try:
        has_pip = subprocess.run([python, "-c", "import ensurepip"], capture_output=True, check=False).returncode == 0
        _run([python, "-m", "venv", *([] if has_pip else ["--without-pip"]), str(folder)])
        if not has_pip:
            _install_pip(folder / "bin" / "python")
    except (NoEnvironmentError, OSError, ValueError, LookupError, TypeError) as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        hint = "" if has_pip else "; apt-get install -y python3-venv does without the download"
        raise NoEnvironmentError(f"no environment could be made in {folder}: {error}{hint}") from error


def _install_pip(python: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / WHEEL
        wheel.write_bytes(fetch_wheel(os.environ.get("PIP_INDEX_URL") or PYPI, WHEEL, SHA256))
        _run([str(python), str(wheel / "pip"), "install", "--quiet", "--no-index", "--no-compile", str(wheel)])


def fetch_wheel(index: str, name: str, sha256: str) -> bytes:
    """A wheel from an index that answers in JSON (PEP 691).

    Raises:
        NoEnvironmentError: the index has no such wheel, or another one under its name.
        OSError, ValueError: the index does not answer, or not so.
    """
    page = f"{index.rstrip('/')}/{name.partition('-')[0]}/"
    request = urllib.request.Request(page, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        urls = {file["filename"]: file["url"] for file in json.load(answer)["files"]}
    if name not in urls:
        raise NoEnvironmentError(f"{page} has no {name}")
    with urllib.request.urlopen(urljoin(page, urls[name]), timeout=SECONDS) as answer:
        data: bytes = answer.read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise NoEnvironmentError(f"{urls[name]} is not the {name} that is expected: its sha256 is another one")
    return data


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoEnvironmentError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python make_venv.py FOLDER")
    try:
        make_venv(sys.executable, Path(sys.argv[1]))
    except NoEnvironmentError as error:
        sys.exit(str(error))
