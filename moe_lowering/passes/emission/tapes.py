"""``Tape``: the nodes that one rewrite made, to be made again for an equal block without asking what they should be.

An implementation works out for each block which nodes to emit. For the second and later of equal blocks of a graph the
answer is known: the same operators with the same plain arguments, at the same stages, on the block's own inputs.

When are blocks equal? An emitter reads the deployment, the block's record (``BlockSpec``), the premises of its verdict, and
of the graph what ``wiring`` describes. All of these are in the key of a tape, and the version of the ShapeEnv, since a guard
may have turned a size into a number meanwhile. A rewrite that added a guard itself, read a node from elsewhere, or
stood at another place than a stage has no tape, and each equal block is emitted anew. A test watches what emitters read
(``tests/passes/test_tapes.py``).
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch.fx import Node

from moe_lowering.passes.emission.emitter import Constants, Emitter
from moe_lowering.passes.emission.new_nodes import MakeBefore, repeated_call
from moe_lowering.passes.emission.wiring import Wiring, read_wiring
from moe_lowering.passes.graph.graph_nodes import graph_nodes
from moe_lowering.passes.graph.operator_names import operator_name
from moe_lowering.report.graphs import GraphNode, NamedNodes, Pattern

Nodes = Sequence[Node]
Arguments = tuple[Any, ...]
_Place = int | list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """One node, as ``emitter.Step`` says. What is always the same is made once: every equal block asks for each step."""

    insert: MakeBefore
    fill: Callable[[Sequence[Any]], Arguments]
    fill_named: Callable[[Sequence[Any]], dict[str, Any]] | None
    kwargs: dict[str, Any]
    value: Callable[[Arguments], Any]


class _NotOnTape(Exception):
    """Why a rewrite cannot be repeated. Never leaves this module."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tape:
    """The nodes of one rewrite in the order in which they were made.

    Attributes:
        plain: arguments that are no nodes.
        runs: steps that follow each other at one place: the stage before which they stand, the one whose source they have.
        constants: nodes of the graph that they read beside the inputs, made by no block.
        results: what the rewrite gave, by number; None for a result that it does not give.
        operators: the names of the operators, in graph order.
        pattern: the nodes in graph order, for a report.
    """

    plain: tuple[Any, ...]
    runs: tuple[tuple[int, int, tuple[_Step, ...]], ...]
    constants: tuple[Node, ...]
    results: tuple[int | None, ...]
    operators: tuple[str, ...]
    pattern: Pattern

    def play(self, emit: Emitter, stages: Nodes, wiring: Wiring) -> list[Node | None] | None:
        """Make the nodes again; the results, or None where a constant has been taken back: nothing is made then."""
        if any(node._erased for node in self.constants):
            return None
        held: list[Any] = [*self.plain, *wiring.inputs, *self.constants]
        for position, origin, steps in self.runs:
            emit.repeat(steps, held, stages[position], stages[origin])
        return [None if number is None else held[number] for number in self.results]


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
        if wiring is None or tuple(dict.fromkeys([n for s in stages for n in s._input_nodes])) != wiring.inputs:
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
    nodes = [*wiring.inputs, *read, *emit.created]
    writer = _StepWriter(nodes, emit.created)
    runs: list[tuple[int, int, list[_Step]]] = []
    try:
        # a recording of an equal block may go on, with what stands beside the rewrite
        for node, (_, value), (position, origin) in zip(emit.created, emit.recording, emit.places, strict=False):
            place = _stage(stages, position), _stage(stages, origin)
            if not runs or runs[-1][:2] != place:
                runs.append((*place, []))
            runs[-1][2].append(writer.write(node, value))
        given = tuple([None if node is None else writer.number(node) for node in results])
    except _NotOnTape:
        return None
    in_order, numbers = sorted(emit.created), {node: number for number, node in enumerate(nodes)}
    pattern = tuple(
        (numbers[node], operator_name(node), tuple([numbers[each] for each in node.all_input_nodes]))
        for node in in_order
    )
    steps_by_place = tuple([(position, origin, tuple(steps)) for position, origin, steps in runs])
    return Tape(writer.plain, steps_by_place, tuple(read), given, operators_of(in_order), pattern)


