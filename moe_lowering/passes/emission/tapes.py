"""``Tape``: the nodes that one rewrite made, to be made again for an equal block without asking what they should be.

An implementation works out for each block which nodes to emit. For the second and later of equal blocks of a graph the
answer is known: the same operators with the same plain arguments, at the same stages, on the block's own inputs.

When are blocks equal? An emitter reads the deployment, the block's record (``BlockSpec``), the premises of its verdict, and
of the graph what ``wiring`` describes: beside record and form that is the key of a tape, with the version of the ShapeEnv,
as a guard since then may have made a number of a size. A rewrite that added a guard itself, read a node from elsewhere, or
stood at another place than a stage has no tape, and each equal block is emitted anew. A test watches what emitters read
(``tests/passes/test_tapes.py``).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch.fx import Node

from moe_lowering.passes.emission.emitter import Constants, Emitter
from moe_lowering.passes.emission.wiring import Wiring, read_wiring
from moe_lowering.passes.graph.graph_nodes import graph_nodes
from moe_lowering.passes.graph.operator_names import operator_name
from moe_lowering.report.graphs import GraphNode, NamedNodes, Pattern

Nodes = Sequence[Node]
Arguments = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Step:
    """One node. ``places`` and ``names`` say which arguments are nodes, by number; ``lists`` which are lists that hold some."""

    target: Any
    args: list[Any]
    kwargs: dict[str, Any]
    places: tuple[tuple[int, int], ...]
    names: tuple[tuple[str, int], ...]
    lists: tuple[tuple[int | str, tuple[Any, ...]], ...]
    make: Callable[[Arguments], Any]

    def fill(self, nodes: Nodes) -> tuple[Arguments, dict[str, Any]]:
        """The arguments, with these nodes in them."""
        args = self.args.copy()
        for at, number in self.places:
            args[at] = nodes[number]
        if not self.names and not self.lists:
            return tuple(args), self.kwargs
        kwargs = self.kwargs.copy()
        for name, number in self.names:
            kwargs[name] = nodes[number]
        for where, items in self.lists:
            filled = [nodes[item.number] if type(item) is _Number else item for item in items]
            if isinstance(where, int):
                args[where] = filled
            else:
                kwargs[where] = filled
        return tuple(args), kwargs


class _NotOnTape(Exception):
    """Why a rewrite cannot be repeated. Never leaves this module."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tape:
    """The nodes of one rewrite in the order in which they were made.

    Attributes:
        runs: steps that follow each other at one place: the stage before which they stand, the one whose source they have.
        constants: nodes of the graph that they read beside the inputs, made by no block.
        results: the numbers of what the rewrite gave, None of what it did not.
        operators: the names of the operators, in graph order.
        pattern: the nodes in graph order, for a report.
    """

    runs: tuple[tuple[int, int, tuple[_Step, ...]], ...]
    constants: tuple[Node, ...]
    results: tuple[int | None, ...]
    operators: tuple[str, ...]
    pattern: Pattern

    def play(self, emit: Emitter, stages: Nodes, wiring: Wiring) -> list[Node | None] | None:
        """Make the nodes again; the results, or None where a constant has been taken back: nothing is made then."""
        if any(node._erased for node in self.constants):
            return None
        nodes = [*wiring.inputs, *self.constants]
        for position, origin, steps in self.runs:
            emit.repeat(steps, nodes, stages[position], stages[origin])
        return [None if number is None else nodes[number] for number in self.results]


@dataclasses.dataclass(frozen=True)
class _Number:
    """Stands for a node in a list."""

    number: int


