"""Reports say sizes in the user's words."""

import dataclasses
import inspect
import re
import sys

import pytest
import sympy
import torch
from torch.utils._sympy.numbers import int_oo

from moe_lowering import MoE, testing
from moe_lowering.limits import TokenRange, Violation
from moe_lowering.limits.bounds import as_argument, least, read_bound, value_range
from moe_lowering.limits.calls import OPERATORS, PER_TOKEN, communication, matmul, quantised, routing
from moe_lowering.limits.calls import fused as fused_calls
from moe_lowering.limits.wording import Accepted, Bound, Quoted, make_wording, show
from moe_lowering.passes.graph.symbol_names import _written, dimension_names, name_sizes
from moe_lowering.passes.run import graph_run
from moe_lowering.report.records import BlockReport, Verdict
from moe_lowering.report.sizes import Size
from moe_lowering.report.text import render


class Model(torch.nn.Module):
    def __init__(self, deployment):
        super().__init__()
        self.moe = MoE(1024, 128, 8, 2, dtype=torch.bfloat16, deployment=deployment)

    def forward(self, hidden):
        return self.moe(hidden)


def messages(dynamic):
    with testing.fake_deployment(ep_size=2, guards="forbid") as deployment:
        x = torch.zeros(2, 300, 1024, dtype=torch.bfloat16)
        lowered = testing.lower_graph(Model(deployment), x, deployment=deployment, dynamic=dynamic)
    return [v.message for v in lowered.report.blocks[0].verdicts["mc2"].violations]


def test_a_symbolic_token_count_is_named_after_the_argument():
    found = messages(True)
    assert any("tokens is hidden.shape[0]*hidden.shape[1]; accepted: 1 to 512" in message for message in found)


def test_a_static_one_is_a_number():
    assert any("tokens is 600; accepted: 1 to 512" in message for message in messages(False))


def test_a_size_that_is_no_symbol_has_no_names():
    assert dimension_names(3) == ()


# --------------------------------------------------------------------------------- T that the deployment declares


INTERNAL = re.compile(r"\b(?:s|u|zuf)\d+\b")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("comm", "min_tokens"), [("auto", 1), ("alltoall", 0)])
def test_with_unequal_counts_messages_speak_of_t_and_its_declared_range(comm, min_tokens, dynamic):
    fields = {"ep_size": 2, "equal_tokens": False, "max_tokens": 600, "min_tokens": min_tokens}
    with testing.fake_deployment(**fields) as deployment:
        x = torch.zeros(2, 30, 1024, dtype=torch.bfloat16)
        lowered = testing.lower_graph(Model(deployment), x, deployment=deployment, comm=comm, dynamic=dynamic)
    said = [v.message for v in lowered.report.blocks[0].verdicts["mc2"].violations]
    declared = f"tokens is T; accepted: 1 to 512; the deployment declares {min_tokens} <= T <= 600"
    assert any(declared in message for message in said)
    assert not INTERNAL.search(render(lowered.report))
    assert lowered.report.blocks[0].verdicts["alltoall"].legal  # ranks without tokens too


def test_a_refused_range_of_this_rank_alone_is_named_after_the_argument():
    with testing.fake_deployment(ep_size=2, equal_tokens=False, max_tokens=3) as deployment:
        x = torch.zeros(2, 30, 1024, dtype=torch.bfloat16)
        block = testing.lower_graph(Model(deployment), x, deployment=deployment, dynamic=True).report.blocks[0]
    assert block.reason.startswith("T is hidden.shape[0]*hidden.shape[1] and the deployment declares 1 to 3")


# ------------------------------------------------------------------------------------ numbers that the model is given


class Batched(Model):
    """T = the rows of the argument, times numbers that the model is given."""

    def forward(self, hidden, n, settings, **kwargs):
        return self.moe(hidden.expand(n, settings["m"][0], -1, -1).reshape(-1, 1024) * kwargs["scale"].sum())


def test_numbers_are_named_as_the_model_gets_them():
    with testing.fake_deployment(ep_size=2, guards="forbid") as deployment:
        x = torch.zeros(100, 1024, dtype=torch.bfloat16)
        function = Batched(deployment)
        call = lambda x, n, m, scale: function(x, n, {"m": [m]}, scale=scale)  # noqa: E731
        lowered = testing.lower_graph(call, x, 3, 5, x, deployment=deployment, dynamic=True)
        nested = testing.lower_graph(
            lambda x, settings: function(x, 3, settings, scale=x), x, {"m": [5]}, deployment=deployment, dynamic=True
        )
    for found, names in ((lowered, {"n", "m", "x.shape[0]"}), (nested, {"settings['m'][0]", "x.shape[0]"})):
        values = [v.show() for v in found.report.blocks[0].verdicts["mc2"].violations if v.code == "mc2.tokens"]
        assert values and set(values[0].split("*")) - {"3"} == names
        assert not INTERNAL.search(render(found.report))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['x'].size()[0]", "x.shape[0]"),
        ("L['n']", "n"),
        ("G['N']", "N"),
        ("L['batch']['n']", "batch['n']"),
        ("L['more'][0].n", "more[0].n"),
        ("L['xs'][1].stride()[0]", "xs[1].stride(0)"),
        ("L['kwargs']['input_ids'].size()[1]", "input_ids.shape[1]"),
        ("L['self']._modules['layers']._modules['0'].n", "self.layers[0].n"),
        ("___from_numpy(L['x'])", None),
    ],
)
def test_sources_as_the_user_would_write_them(source, name):
    assert _written(source) == name


# ------------------------------------------------------------------------------------- values, and what is made of them

S7, S8 = (sympy.Symbol(name, integer=True, positive=True) for name in ("s7", "s8"))
NAMES = (("s7", "n"), ("s8", "x.shape[0]"))


