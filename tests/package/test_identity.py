"""The text for a callable: the same for what is the same, another for each thing that differs, no address in it."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import moe_lowering
from moe_lowering import Deployment, MoeLowering, npugraph_ex_options, torchair_config
from moe_lowering.backends.cache_key import flat_hook
from moe_lowering.identity import identity

TESTS = Path(__file__).parent
HOOK = "post_grad_custom_pre_pass"


def constant(a: Any) -> Any:
    def g() -> Any:
        return a

    return g


def closures(a: Any) -> Any:
    gs = tuple(constant(each) for each in (1, 2, a, 4))
    return lambda i, load: float(sum(g() for g in gs))


def partials(a: Any) -> Any:
    return functools.partial(constant, *[functools.partial(constant, each) for each in (1, 2, a)])


def made(source: str, **names: Any) -> Any:
    """``cost`` of a module of its own."""
    exec(source, names)
    return names["cost"]


def global_(value: Any) -> Any:
    return made("def cost(i, l): return G", G=value, __name__="theirs")


def module(value: Any) -> Any:
    theirs = types.ModuleType("theirs")
    theirs.SCALE, theirs.other = value, object()
    return made("def cost(i, l): return theirs.SCALE", theirs=theirs)


def class_attribute(a: Any) -> Any:
    class Cost:
        factor = a

        def __call__(self, i: Any, load: Any) -> Any:
            return self.factor

    return Cost()


def helper(a: Any) -> Any:
    class Base:
        def help(self) -> Any:
            return a

    class Cost(Base):
        def __call__(self, i: Any, load: Any) -> Any:
            return self.help()

    return Cost()


def descriptors(a: Any) -> Any:
    class Cost:
        @property
        def first(self) -> Any:
            return a

        @staticmethod
        def second() -> Any:
            return 0

        @functools.cached_property
        def third(self) -> Any:
            return 0

    return Cost()


def static(a: Any) -> Any:
    class Cost:
        second = staticmethod(constant(a))
        third = functools.cached_property(constant(0))

    return Cost


def container(base: type) -> Any:
    def make(a: Any) -> Any:
        class Cost(base):
            def __call__(self, i: Any, load: Any) -> Any:
                return self

        return Cost([(1, a)])

    return make


def attribute_of_container(a: Any) -> Any:
    class Cost(dict):
        pass

    cost = Cost()
    cost.a = a
    return cost


def slots(a: Any) -> Any:
    class Cost:
        __slots__ = ("a", "unset")

    cost = Cost()
    cost.a = a
    return cost


def slots_and_dict(a: Any) -> Any:
    class Base:
        __slots__ = ("a",)

    class Cost(Base):
        pass

    cost = Cost()
    cost.a, cost.b = a, 1
    return cost


def extra_attribute(a: Any) -> Any:
    @dataclasses.dataclass
    class Cost:
        x: int
        y: list[int] = dataclasses.field(default_factory=list)

    cost = Cost(1)
    cost.bias = a
    return cost


def member(a: Any) -> Any:
    class Kind(enum.Enum):
        one, two = 1, a

    return functools.partial(constant, Kind.one)


def function_attribute(a: Any) -> Any:
    def cost(i: Any, load: Any) -> Any:
        return cost.a

    cost.a = a
    return cost


def wrapped(a: Any) -> Any:
    """With the ``__module__`` of a function of torch's."""
    return functools.wraps(moe_lowering.MoE.forward)(constant(a))


@pytest.mark.parametrize(
    "make",
    [
        closures,
        partials,
        global_,
        lambda a: global_(types.SimpleNamespace(a=a)),
        lambda a: global_(functools.partial(constant, a)),
        lambda a: global_(collections.defaultdict(int, a=a)),
        lambda a: global_(constant(a)),
        module,
        class_attribute,
        lambda a: type(class_attribute(a)),
        helper,
        descriptors,
        static,
        *(container(base) for base in (dict, list, tuple, set, frozenset)),
        attribute_of_container,
        slots,
        slots_and_dict,
        extra_attribute,
        member,
        function_attribute,
        wrapped,
        lambda a: {"a": a}.get,
        lambda a: functools.cache(constant(a)),
        lambda a: {1, (2, frozenset({a}))},
        lambda a: functools.partial(constant, collections.namedtuple("N", "x")(a)),
    ],
)
def test_one_value_that_differs(make):
    assert identity(make(3)) == identity(make(3))
    assert identity(make(3)) != identity(make(5))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lambda i, l: l", "lambda i, *l: l"),
        ("lambda i, l: l", "lambda i, /, l: l"),
        ("lambda i, l: l", "lambda i, *, l: l"),
        ("lambda i, l: l[..., 0]", "lambda i, l: l[..., 1]"),
        ("lambda i, l: l in {1, 2}", "lambda i, l: l in {1, 3}"),
        ("lambda i, l: [lambda: 1 for _ in l]", "lambda i, l: [lambda: 2 for _ in l]"),
        ("lambda i, l: NotImplemented", "lambda i, l: Ellipsis"),
    ],
)
def test_code_that_differs(one, other):
    assert identity(made(f"cost = {one}")) == identity(made(f"cost = {one}"))
    assert identity(made(f"cost = {one}")) != identity(made(f"cost = {other}"))


