"""torchair's GE mode without the engine: a model is converted for real, and what the engine would get is read back.

    graph = moe_lowering.testing.ge.convert(model, (x,), deployment, comm="mc2")
    [dispatch] = graph.of_type("MoeDistributeDispatchV2")
    dispatch.attributes["group_ep"], graph.readers(dispatch.name, 3)

dynamo, AOTAutograd, the passes of the config and torchair's own, and all converters run as they do on a machine with CANN, up
to ``TorchNpuGraph.load``, which hands the graph to the engine: there it stops. The graph is read from torchair's own dump
(``config.debug.graph_dump``, type "txt", which is the protobuf's text and loses nothing).

Stood in for, as they need CANN: ``initialize_graph_engine`` (nothing to start); ``check_cann_compat`` (an installed CANN
that knows all optional inputs and attributes); and the look-up of registered operators (``get_registered_ir_def``), which
answers for the operators of vllm-ascend's package as their sources define them (``OPERATORS``) and knows no others. So
this shows what is converted, not that an engine accepts or runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from moe_lowering.interrupts import interruptible
from moe_lowering.simulator import state
from moe_lowering.simulator.standins import SimulatorError

# (inputs, outputs, attributes) in order. Sources: vllm_ascend.ffn_definition, vllm_ascend.ffn_definition_16_bit,
# vllm_ascend.ffn_definition_w4a8, vllm_ascend.decode_definition: inputs, outputs, attributes; vllm_ascend_wheel.schemas:
# lists, bias1, bias2 and expert_token_nums of the 16-bit variant, the decode operator's mask.
_FFN_ATTRIBUTES = {"group": "VT_STRING", "M": "VT_INT", "transB": "VT_BOOL", "weightNz": "VT_BOOL"}
_FFN_OUTPUTS = {"out": "required", "expert_token_nums": "required"}
_FFN_INPUTS = {
    "a": "required",
    "w1": "dynamic",
    "w2": "dynamic",
    "expertIdx": "required",
    "scale1": "dynamic",
    "scale2": "dynamic",
}
_MASKED = {"probs": "required", "xActiveMaskOptional": "optional"}
OPERATORS: dict[str, tuple[dict[str, str], dict[str, str], dict[str, str]]] = {
    "DispatchFFNCombineBF16": ({**_FFN_INPUTS, "probs": "required"}, _FFN_OUTPUTS, _FFN_ATTRIBUTES),
    "DispatchFFNCombine": (
        {**_FFN_INPUTS, **_MASKED},
        _FFN_OUTPUTS,
        {**_FFN_ATTRIBUTES, "swigluLimit": "VT_FLOAT", "swigluAlpha": "VT_FLOAT"},
    ),
    "DispatchFFNCombineW4A8": (
        {**_FFN_INPUTS, "bias1": "dynamic", "bias2": "dynamic", **_MASKED},
        _FFN_OUTPUTS,
        {**_FFN_ATTRIBUTES, "swigluLimit": "VT_FLOAT"},
    ),
    "DispatchGmmCombineDecode": (
        {
            "x": "required",
            "expert_ids": "required",
            "gmm1_permuted_weight": "dynamic",
            "gmm1_permuted_weight_scale": "dynamic",
            "gmm2_weight": "dynamic",
            "gmm2_weight_scale": "dynamic",
            "expert_scales": "required",
            "expert_smooth_scales": "optional",
            "x_active_mask": "optional",
        },
        {"output": "required", "expert_token_nums": "required"},
        {
            "group_ep": "VT_STRING",
            **dict.fromkeys(
                (
                    "ep_rank_size", "ep_rank_id", "moe_expert_num", "share_expert_num", "share_expert_rank_num",
                    "quant_mode", "global_bs",
                ),
                "VT_INT",
            ),
        },
    ),
}  # fmt: skip
# Nodes that hand a value on: where it came from is the question.
TRANSPARENT = ("Identity", "TensorMove", "Cast", "Reshape", "Unsqueeze", "Squeeze", "TransData")

# Inputs that must have one element type: torchair's converters cast for all of these but the comparisons, whose converters
# say so in a comment (ge_converter/aten/lt.py: "dtype must be same").
_PAIR = ("x1", "x2")
SAME_TYPE = {
    **dict.fromkeys(("Add", "AddV2", "Sub", "Mul", "RealDiv", "FloorDiv", "Maximum", "Minimum", "BitwiseAnd"), _PAIR),
    **dict.fromkeys(("Less", "LessEqual", "Greater", "GreaterEqual", "Equal", "NotEqual"), _PAIR),
    "SelectV2": ("then", "else"),
}


@dataclasses.dataclass(frozen=True)
class GeNode:
    """One operator of a GE graph.

    Attributes:
        name, type: as in the graph.
        inputs: (input name, edge) in order; an edge is "producer:output", "" for an optional input that is not given.
            Tensors of a list are name0, name1, ...
        control: names of the operators that must run before.
        attributes: by name, those of torchair's own book-keeping (with a leading underscore) too.
        outputs: (name, dtype, shape) in order; a size that varies is -1, and a shape that is not known is ().
        content: the integers of a constant, flat; None for what is no constant of integers.
    """

    name: str
    type: str
    inputs: tuple[tuple[str, str], ...]
    control: tuple[str, ...]
    attributes: Mapping[str, Any]
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    content: tuple[int, ...] | None = None

    def edge(self, name: str) -> str:
        """What an input reads."""
        return dict(self.inputs)[name]

    def output(self, name: str) -> str:
        """The edge of an output."""
        return f"{self.name}:{[known for known, _, _ in self.outputs].index(name)}"


@dataclasses.dataclass(frozen=True)
class GeGraph:
    """What the engine would get.

    Attributes:
        nodes: by name, in order.
        program: the Python that torchair would write into a compile cache: it prepares the inputs and runs the graph.
        arguments: with which torchair called the graph: parameters, sizes and tensors, in its order.
        reports: those of the lowering, where there was one.
    """

    nodes: Mapping[str, GeNode]
    program: str
    arguments: tuple[Any, ...]
    reports: Sequence[Any] = ()

    def of_type(self, *types: str) -> list[GeNode]:
        return [node for node in self.nodes.values() if node.type in types]

    def types(self) -> set[str]:
        return {node.type for node in self.nodes.values()}

    def producer(self, edge: str) -> GeNode:
        """The node that an edge comes from."""
        return self.nodes[edge.rpartition(":")[0]]

    def origin(self, edge: str) -> str:
        """The edge, or what it is a copy, cast or other shape of."""
        while edge and self.producer(edge).type in TRANSPARENT:
            edge = self.producer(edge).inputs[0][1]
        return edge

    def dtype(self, edge: str) -> str:
        """The element type of an edge. torchair writes DT_FLOAT for a type that it does not know; the type of a cast or
        a constant is read there."""
        node, index = self.producer(edge), int(edge.rpartition(":")[2])
        if node.type == "Cast":
            return _dtype_name(node.attributes["dst_type"])
        if node.type in ("Const", "Constant"):
            return node.attributes["value"]
        if node.type in TRANSPARENT:
            return self.dtype(node.inputs[0][1])
        return node.outputs[index][1]

    def mixed(self) -> list[str]:
        """Operators that want inputs of one type and get several: the engine refuses those, or misreads them."""
        nodes = []
        for node in self.nodes.values():
            names = SAME_TYPE.get(node.type, ())
            types = {name: self.dtype(edge) for name, edge in node.inputs if name in names}
            if len(set(types.values())) > 1:
                nodes.append(f"{node.name} ({node.type}): {types}")
        return nodes

    def readers(self, edge: str) -> list[tuple[GeNode, str]]:
        """(node, input name) of what reads exactly this edge."""
        return [(node, name) for node in self.nodes.values() for name, read in node.inputs if read == edge]

    def ancestors(self, name: str) -> set[str]:
        """Names of the nodes that one depends on."""
        names: set[str] = set()
        todo = [name]
        while todo:
            node = self.nodes[todo.pop()]
            for before in (*(edge.rpartition(":")[0] for _, edge in node.inputs if edge), *node.control):
                if before not in names:
                    names.add(before)
                    todo.append(before)
        return names


class _Loaded(Exception):
    """The graph has reached the engine."""


def convert_with(
    model: Any, inputs: Sequence[Any], config: Any, *, dynamic: bool = False, operators: Mapping[str, Any] = OPERATORS
) -> GeGraph:
    """Convert a model with torchair's GE mode; nothing is executed.

    Args:
        model: a callable; dynamo must be able to trace it whole.
        inputs: its arguments, on device "npu" or CPU.
        config: a ``torchair.CompilerConfig``; its graph dump is set here. ``testing.ge.convert`` makes one with the lowering.
        dynamic: sizes are symbolic, as with ``torch.compile(dynamic=True)``.
        operators: what the look-up of registered operators knows, see ``engine``.

    Signals end it, see ``moe_lowering.interruptible``: there is no engine to finalise.

    Raises:
        SimulatorError: the simulator is not enabled, or the model was not converted as one graph.
        torch._dynamo.exc.BackendCompilerFailed: what the config's passes or torchair raise, with its message.
    """
    state.soc()  # raises when it is not enabled
    import torchair

    torch._dynamo.reset()
    with interruptible(), tempfile.TemporaryDirectory() as folder, engine(operators) as converted:
        config.debug.graph_dump.type, config.debug.graph_dump.path = "txt", folder
        backend = torchair.get_npu_backend(compiler_config=config)
        compiled: Any = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
        with torch.no_grad(), contextlib.suppress(_Loaded):
            compiled(*inputs)
        dumps = sorted(Path(folder).glob("dynamo_optimized_*.txt"))
        if len(dumps) != 1 or len(converted) != 1:
            raise SimulatorError(f"{len(converted)} graphs were converted and {len(dumps)} loaded; expected: 1")
        nodes = parse(dumps[0].read_text())
        graph, arguments = converted[0]
        program = graph.codegen(extend_config={}, enable_cache=True)
    return GeGraph(nodes, program, arguments)


def call(graph: GeGraph, *arguments: Any) -> None:
    """Run the program of a compile cache up to the engine: what it checks about its inputs is checked."""
    names: dict[str, Any] = {}
    with engine(), contextlib.suppress(_Loaded):
        exec(graph.program, names)
        names["kernel"](*arguments)


@contextlib.contextmanager
def engine(operators: Mapping[str, Any] = OPERATORS) -> Iterator[list[Any]]:
    """Stand in for the engine; yields a list of (torchair's graph, its arguments) for each graph called meanwhile.

    Args:
        operators: what the look-up of registered operators knows: (inputs, outputs, attributes) by type.
    """
    from torchair._ge_concrete_graph import fx2ge_converter
    from torchair.core import _backend, _torchair

    called: list[Any] = []
    call = fx2ge_converter.GeConcreteGraph.__call__

    def record(graph: Any, *args: Any) -> Any:
        called.append((graph, args))
        return call(graph, *args)

    def nothing(*args: Any) -> None:
        """There is no engine to start."""

    def stop(graph: Any, ge_graph: Any, options: Any = None) -> None:
        raise _Loaded

    def look_up(type_: str) -> tuple[str, list[Any], list[Any], list[Any]]:
        if type_ not in operators:
            return "None", [], [], []  # as without CANN: "ERROR" makes torchair compile a call-back in C++
        inputs, outputs, attributes = ([*part.items()] for part in operators[type_])
        return "SUCCESS", inputs, outputs, attributes

    with (
        mock.patch.object(fx2ge_converter, "initialize_graph_engine", nothing),
        mock.patch.object(_backend, "initialize_graph_engine", nothing),
        mock.patch.object(fx2ge_converter.GeConcreteGraph, "__call__", record),
        mock.patch.object(_backend.TorchNpuGraph, "load", stop),
        mock.patch.object(_torchair, "get_registered_ir_def", look_up),
        mock.patch.object(_torchair, "check_cann_compat", lambda *args: ""),
    ):
        yield called


def parse(text: str) -> dict[str, GeNode]:
    """The nodes of a dump of type "txt"."""
    from google.protobuf import text_format
    from torchair._ge_concrete_graph.ge_ir_pb2 import GraphDef

    graph = text_format.Parse(text, GraphDef())
    return {op.name: _node(op) for op in graph.op}


def _node(op: Any) -> GeNode:
    edges = [edge for edge in op.input if not edge.endswith(":-1")]
    return GeNode(
        name=op.name,
        type=op.type,
        inputs=tuple(zip((desc.name for desc in op.input_desc), edges, strict=False)),
        control=tuple(edge.rpartition(":")[0] for edge in op.input if edge.endswith(":-1")),
        attributes={name: _value(value) for name, value in op.attr.items()},
        outputs=tuple((d.name, _dtype_name_of_proto(d.dtype), tuple(d.shape.dim)) for d in op.output_desc),
        content=_integers(op.attr["value"].t) if op.type in ("Const", "Constant") else None,
    )


def _integers(tensor: Any) -> tuple[int, ...] | None:
    dtype = {"DT_INT32": torch.int32, "DT_INT64": torch.int64}.get(_dtype_name_of_proto(tensor.desc.dtype))
    if dtype is None:
        return None
    return tuple(torch.frombuffer(bytearray(tensor.data), dtype=dtype).tolist()) if tensor.data else ()


def _value(attribute: Any) -> Any:
    """An attribute as Python."""
    kind = attribute.WhichOneof("value")
    value: Any = getattr(attribute, kind) if kind else None
    if kind == "s":
        return value.decode(errors="replace")
    if kind == "t":  # a constant: its type, not its content
        return _dtype_name_of_proto(value.desc.dtype)
    if kind == "list":
        lists = (value.s, value.i, value.f, value.b, value.dt)
        return [v.decode(errors="replace") if isinstance(v, bytes) else v for items in lists for v in items]
    return value


def _dtype_name_of_proto(dtype: Any) -> str:
    from torchair.ge._ge_graph import _ge_proto_dtype_str

    return _ge_proto_dtype_str(dtype)


def _dtype_name(dtype: int) -> str:
    from torchair.ge import DataType

    return next(name for name, number in vars(DataType).items() if name.startswith("DT_") and number == dtype)
