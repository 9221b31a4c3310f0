"""Imported by the process that ranks are forked from, for ``forking.fork_from_imports``: what every rank of a simulated machine
does first is done once. Nothing here starts a thread that lives at a fork, or touches device npu, which a fork would not have.

An error ends that process without a word, and with it all ranks to come: each rank does by itself what fails here, and says so.
"""

from __future__ import annotations

import contextlib
import importlib
import os

from moe_lowering import simulator
from moe_lowering.limits import table
from moe_lowering.testing.forking import FORKED

_soc, _, _names = os.environ.get(FORKED, "").partition(":")
if _soc:
    with contextlib.suppress(Exception):
        simulator.enable(_soc)
    for _name in _names.split(","):
        with contextlib.suppress(Exception):
            importlib.import_module(_name)
with contextlib.suppress(Exception):
    table.load()
