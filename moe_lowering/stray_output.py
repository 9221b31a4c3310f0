"""Keeps away the lines "None" that torch_npu prints, and nothing else.

The meta function of ``npu_moe_init_routing_v2`` in torch_npu 2.13 (op_plugin/meta/_meta_registrations.py) has a
leftover ``print(x_dtype)``: each fake call of the operator with a scale and without quantisation prints a line. That
module gets a ``print`` of its own, which leaves out a call with nothing but the local ``x_dtype`` of the function that
calls it.
"""

from __future__ import annotations

import builtins
import functools
import sys
from typing import Any

MODULE = "torch_npu.op_plugin.meta._meta_registrations"
_LOCAL = "x_dtype"


def silence_torch_npu() -> None:
    """Does nothing where torch_npu is not imported, and the second time."""
    module = sys.modules.get(MODULE)
    if module is not None and "print" not in vars(module):
        vars(module)["print"] = functools.partial(_print, vars(builtins)["print"])


def _print(original: Any, *values: Any, **options: Any) -> None:
    """``print``, but for the one call."""
    caller = sys._getframe(1)
    left_in = len(values) == 1 and not options and _LOCAL in caller.f_code.co_varnames
    if left_in and values[0] is caller.f_locals.get(_LOCAL, values):
        return
    original(*values, **options)