def test_an_exception_handler_is_part_of_code():
    lines = ["def cost(i, l):", " a = i", " try:", "  a = l", " except: return 1", " return a"]
    other = [*lines[:1], " try:", "  a = i", "  a = l", *lines[4:]]
    assert identity(made("\n".join(lines))) == identity(made("\n".join(lines)))
    assert identity(made("\n".join(lines))) != identity(made("\n".join(other)))


class Table:
    def at(self) -> int:
        return 1


def looked_up(i: Any, load: Any) -> Any:
    return Table().at()


def test_a_method_of_a_class_beside_the_function(monkeypatch):
    before = identity(looked_up)
    assert identity(looked_up) == before
    monkeypatch.setattr(Table, "at", lambda self: 2)
    assert identity(looked_up) != before


class Linked:
    def __init__(self) -> None:
        self.kind, self.own, self.all = type(self), self, {self}
        self.call = self.loop

    def loop(self) -> Any:
        return Linked, looked_up


def test_cycles_end():
    held: list[Any] = [1]
    held.append((held, {"a": held}))
    assert identity(held) == identity(held)
    assert identity(Linked()) == identity(Linked())
    assert "unique" not in identity(Linked())


def test_nesting_too_deep_to_write_is_never_found_again(caplog):
    held: list[Any] = []
    for _ in range(10_000):
        held = [held]
    assert identity(held) != identity(held)
    assert "cannot be part of a cache key" in caplog.text


@pytest.mark.parametrize(
    "value", [iter([1]), ValueError(1), made("def cost(i, l):\n import theirs"), types.ModuleType("theirs"), object]
)
def test_what_is_held_in_c_or_changes_unseen_is_never_found_again(value):
    """The twin is a class of C's, which has a name."""
    assert (identity(value) == identity(value)) == (value is object)


def everything() -> list[str]:
    makes = [closures, class_attribute, helper, slots_and_dict, extra_attribute, member, descriptors, module]
    texts = [identity(make("a")) for make in makes]
    return [*texts, identity({"a", "b", ("c", "d")}), identity(Linked()), identity(looked_up)]


def test_another_process_writes_the_same():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_identity as t; print(t.everything())"
    root = Path(moe_lowering.__file__).parents[1]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONHASHSEED": "7"}
    environment |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    here = str(everything())
    assert "unique" not in here
    assert done.stdout.strip() == here.replace(f"{__name__}.", "test_identity."), done.stderr


def test_a_function_made_by_exec_has_no_module():
    assert identity(made("def cost(i, l): return 1")) == identity(made("def cost(i, l): return 1"))
    assert identity(made("def cost(i, l): return 1")) != identity(made("def cost(i, l): return 2"))


def test_options_made_from_options_with_the_hook():
    deployment = Deployment()
    first = npugraph_ex_options(deployment)
    twice = [npugraph_ex_options(deployment, **first)[HOOK].__code__ for _ in range(2)]
    assert twice[0] == twice[1] != first[HOOK].__code__
    other = npugraph_ex_options(deployment, **npugraph_ex_options(deployment, comm="allgather"))
    assert other[HOOK].__code__ != twice[0]


def test_a_torchair_config_with_the_hook():
    deployment = Deployment()
    codes = []
    for _ in range(2):
        config = torchair_config(deployment)
        codes.append(torchair_config(deployment, config=config).post_grad_custom_pre_pass.value.__code__)
    assert codes[0] == codes[1]


def test_what_follows_the_pass_is_part_of_the_hooks_identity():
    lowering = MoeLowering(Deployment())
    assert identity(flat_hook(lowering)) == identity(flat_hook(lowering))
    assert identity(flat_hook(lowering)) != identity(flat_hook(lowering, after=looked_up))