def test_sizes_and_violations_say_their_symbols_in_the_users_words_and_numbers_as_numbers():
    rows = Bound(S7, "rows")
    violation = Violation(
        "c",
        "op",
        "rows",
        4 * S7,
        Accepted(max=rows),
        says="rows is {value}",
        advises="lower {rows}",
        shown=(("rows", S7),),
    )
    with testing.fake_deployment(ep_size=2) as deployment:
        x = torch.zeros(60, 1024, dtype=torch.bfloat16)
        sizes = testing.lower_graph(Model(deployment), x, deployment=deployment).report.blocks[0].sizes
    sizes = dataclasses.replace(sizes, capacity=Size(S7, 9))
    report = BlockReport("b", "mc2", "", (), (), {"mc2": Verdict("mc2", (violation,))}, sizes=sizes)
    said = name_sizes(report, NAMES)
    assert (str(said.sizes.capacity), said.sizes.received) == ("n", sizes.received)
    (found,) = said.verdicts["mc2"].violations
    assert (found.message, found.advice, found.names) == ("op: rows is 4*n", "lower n", NAMES[:1])
    told = found.to_json()
    assert (told["value"], told["limit"], told["accepted"]) == ("4*n", {"max": "n"}, "at most n (rows)")
    number = dataclasses.replace(
        found, value=600, limit=Accepted(max=Bound(512, "512")), shown=(("rows", 3),)
    ).to_json()
    assert (number["value"], number["limit"], number["accepted"]) == (600, {"max": 512}, "at most 512")


def test_two_symbols_of_one_name_are_not_one():
    """A name is how a symbol is shown: nothing is computed with it."""
    assert show(S7 - S8, (("s7", "n"), ("s8", "n"))) == "n - n"


def test_a_symbol_within_a_word_is_no_symbol():
    """Of our own words nothing is replaced; of an exception's neither, but its symbols are explained."""
    assert make_wording("s7 of s77 {tokens}", tokens=S7).say(NAMES) == "s7 of s77 n"
    assert Quoted("size s8 is wrong").say(NAMES) == "size s8 is wrong (s8 is x.shape[0])"
    assert Quoted("nothing").say(NAMES) == "nothing"


def test_an_undone_rewrite_is_said_in_the_users_words(monkeypatch):
    """Shapes of a VerificationError, and of somebody else's error the symbols that it names."""
    real = graph_run.same_value

    def transposed(old, new):
        real(old, type("Node", (), {"name": new.name, "meta": {"val": new.meta["val"].transpose(0, 1)}}))

    def foreign(old, new):
        raise ZeroDivisionError(f"by {old.meta['val'].shape[0]}")

    for planted, said in (
        (transposed, r"is \(x\.shape\[0\], 1024\) torch.bfloat16 on cpu, .* is \(1024, x\.shape\[0\]\)"),
        (foreign, r"ZeroDivisionError: by s\d+ \(s\d+ is x\.shape\[0\]\)$"),
    ):
        monkeypatch.setattr(graph_run, "same_value", planted)
        with testing.fake_deployment(ep_size=2) as deployment:
            moe, x = Model(deployment).moe, torch.zeros(60, 1024, dtype=torch.bfloat16)
            block = testing.lower_graph(
                lambda x, moe=moe: moe(x), x, deployment=deployment, comm="allgather", dynamic=True
            ).report.blocks[0]
        assert block.comm is None and re.search(said, block.reason), block.reason


# ------------------------------------------------------------------------------------------------------------- no bound


def test_no_bound_is_none():
    """Read from a ShapeEnv's two ways to write it; written as an operator's argument, and for a proof."""
    assert [read_bound(each) for each in (int_oo, sympy.Integer(sys.maxsize - 1), sympy.Integer(512))] == [
        None,
        None,
        512,
    ]
    assert (as_argument(None), as_argument(512)) == (sys.maxsize, 512)
    assert (value_range(1, None).upper, value_range(1, 512).upper) == (int_oo, 512)
    assert [least(*each) for each in ((None, None), (None, 3), (3, None), (3, 2))] == [None, 3, 3, 2]
    assert str(TokenRange(4, None)) == "T >= 4" and 2**60 in TokenRange(4, None) and 3 not in TokenRange(4, None)


@pytest.mark.parametrize(("fields", "bounded"), [({}, False), ({"max_tokens": 300}, True)])
def test_a_fused_operator_without_a_receive_bound_is_told_so_once(fields, bounded):
    """And not also that 0 rows are too few, or which HCCL_BUFFSIZE an endless T would need at most."""
    with testing.fake_deployment(ep_size=2, guards="forbid", **fields) as deployment:
        x = torch.zeros(2, 30, 1024, dtype=torch.bfloat16)
        report = testing.lower_graph(Model(deployment), x, deployment=deployment, dynamic=True).report
    fused = {v.code: v for v in report.blocks[0].verdicts["fused_mc2"].violations}
    assert ("fused.receive_bound" in fused) != bounded and "fused.max_output_size" not in fused
    if not bounded:
        assert fused["fused.window"].to_json()["buffer"] == {"buffer_mb": 1024, "needed_mb": None}
        assert "T has no upper bound" in fused["fused.window"].advice


def test_which_quantities_count_tokens_is_written_down():
    """What a verifier reads as T: every quantity of a reader whose name says so, and nothing that no reader has."""
    sources = " ".join(inspect.getsource(module) for module in (routing, communication, fused_calls, quantised, matmul))
    read = set(re.findall(r'"(\w+)":', sources))
    assert PER_TOKEN.keys() <= read
    assert {name for name in read - OPERATORS if name.endswith("tokens")} <= PER_TOKEN.keys()
