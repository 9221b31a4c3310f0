"""The draws of the property tests: what is drawn is what a seed says, and a case that fails is made simpler."""

from __future__ import annotations

import random

import graph_aims
import graph_draws as st
import pytest
from graph_draws import Choices, simplest
from graph_strategies import judged_cases, local_cases, pair_cases


@st.composite
def pairs(draw):
    return draw(st.integers(0, 99)), draw(st.lists(st.sampled_from("abc"), max_size=3)), draw(st.booleans())


def drawn(strategy, seed):
    choices = Choices(generator=random.Random(seed))
    return strategy(choices), choices.made


@pytest.mark.parametrize("strategy", [judged_cases(), local_cases(), pair_cases("A3")], ids=["judged", "local", "pair"])
def test_a_case_is_its_choices(strategy):
    cases = [drawn(strategy, seed) for seed in range(50)]
    assert [drawn(strategy, seed)[0] for seed in range(50)] == [case for case, _ in cases]
    assert [strategy(Choices(made)) for _, made in cases] == [case for case, _ in cases]
    assert len({repr(case) for case, _ in cases}) > 45, "another seed is another case"


def test_every_value_is_drawn():
    values = {repr(drawn(pairs(), seed)[0][1:]) for seed in range(2000)}
    assert len(values) == 2 * (1 + 3 + 9 + 27)


def test_what_fails_is_made_simple():
    def fails(case):
        return case[0] >= 10 and "b" in case[1]

    case, made = next((c, m) for c, m in (drawn(pairs(), seed) for seed in range(999)) if fails(c))
    number, letters, flag = pairs()(Choices(simplest(pairs(), made, fails, 60)))
    assert fails((number, letters, flag)) and number < 20 and not flag and set(letters) <= {"a", "b"}
    assert simplest(pairs(), made, fails, 0) == made, "no time, no other case"
    assert simplest(pairs(), made, lambda other: other == case, 60) == made, "nothing smaller fails"


def test_an_implementation_without_an_entry_is_aimed_at():
    """A fifth one needs no edit of the aims: its cases have no scope between two stages, or, some of them, that alone."""
    across = []
    for seed in range(60):
        choices = Choices(generator=random.Random(seed))
        case = judged_cases()(choices)
        aimed = graph_aims.aimed(case, "a fifth", lambda strategy, choices=choices: strategy(choices))
        (is_across,) = {graph_aims.ACROSS in block.odd for block in aimed.blocks}
        assert not is_across or aimed.comm == "a fifth"
        across.append(is_across)
    assert 0 < sum(across) < 30
