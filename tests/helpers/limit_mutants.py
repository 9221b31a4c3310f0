"""Wrong numbers in the limit tables, one at a time: what the facts must catch.

A mutant is a row with one integer of one of its expressions changed, one value of an enumeration taken away or added, one
SoC taken away, one number of a version changed, or a condition that no longer knows one of its words. Names and operations
are left as they are, and conditions that would hold more often: a rule that is too broad refuses, it never permits.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from fact_tables import others

from moe_lowering.limits import Limit
from moe_lowering.limits.expressions import Expression

FIELDS = ("value", "when", "min", "max", "multiple_of", "equals")


def mutants(row: Limit) -> Iterator[tuple[str, Limit]]:
    """(what was changed, the changed row)."""
    for field in FIELDS:
        expression = getattr(row, field)
        for text in _changed(expression.text) if expression is not None else ():
            yield f"{field}: {expression.text} -> {text}", dataclasses.replace(row, **{field: Expression(text)})
    for value in row.one_of if len(row.one_of) > 1 else ():
        yield f"without {value!r}", dataclasses.replace(row, one_of=tuple(v for v in row.one_of if v is not value))
    if row.when is not None and "!=" not in row.when.text and "not in" not in row.when.text:
        for word in dict.fromkeys(re.findall("'[^']*'", row.when.text)):
            when = Expression(row.when.text.replace(word, "'no such word'"))
            yield f"when without {word}", dataclasses.replace(row, when=when)
    older = " in an older version" if row.versions else ""
    for value in _added(row):
        yield f"with {value!r}{older}", dataclasses.replace(row, one_of=(*row.one_of, value))
    for soc in row.soc if row.value.text != "soc" else ():
        yield f"not on {soc}", dataclasses.replace(row, soc=tuple(s for s in row.soc if s != soc))
    for number, constraint in enumerate(row.versions):
        for digits in _versions(constraint.number):
            changed = dataclasses.replace(constraint, number=digits)
            versions = (*row.versions[:number], changed, *row.versions[number + 1 :])
            yield f"version {constraint.text} -> {digits}", dataclasses.replace(row, versions=versions)


def _changed(text: str) -> Iterator[str]:
    """The expression with one of its integers changed."""
    count = sum(_is_number(node) for node in ast.walk(ast.parse(text, mode="eval")))
    for at in range(count):
        tree = ast.parse(text, mode="eval")
        node = [node for node in ast.walk(tree) if _is_number(node)][at]
        old = node.value
        for new in dict.fromkeys((old + 1, old - 1, 0, 2 * old, old // 2, 10 * old, old + old // 8, old - old // 8)):
            if new != old and new >= 0:
                node.value = new
                yield ast.unparse(tree)


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int


def _added(row: Limit) -> list[Any]:
    if not row.one_of or row.value.text == "soc":
        return []
    name = row.value.text
    if type(row.one_of[0]) is int:
        new = {max(row.one_of) + 1, min(row.one_of) - 1, 2 * max(row.one_of) + 1} - set(row.one_of)
        return sorted(new)
    if not name.isidentifier():  # a comparison: true and false
        return [not value for value in row.one_of]
    found = others(name, list(row.one_of))
    if row.when is not None and row.when.names == {name}:  # what the row does not look at makes no difference
        return [value for value in found if row.when({name: value})]
    return found


def _versions(number: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    yield (*number[:-1], number[-1] + 1)
    if number[-1]:
        yield (*number[:-1], number[-1] - 1)
    yield (number[0] + 1, *number[1:])


def equivalent(code: str, change: str) -> str:
    """Why no call can tell a mutant from its row; "" where one can."""
    return next((why for c, what, why in EQUIVALENT if re.fullmatch(c, code) and re.match(what, change)), "")


# (code, change, why), both as patterns
EQUIVALENT = (
    (r"collective\.rows|gating\.groups_divide|.*(experts_divisible|global_bs)", r"when: .* > 1$", "all are multiples of 1"),
    (r"mc2\.shared_expert_ranks", r"when: .* shared_expert_num > 1$", "all are multiples of 1"),
    (r"fused\.width_max|fused_decode\.width", r"(max|min): .*[1359]$", "twice a number is even"),
    (r"fused\.count_matrix", r"max: 196608 -> 196609", "a multiple of 4"),
    (r"gating\.groups_aligned", r"max: 2048 -> 2049", "a multiple of 32"),
    (r"mc2\.buffer", r"value: .*\* hidden, 32\) \+ (63|56)", "blocks of 480 and 512 begin at multiples of 32"),
    (r"mc2\.buffer", r"value: .*\* hidden, 16\) \+ 64", "blocks of 480 and 512 begin at multiples of 32, less 64"),
    (r"mc2\.buffer", r"value: .*align\(align\(2 \* hidden, 64\) \+ 64, 512\)", "blocks of 512 begin at multiples of 64, less 64"),
    (r"mega_moe\.buffer", r"value: .*align\(ep_size \* 128 \+ (2|10), 128\)", "up to the next multiple of 128"),
    (r"routing\.experts", r"when: expert_tokens_num_type != 2 -> ", "the row for 2 is stricter"),
    (r"fused\.activation|fused_decode\..*_dtype|mc2\.comm_alg", r"with .* in an older version", "refused in all versions"),
)  # fmt: skip
