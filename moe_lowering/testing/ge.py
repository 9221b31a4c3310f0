"""``convert``: torchair's GE mode with the lowering and without the engine; a test reads back the GE graph (``simulator.ge``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moe_lowering import simulator
from moe_lowering.backends.torchair import torchair_config
from moe_lowering.deployment import Deployment
from moe_lowering.passes.pipeline import MoeLowering
from moe_lowering.simulator.ge import OPERATORS, GeGraph, convert_with


def convert(
    model: Any,
    inputs: Sequence[Any],
    deployment: Deployment,
    *,
    dynamic: bool = False,
    config: Any = None,
    operators: Mapping[str, Any] = OPERATORS,
    **options: Any,
) -> GeGraph:
    """Convert a model with torchair's GE mode and the lowering; nothing is executed.

    Args:
        model, inputs, dynamic, operators: as for ``simulator.ge.convert_with``.
        deployment: as for ``torchair_config``.
        config: a ``torchair.CompilerConfig`` to start from.
        options: ``comm``, ``strict``, ``policy``, ``cost``, as for ``MoeLowering``.

    Raises:
        SimulatorError, BackendCompilerFailed: as ``simulator.ge.convert_with``.
    """
    simulator.soc()  # raises when it is not enabled
    lowering = MoeLowering(deployment.replace(mode="ge"), **options)
    config = torchair_config(deployment, lowering=lowering, config=config)
    graph = convert_with(model, inputs, config, dynamic=dynamic, operators=operators)
    return dataclasses.replace(graph, reports=lowering.reports)
