"""Stand-in libraries are loaded only when nobody but the user can have written them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_lowering.simulator import SimulatorError, standins


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds a build, without building one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = standins.cache() / standins.build_key()
    for directory in (target.parent.parent, target.parent, target):
        directory.mkdir(mode=0o700)
    (target / "libascendcl.so").touch(mode=0o644)
    (target / "libascendcl.so").chmod(0o644)
    return target


def test_own_build_is_used(kept: Path) -> None:
    assert standins.build_libraries() == kept


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("place", ["libascendcl.so", ".", "..", "../.."])
def test_what_others_may_write_is_refused(kept: Path, place: str, mode: int) -> None:
    path = kept / place
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(SimulatorError, match="may be written by others"):
        standins.build_libraries()


def test_link_is_refused(kept: Path, tmp_path: Path) -> None:
    kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SimulatorError, match="is a symbolic link"):
        standins.build_libraries()


def test_other_owner_is_refused(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(SimulatorError, match=f"belongs to user {owner}"):
        standins.build_libraries()


@pytest.mark.parametrize("value", ["relative", "./x", ""])
def test_relative_cache_home_is_ignored(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert standins.cache() == tmp_path / ".cache" / "moe_lowering" / "standins"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "absolute"))
    assert standins.cache() == tmp_path / "absolute" / "moe_lowering" / "standins"