def operators_of(in_order: Iterable[Node]) -> tuple[str, ...]:
    """The names of the operators of some nodes, without what only takes results apart."""
    return tuple([operator_name(node) for node in in_order if node.target is not operator.getitem])


def _stage(stages: Nodes, node: Node) -> int:
    for number, stage in enumerate(stages):
        if stage is node:
            return number
    raise _NotOnTape


class _StepWriter:
    """Writes the steps of a tape, in order.

    Args:
        nodes: those that the tape holds when it has been played.
        created: those of them whose steps are written.

    Attributes:
        plain: what stands before them: the arguments that are no nodes, in order.
    """

    def __init__(self, nodes: Iterable[Node], created: Iterable[Node]) -> None:
        leaves = (leaf for node in created for value in _filled(node) for leaf in _leaves(value))
        self.plain = tuple([leaf for leaf in leaves if not isinstance(leaf, Node)])
        self._next_plain = itertools.count()
        self._numbers = {node: number for number, node in enumerate(nodes, len(self.plain))}

    def number(self, node: Node) -> int:
        if node not in self._numbers:
            raise _NotOnTape
        return self._numbers[node]

    def write(self, node: Node, value: Callable[[Arguments], Any]) -> _Step:
        for argument in (*node.args, *node.kwargs.values()):
            _require_shallow(argument)
        return _Step(
            insert=repeated_call(node.graph, node.target),
            fill=_fill([self._place(each) for each in node.args]),
            fill_named=_fill_named(node, {name: self._place(node.kwargs[name]) for name in _names_of_nodes(node)}),
            kwargs=node.kwargs,  # immutable: FX gives it to further nodes as it is
            value=value,
        )

    def _place(self, value: Any) -> _Place:
        """Where what an argument is filled with is held: of a list with nodes in it the places of its items."""
        if _has_nodes(value):
            return [self._place_of_leaf(each) for each in value]
        return self._place_of_leaf(value)

    def _place_of_leaf(self, leaf: Any) -> int:
        return self.number(leaf) if isinstance(leaf, Node) else next(self._next_plain)


def _filled(node: Node) -> list[Any]:
    """The arguments that a tape fills in, in order: all by position, and by name those with nodes."""
    return [*node.args, *[node.kwargs[name] for name in _names_of_nodes(node)]]


def _names_of_nodes(node: Node) -> list[str]:
    return [name for name, value in node.kwargs.items() if isinstance(value, Node) or _has_nodes(value)]


def _has_nodes(value: Any) -> bool:
    """Whether an argument is a list with nodes in it."""
    return isinstance(value, (list, tuple)) and any(isinstance(each, Node) for each in value)


def _leaves(value: Any) -> list[Any]:
    return [*value] if _has_nodes(value) else [value]


def _require_shallow(value: Any) -> None:
    """Nodes further inside than in a list would not be seen."""
    items = value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, (dict, slice)) or any(isinstance(item, (list, tuple, dict, slice)) for item in items):
        raise _NotOnTape


def _fill(places: list[_Place]) -> Callable[[Sequence[Any]], Arguments]:
    """Takes arguments from where they are held, most of them in one call of C code."""
    flat = [place for place in places if isinstance(place, int)]
    if len(flat) == len(places) and len(flat) > 1:
        return operator.itemgetter(*flat)
    items = [_take(place) for place in places]
    return lambda held: tuple([item(held) for item in items])


def _take(place: _Place) -> Callable[[Sequence[Any]], Any]:
    return operator.itemgetter(place) if isinstance(place, int) else lambda held: [held[each] for each in place]


def _fill_named(node: Node, places: Mapping[str, _Place]) -> Callable[[Sequence[Any]], dict[str, Any]] | None:
    if not places:
        return None
    kwargs, items = dict(node.kwargs), {name: _take(place) for name, place in places.items()}
    return lambda held: {**kwargs, **{name: item(held) for name, item in items.items()}}
