"""What commands write: never over what is no file of its own, links stay links, and characters that an encoding has not."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest

from moe_lowering import cli
from moe_lowering.cli.files import check_file, write_file
from moe_lowering.cli.usage import UsageError
from moe_lowering.model_configs.check import read_config

SIZES = ["--hidden", "1024", "--intermediate", "512", "--experts", "8", "--topk", "2"]


def refusal(path) -> str:
    with pytest.raises(UsageError) as caught:
        check_file("html", str(path))
    return str(caught.value)


def test_a_pipe_is_refused_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert refusal(pipe) == f"argument --html: is {pipe}, no regular file; accepted: a file of its own"
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
    file = tmp_path / "page.html"
    file.touch()
    check_file("html", str(file))


def test_the_file_that_stdout_is_is_refused(tmp_path, monkeypatch):
    out, other = tmp_path / "out", tmp_path / "other"
    other.touch()
    with out.open("w") as opened:
        monkeypatch.setattr(os, "fstat", lambda number, real=os.fstat: real(opened.fileno() if number == 1 else number))
        assert "what this command prints to" in refusal(out)
        check_file("html", str(other))


def test_a_link_stays_one(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    for text in ("first", "second"):  # a target that is not there, and one that is
        check_file("html", str(link))
        write_file("html", link, text)
        assert link.is_symlink() and target.read_text("utf-8") == text + "\n"
    assert sorted(tmp_path.iterdir()) == [link, target]


@pytest.mark.parametrize("encoding, shown", [("ascii", r"\u4e13"), ("utf-8", "专")])
def test_a_report_is_printed_in_any_encoding(monkeypatch, tmp_path, encoding, shown):
    folder = tmp_path / "专\udcff"
    folder.mkdir()
    values = {"model_type": "qwen3_moe", "num_experts": 8, "note": "专家"}
    (folder / "config.json").write_text(json.dumps(values, ensure_ascii=False), "utf-8")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.main(["explain", str(folder), *SIZES, "--html", str(tmp_path / "page.html")]) == 0
    stdout.seek(0)
    assert f"{shown}\\udcff with hidden 1024" in stdout.read()
    assert r"专\udcff" in (tmp_path / "page.html").read_text("utf-8")


def test_a_config_is_utf_8_whatever_the_locale(monkeypatch, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes('{"note": "专家"}'.encode())
    asked = []
    monkeypatch.setattr(io, "text_encoding", lambda encoding, level=2: asked.append(encoding) or encoding or "ascii")
    assert read_config(path) == {"note": "专家"}
    assert set(asked) == {"utf-8"}
