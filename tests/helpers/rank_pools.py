"""Pools of ranks whose processes do not import torch again."""

import functools

from moe_lowering import testing

Ranks = functools.partial(testing.Ranks, start_method="forkserver")