class Tapes:
    """The tapes of one run over one graph, by what tells its blocks apart.

    Args:
        constants: those of the graph so far (``Emitter``).

    Attributes:
        shape_env: that of the graph's values, None where all sizes are static.
    """

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._tapes: dict[Any, Tape] = {}
        self._kinds: dict[Any, int] = {}
        self.shape_env: Any = None

    def read(
        self, stages: Nodes, inside: Collection[Node], experts: Node | None = None, known: Wiring | None = None
    ) -> tuple[Wiring, int]:
        """The wiring of a block as the graph is now, and a number for all that have the same key.

        Args:
            inside, experts: as for ``read_wiring``.
            known: the wiring as it was found; it still is where the same nodes are read.
        """
        wiring = known
        if wiring is None or tuple(dict.fromkeys(n for s in stages for n in s.all_input_nodes)) != wiring.inputs:
            wiring = read_wiring(stages, inside, experts)
        return wiring, self._kinds.setdefault((wiring.key, self._env_version()), len(self._kinds))

    def _env_version(self) -> int:
        """What changes when sizes of the graph become known: by a guard, or another range."""
        return 0 if self.shape_env is None else int(self.shape_env._version_counter)

    def write(
        self, key: Any, emit: Emitter, stages: Nodes, wiring: Wiring, write: Callable[[], Sequence[Node | None]]
    ) -> Sequence[Node | None]:
        """What ``write`` emits and gives, or the same nodes from a tape of that key, with what they give."""
        tape = self._tapes.get(key)
        played = None if tape is None else tape.play(emit, stages, wiring)
        if played is not None:
            return played
        version = self._env_version()
        results = write()
        tape = _record(emit, stages, wiring, self._constants, results)
        if tape is not None and version == self._env_version():
            self._tapes[key] = tape
        return results

    def describe(
        self, key: Any, wiring: Wiring, created: Sequence[Node]
    ) -> tuple[tuple[str, ...], Sequence[GraphNode]]:
        """The operators of a rewrite and its nodes as a report has them, by the names that they have now."""
        tape = self._tapes.get(key)
        if tape is None or len(tape.pattern) != len(created):  # something was emitted beside it
            in_order = sorted(created)
            return operators_of(in_order), graph_nodes(in_order)
        return tape.operators, NamedNodes([n.name for n in (*wiring.inputs, *tape.constants, *created)], tape.pattern)


def _record(
    emit: Emitter, stages: Nodes, wiring: Wiring, constants: Constants, results: Sequence[Node | None]
) -> Tape | None:
    """The tape of a rewrite that was just emitted, or None where it cannot be repeated."""
    used = {argument for node in emit.created for argument in node.all_input_nodes}
    read = [node for node in constants.values() if node in used]
    numbers = {node: number for number, node in enumerate([*wiring.inputs, *read, *emit.created])}
    runs: list[tuple[int, int, list[_Step]]] = []
    try:
        # a recording of an equal block may go on, with what stands beside the rewrite
        for node, (_, make), (position, origin) in zip(emit.created, emit.recording, emit.places, strict=False):
            place = _stage(stages, position), _stage(stages, origin)
            if not runs or runs[-1][:2] != place:
                runs.append((*place, []))
            runs[-1][2].append(_step(node, make, numbers))
        given = tuple([None if node is None else _number_of(node, numbers) for node in results])
    except _NotOnTape:
        return None
    in_order = sorted(emit.created)
    pattern = tuple(
        (numbers[node], operator_name(node), tuple([numbers[each] for each in node.all_input_nodes]))
        for node in in_order
    )
    steps_by_place = tuple([(position, origin, tuple(steps)) for position, origin, steps in runs])
    return Tape(steps_by_place, tuple(read), given, operators_of(in_order), pattern)


def operators_of(in_order: Iterable[Node]) -> tuple[str, ...]:
    """The names of the operators of some nodes, without what only takes results apart."""
    return tuple([operator_name(node) for node in in_order if node.target is not operator.getitem])


def _stage(stages: Nodes, node: Node) -> int:
    for number, stage in enumerate(stages):
        if stage is node:
            return number
    raise _NotOnTape


def _number_of(node: Node, numbers: Mapping[Node, int]) -> int:
    if node not in numbers:
        raise _NotOnTape
    return numbers[node]


def _step(node: Node, make: Callable[[Arguments], Any], numbers: Mapping[Node, int]) -> _Step:
    args, kwargs = [*node.args], dict(node.kwargs)
    places: list[tuple[int, int]] = []
    names: list[tuple[str, int]] = []
    lists: list[tuple[int | str, tuple[Any, ...]]] = []
    entries: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for where, value in entries:
        if isinstance(value, Node):
            number = _number_of(value, numbers)
            if isinstance(where, int):
                places.append((where, number))
            else:
                names.append((where, number))
        elif isinstance(value, (list, tuple)):
            items = [_Number(_number_of(each, numbers)) if isinstance(each, Node) else each for each in value]
            if any(isinstance(item, (list, tuple, dict)) for item in items):
                raise _NotOnTape
            if any(isinstance(item, _Number) for item in items):
                lists.append((where, tuple(items)))
        elif isinstance(value, (dict, slice)):
            raise _NotOnTape
    return _Step(node.target, args, kwargs, tuple(places), tuple(names), tuple(lists), make)
