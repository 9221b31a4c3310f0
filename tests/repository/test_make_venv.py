"""The environment of `make setup` where Python has no ensurepip, as Debian's without python3-venv: pip comes from an index."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import sys
import threading
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
sys.path.insert(0, str(TOP / ".ci"))

import make_venv  # noqa: E402

NAME = "pip-1-py3-none-any.whl"
# In place of pip: it leaves what it was asked for in the environment that it runs in
PIP = "import pathlib, sys\npathlib.Path(sys.prefix, 'asked').write_text(' '.join(sys.argv[1:-1]))\n"


@pytest.fixture(scope="module")
def wheel() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as files:
        files.writestr("pip/__main__.py", PIP)
    return data.getvalue()


@pytest.fixture(scope="module")
def index(tmp_path_factory, wheel):
    """The address of an index with that wheel."""
    folder = tmp_path_factory.mktemp("index")
    (folder / "simple" / "pip").mkdir(parents=True)
    (folder / "files").mkdir()
    (folder / "files" / NAME).write_bytes(wheel)
    page = {"files": [{"filename": NAME, "url": f"../../files/{NAME}"}]}
    (folder / "simple" / "pip" / "index.html").write_text(json.dumps(page))
    handler = functools.partial(Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def without_ensurepip(tmp_path) -> str:
    """A Python that has no ensurepip."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" = "import ensurepip" ] && exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.fixture(autouse=True)
def own_index(monkeypatch, index, wheel):
    monkeypatch.setenv("PIP_INDEX_URL", index)
    monkeypatch.setattr(make_venv, "WHEEL", NAME)
    monkeypatch.setattr(make_venv, "SHA256", hashlib.sha256(wheel).hexdigest())


def test_pip_installs_itself_where_python_has_no_ensurepip(tmp_path, without_ensurepip):
    make_venv.make_venv(without_ensurepip, tmp_path / "made")
    assert (tmp_path / "made" / "asked").read_text() == "install --quiet --no-index --no-compile"


def test_nothing_is_downloaded_where_it_has_one(tmp_path, monkeypatch):
    monkeypatch.setattr(make_venv, "fetch_wheel", None)
    make_venv.make_venv(sys.executable, tmp_path / "made")
    assert list((tmp_path / "made").glob("lib/python*/site-packages/pip/__init__.py"))


@pytest.mark.parametrize(("name", "value", "message"), [
    ("SHA256", "0" * 64, "its sha256 is another one"),
    ("WHEEL", "pip-2-py3-none-any.whl", "/simple/pip/ has no pip-2-py3-none-any.whl"),
    ("WHEEL", "pop-1-py3-none-any.whl", "HTTP Error 404"),
])  # fmt: skip
def test_another_wheel_is_no_pip(tmp_path, monkeypatch, without_ensurepip, name, value, message):
    """A folder that is new is removed, and one that was there is left."""
    monkeypatch.setattr(make_venv, name, value)
    with pytest.raises(make_venv.NoEnvironmentError, match=message) as caught:
        make_venv.make_venv(without_ensurepip, tmp_path / "made")
    assert "apt-get install -y python3-venv" in str(caught.value)
    assert not (tmp_path / "made").exists()
    (tmp_path / "made").mkdir()
    with pytest.raises(make_venv.NoEnvironmentError, match=message):
        make_venv.make_venv(without_ensurepip, tmp_path / "made")
    assert (tmp_path / "made" / "bin" / "python").exists()


@pytest.mark.parametrize("python", ["/bin/false", "/no/such/python"])
def test_a_python_that_makes_none_is_told(tmp_path, python):
    with pytest.raises(make_venv.NoEnvironmentError, match="no environment could be made in"):
        make_venv.make_venv(python, tmp_path / "made")
