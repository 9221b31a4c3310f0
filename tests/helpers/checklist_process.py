"""Copies of the checkout, each changed in its own way, and pytest in each of them: one import of torch, a fork for each.

``moe_lowering`` must not be imported in the process that forks: every child imports that of its own copy. So this file and
what it imports must not either.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing as mp
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 300.0  # seconds that one run may take on a machine that others use


@dataclasses.dataclass(frozen=True)
class Insert:
    """Text that goes before a line of a file; a new file where ``before`` is "", and its end where that is None."""

    file: str
    before: str | None
    text: str

    def apply(self, copy: Path) -> None:
        """Edit the copy, whose files are links to those of another.

        Raises:
            ValueError: the file has no such line, or several; the new file is there.
        """
        path = copy / self.file
        if self.before == "":
            if path.exists():
                raise ValueError(f"{self.file} is there already")
            path.write_text(self.text, "utf-8")
            return
        old = path.read_text("utf-8")
        if self.before is not None and old.count(self.before) != 1:
            raise ValueError(f"{self.file} has {self.before!r} {old.count(self.before)} times; accepted: once")
        new = old + self.text if self.before is None else old.replace(self.before, self.text + self.before)
        path.unlink()
        path.write_text(new, "utf-8")


class Checkout:
    """A copy of the files that git knows of, and a process that runs tests in copies of it."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="checklists-")
        self._base = Path(self._directory.name) / "base"
        self._runs = 0
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        ).stdout.decode()  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (self._base / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self._base / name)
        self._pipe, there = mp.get_context("spawn").Pipe()
        self._process = mp.get_context("spawn").Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        there.close()

    def close(self) -> None:
        """End the process and delete the copies."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
        self._directory.cleanup()

    def run(self, edits: Iterable[Insert], tests: Iterable[str]) -> tuple[int, str]:
        """Exit code and output of pytest in a copy with the edits; without any, in the copy that the others link to.

        Raises:
            TimeoutError: no answer in time.
        """
        edits, copy = tuple(edits), self._base
        if edits:
            self._runs += 1
            copy = self._base.with_name(f"copy{self._runs}")
            whole = {parent for edit in edits for parent in (copy / edit.file).parents}
            folders = (copy / path.relative_to(self._base) for path in self._base.glob("tests/**/"))  # by conftest.py
            _link(self._base, copy, whole | {path for path in folders if path.name != "__pycache__"})
            for edit in edits:
                edit.apply(copy)
        self._pipe.send((str(copy), tuple(tests)))
        if not self._pipe.poll(TIMEOUT):
            raise TimeoutError(f"no answer of pytest in {copy} within {TIMEOUT:g} s")
        answer: tuple[int, str] = self._pipe.recv()
        if edits:
            shutil.rmtree(copy)
        return answer


def _link(base: Path, copy: Path, whole: set[Path]) -> None:
    """A directory with the contents of another. Directories that are not ``whole`` are links; of the others the files."""
    copy.mkdir()
    for entry in base.iterdir():
        target = copy / entry.name
        if not entry.is_dir():
            os.link(entry, target)
        elif target in whole:
            _link(entry, target, whole)
        else:
            target.symlink_to(entry)


def _serve(pipe: Connection) -> None:
    import pytest
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint  # it, and what follows, is what torch_npu imports of torch
    import torch.distributed.run
    import torch.distributed.tensor.experimental
    import torch.fx.experimental.symbolic_shapes
    import torch.nn.attention.flex_attention
    import torch.testing

    torch.set_num_threads(1)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take longer to import than the tests to run
    sys.dont_write_bytecode = False  # what is compiled for the first copy is linked into the others
    options = ("-q", "--assert=plain", "--maxfail=10", "-p", "no:cacheprovider", "-p", "no:unraisableexception")
    gc.disable()  # children end before a collection is worth its time
    assert not any(name.partition(".")[0] == "moe_lowering" for name in sys.modules)
    while True:
        try:
            copy, tests = pipe.recv()
        except EOFError:
            return
        pipe.send(_fork(Path(copy), lambda tests=tests: pytest.main([*options, *tests])))


def _fork(copy: Path, function: Callable[[], int]) -> tuple[int, str]:
    """What ``function`` returns in a child that imports from ``copy``, and what it prints."""
    output = copy / "output.txt"
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), output.read_text("utf-8", "replace")
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(copy)
        sys.path[:] = [str(copy), *(path for path in sys.path if not _is_of_checkout(Path(path or ".")))]
        sys.modules.pop("checklist_process", None)
        code = int(function())
        import moe_lowering

        assert moe_lowering.__file__ is not None and Path(moe_lowering.__file__).is_relative_to(copy)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _is_of_checkout(path: Path) -> bool:
    """Whether modules there are those of the checkout; its environment, which ``make`` puts into it, is not."""
    path = path.absolute()
    return path.is_relative_to(ROOT) and not path.is_relative_to(sys.prefix)
