"""Which tests ``-m fast`` leaves out: those of modules that name what costs seconds, and of those that use such a helper."""

import conftest
import pytest


@pytest.mark.parametrize("module", ["test_limits_engine", "test_legality", "test_graph_draws", "test_limit_twins"])
def test_nothing_slow(module):
    assert not conftest.is_slow(module)


@pytest.mark.parametrize(
    "module", ["test_property", "test_matrix", "test_cli_ranks", "test_lowering_ranks", "test_compile_cache"]
)
def test_ranks_compiles_and_commands_are_slow(module):
    assert conftest.is_slow(module)


def test_a_helper_makes_its_module_slow(tmp_path, monkeypatch):
    (tmp_path / "test_one.py").write_text("import helper\n")
    (tmp_path / "helper.py").write_text("import math\n")
    monkeypatch.setattr(conftest, "TESTS", tmp_path)
    assert not conftest.is_slow.__wrapped__("test_one")
    conftest.is_slow.cache_clear()
    (tmp_path / "helper.py").write_text("import subprocess\n")
    assert conftest.is_slow.__wrapped__("test_one")
    conftest.is_slow.cache_clear()
