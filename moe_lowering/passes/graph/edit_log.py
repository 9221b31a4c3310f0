"""Edits of a graph that can be taken back: what was there is written down before each edit, and no graph is copied.

Contract. Whatever is raised inside of a ``step`` (by an edit, by a hook of the graph module, by Ctrl-C between two lines),
the graph is as it was when the step began: its nodes, their order, names, arguments and the order of their readers. Nodes
that appeared meanwhile are gone, also those that nobody wrote down. The exception passes on.

Taking back walks the whole graph, which is rare; writing down costs about a microsecond an edit. It uses what ``Node`` is
made of and not ``Graph.erase_node`` and the like, which call hooks of the user's that may be what failed.
Sources: torch.fx_graph: erase_node, create_node, _FindNodesLookupTable; torch.fx_node, torch.fx_node_native.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch.fx import Graph, GraphModule, Node

from moe_lowering.passes.graph.erased_nodes import eraser

log = logging.getLogger(__name__)


class EditLog:
    """The log of one graph. Nodes that exist are edited through it alone; new ones are made as always."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._known: set[Node] | None = None
        # What takes an edit back, and its arguments: closures would be half of the objects that the pass makes, all of which
        # the garbage collector looks at when the pass ends
        self._undo: list[tuple[Any, ...]] = []

    def step(self, created: Sequence[Node] | None = None) -> AbstractContextManager[None]:
        """All or nothing. Steps may stand within steps.

        Args:
            created: a sequence that holds the new nodes when the step ends; None finds them by a walk of the graph.
        """
        return _LoggedStep(self, created)

    def _begin(self) -> int:
        """The mark of a step that begins: ``_back_to`` undoes what is edited from here on."""
        if self._known is None:
            self._known = set(self.graph.nodes)
        return len(self._undo)

    def _keep(self, created: Sequence[Node] | None) -> None:
        """The new nodes are known from now on."""
        known = self._known
        assert known is not None
        new = [node for node in self.graph.nodes if node not in known] if created is None else [*created]
        self._undo.append((known.difference_update, new))
        known.update(new)

    def undo(self) -> None:
        """Back to the graph as the log found it."""
        if self._known is not None:
            self._back_to(0)

    def replace_uses(self, old: Node, new: Node, but: Node | None = None) -> None:
        """Every reader of ``old`` but one reads ``new``."""
        users = [user for user in old.users if user is not but]
        self._note_readers(new, *_inputs(users))
        self._undo += [(_give_arguments, user, user.args, user.kwargs) for user in users]
        old.replace_all_uses_with(new, delete_user_cb=None if but is None else lambda user: user is not but)

    def set_arguments(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give a node other arguments."""
        self._note_arguments(node)
        node.args, node.kwargs = args, kwargs

    def erase(self, nodes: Sequence[Node]) -> None:
        """Erase nodes that nobody outside of ``nodes`` reads, users first."""
        graph, undo, last_first = self.graph, self._undo, sorted(nodes, reverse=True)
        self._note_readers(*_inputs(last_first))  # as they are before all of it, so once: taking back ends with them
        erase = eraser(graph)
        for node in last_first:
            undo.append((_bring_back, graph, node, node._next, node._sort_key, node._args, node._kwargs))
            erase(graph, node)

    def move(self, node: Node, before: Node) -> None:
        """Move a node to before another one."""
        self._note_place(node)
        before.prepend(node)

    def take_name(self, new: Node, old: Node) -> None:
        """Give a replacement the name of the erased node that it stands for.

        Signatures of exported programs, and of modules in them, name the nodes of the graph that are their outputs.
        """
        graph, names = self.graph, self.graph._graph_namespace._obj_to_name
        self._undo.append((_give_name, new, new.name, names))
        if getattr(graph.owning_module, "_replace_hooks", None):
            new.name = old.name  # the hooks hear of it
        _give_name(new, old.name, names)

    def _note_arguments(self, node: Node) -> None:
        """And the order of the readers of each argument, as giving arguments back makes a node the last reader."""
        self._note_readers(*node.all_input_nodes)
        self._undo.append((_give_arguments, node, node.args, node.kwargs))

    def _note_readers(self, *nodes: Node) -> None:
        """The order of readers is part of the graph: walks through it follow that order."""
        self._undo += [(_order, node, (*node.users,)) for node in nodes]

    def _note_place(self, node: Node) -> None:
        self._undo.append((_put_back, self.graph, node, node.next, node._sort_key))

    def _back_to(self, mark: int) -> None:
        assert self._known is not None
        while len(self._undo) > mark:
            take_back, *arguments = self._undo[-1]
            take_back(*arguments)
            # After the call: if a second Ctrl-C comes during it, an outer step still has this entry to undo
            self._undo.pop()
        self._remove_strangers(self._known)

    def _remove_strangers(self, known: set[Node]) -> None:
        """Remove the nodes that are not in ``known``, with every trace of them, and what an interrupted FX function
        left on others."""
        table, names = self.graph._find_nodes_lookup_table, self.graph._graph_namespace
        for entries in table.table.values():  # one that a hook kept from the list may be here, and the reverse
            for node in [node for node in entries if node not in known]:
                entries.pop(node)
        for node in [node for node in self.graph.nodes if node not in known]:
            node._remove_from_list()
            node._erased = True
            node._update_args_kwargs((), {})
            if names._obj_to_name.pop(node, None) is not None:
                names._used_names.discard(node.name)
        count = 0
        for count, node in enumerate(self.graph.nodes, 1):  # noqa: B007
            if node not in table:  # Node.__setattr__ takes it out for a moment, whatever the attribute is
                table.insert(node)
            if node._repr_fn is not None:  # Graph.python_code gives each node one for a while
                node._repr_fn = None
            if not known.issuperset(node.users):
                for user in [user for user in node.users if user not in known]:
                    node.users.pop(user)
        self.graph._len = count


class _LoggedStep(AbstractContextManager[None]):
    """A step of a log. No generator: a block is three of them."""

    def __init__(self, log: EditLog, created: Sequence[Node] | None) -> None:
        self._log = log
        self._created = created
        self._mark = 0

    def __enter__(self) -> None:
        self._mark = self._log._begin()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._log._keep(self._created)
        except BaseException:  # Ctrl-C too: a graph that is edited half must not stay
            self._log._back_to(self._mark)
            raise
        if kind is not None:
            self._log._back_to(self._mark)


class ModuleEdits(EditLog):
    """The log of a graph module: its code follows its graph."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm.graph)
        self._gm = gm
        self._compiled = False

    def compile(self) -> None:
        """Check the graph and make the module's code from it."""
        self._compiled = True
        self.graph.lint()
        self._gm.recompile()

    def undo(self) -> None:
        """Back to the graph as the log found it, and its code. Raises nothing but what interrupts the process."""
        super().undo()
        if self._compiled:
            try:
                self._gm.recompile()
            except Exception:
                # Then the graph could not be compiled before either, and its old code may not have been made from it.
                log.warning("moe_lowering: the graph as it was cannot be compiled", exc_info=True)


def _give_name(node: Node, name: str, names: dict[Any, str]) -> None:
    # Without the hooks of the graph module, which may be what failed, and without ``Node.__setattr__``'s look at the index
    object.__setattr__(node, "name", name)
    names[node] = name


def _inputs(nodes: Sequence[Node]) -> dict[Node, None]:
    """What nodes read, each once."""
    return dict.fromkeys([each for node in nodes for each in node._input_nodes])


def _give_arguments(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    node._update_args_kwargs(args, kwargs)


def _put_back(graph: Graph, node: Node, following: Node, key: Any) -> None:
    # Not in the list: ``prepend`` would take it out once more, and join its former neighbours
    if node._prev._next is not node:
        node._prev = node._next = node
    node._erased = False
    following.prepend(node)
    node._sort_key = key
    table = graph._find_nodes_lookup_table
    if node not in table:
        table.insert(node)
        entries = table.table[table._key(node)]
        ordered = sorted(entries)
        entries.clear()
        entries.update(dict.fromkeys(ordered))


def _bring_back(
    graph: Graph, node: Node, following: Node, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    _put_back(graph, node, following, key)
    _give_arguments(node, args, kwargs)


def _order(node: Node, order: Sequence[Node]) -> None:
    """Put the readers of a node in that order; others come last."""
    users = node.users
    ordered = dict.fromkeys((*(user for user in order if user in users), *users))
    users.clear()
    users.update(ordered)
