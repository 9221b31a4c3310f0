"""Whole ``moe-lowering lower`` commands, run in this process."""

from __future__ import annotations

import json

import pytest
import torch
from json_schema import problems

from moe_lowering import cli
from moe_lowering.integrations import transformers as integration
from moe_lowering.report.schemas import schema


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """For every test of a module that imports it."""
    torch._dynamo.reset()
    integration.register()


def command(capfd: pytest.CaptureFixture[str], *given: str) -> tuple[int, dict, str]:
    """(exit code, the JSON object, stderr) of a ``lower`` command run in this process."""
    capfd.readouterr()
    code = cli.main(["lower", *given, "--json"])
    printed = capfd.readouterr()
    found = json.loads(printed.out)
    assert not problems(found, schema("lower"))
    return code, found, printed.err
