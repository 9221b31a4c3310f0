"""Measured rows: files of a user's that are right and wrong, what they replace, and that ranks compare them."""

import json
import random

import pytest

from moe_lowering import Deployment, MoeLowering, explain
from moe_lowering.backends.cache_key import cache_digest
from moe_lowering.cli import main
from moe_lowering.passes.agreement_check import settings_record
from moe_lowering.prices.fit import fit_law, largest_error
from moe_lowering.prices.laws import ELSEWHERE, fitted_laws, known_law, stated_laws
from moe_lowering.prices.machines import ideal_of, machine_of
from moe_lowering.prices.rates import rates_of
from moe_lowering.prices.rows import EXCHANGES, WORDS, MeasuredError, Row, read_csv
from moe_lowering.vocabulary import SOCS

HEAD = "soc,what,ranks,amount,us"
GOOD = f"{HEAD}\nA3,dispatch,16,7864320,20.5\nA2,vector,1,0,3\n"


def written(tmp_path, text, name="rows.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_is_read(tmp_path):
    assert read_csv(written(tmp_path, GOOD)) == (
        Row("A3", "dispatch", 16, 7864320, 20.5),
        Row("A2", "vector", 1, 0, 3.0),
    )
    shuffled = "\ufeff us , ranks_per_node,amount,what,soc,ranks\r\n\r\n 20.5 ,8,7864320,dispatch,A3,16\r\n"
    assert read_csv(str(written(tmp_path, shuffled))) == (Row("A3", "dispatch", 16, 7864320, 20.5, 8),)


WRONG = {
    "no file": (None, r"rows.csv' cannot be read \(.*\); accepted: a CSV file in UTF-8"),
    "not text": (b"\xff\xfe\x00", r"cannot be read"),
    "nothing": ("", r"has no rows; accepted: a line with soc, what, ranks, amount, us, and at least one row"),
    "no rows": (f"{HEAD}\n\n", r"has no rows"),
    "no header": ("A3,dispatch,16,7864320,139\n", r"line 1: column 'A3' is unknown or there twice; accepted: soc, what, ranks"),
    "a column is missing": ("soc,what,ranks,us\n", r"line 1: column 'amount' is missing"),
    "a column is there twice": (f"{HEAD},us\n", r"line 1: column 'us' is unknown or there twice"),
    "a cell is missing": (f"{HEAD}\nA3,dispatch,16,139\n", r"line 2: has 4 columns; accepted: 5 \(soc, what, ranks"),
    "a cell is too much": (f"{GOOD}A3,dispatch,16,1,1,1\n", r"line 4: has 6 columns"),
    "a quote is open": (f'{HEAD}\n"A3,dispatch,16,1,1\n', r"line 2: unexpected end of data; accepted: CSV"),
    "soc": (f"{HEAD}\nA4,dispatch,16,99,1\n", r"line 2, column soc: is 'A4'; accepted: A2, A3, A5, 310P"),
    "what": (f"{HEAD}\nA3,send,16,99,1\n", r"line 2, column what: is 'send'; accepted: vector, memory, matmul_16bit"),
    "ranks": (f"{HEAD}\nA3,dispatch,1,99,1\n", r"line 2, column ranks: is '1'; accepted: an integer of 2 or more"),
    "ranks of a matmul": (f"{HEAD}\nA3,matmul_int8,2,99,1\n", r"line 2, column ranks: is '2'; accepted: 1"),
    "amount": (f"{HEAD}\nA3,dispatch,16,1.5,1\n", r"line 2, column amount: is '1.5'; accepted: an integer of 16 or more"),
    "amount that reaches nobody": (f"{HEAD}\nA3,dispatch,16,15,1\n", r"line 2, column amount: is '15'"),
    "amount of a start": (f"{HEAD}\nA3,vector,1,5,1\n", r"line 2, column amount: is '5'; accepted: 0"),
    "amount without end": (f"{HEAD}\nA3,memory,1,{9 * 10**19},1\n", r"line 2, column amount"),
    "us": (f"{HEAD}\nA3,dispatch,16,99,fast\n", r"line 2, column us: is 'fast'; accepted: a number above 0, microseconds"),
    "us is nan": (f"{HEAD}\nA3,dispatch,16,99,nan\n", r"line 2, column us: is 'nan'"),
    "us is 0": (f"{GOOD}A3,dispatch,16,99,0\n", r"line 4, column us: is '0'"),
    "us is infinite": (f"{HEAD}\nA3,dispatch,16,99,inf\n", r"line 2, column us: is 'inf'"),
    "ranks_per_node": (f"{HEAD},ranks_per_node\nA3,dispatch,16,99,1,-8\n", r"line 2, column ranks_per_node: is '-8'; accepted"),
    "rows of another SoC": (f"{HEAD}\nA2,vector,1,0,3\n", r"has rows of A2; accepted: rows of A3, which is soc, among them"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_clear_error(tmp_path, name, capsys):
    text, message = WRONG[name]
    path = tmp_path / "rows.csv" if text is None else written(tmp_path, text)
    with pytest.raises(MeasuredError, match=f"Deployment: measured.*{message}"):
        Deployment(measured=path)
    assert main(["explain", "moe", "--measured", str(path)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("moe-lowering: error: argument --measured: ") and "\n" not in said


@pytest.mark.parametrize("command", ["explain", "lower"])
def test_an_empty_name_is_none(command, capsys):
    assert main([command, "moe", "--measured", ""]) == 2
    assert capsys.readouterr().err == "moe-lowering: error: argument --measured: is ''; accepted: a file\n"


@pytest.mark.parametrize("value", [5, [Row("A3", "vector", 1, 0, 1.0)], ("A3",), True])
def test_what_is_no_file_and_no_rows_is_refused(value):
    with pytest.raises(MeasuredError, match=r"Deployment: measured is .*; accepted: a path to a CSV file, or its rows"):
        Deployment(measured=value)


def test_rows_replace_the_law_of_their_kind_and_soc_alone(tmp_path):
    rows = read_csv(written(tmp_path, GOOD))
    known, found = rates_of("A3"), rates_of("A3", 0, rows)
    for what in WORDS:
        assert (found.law(what) == known.law(what)) == (what != "dispatch")
    assert found.law("dispatch").us(ideal_of(rows[0]), 16) == pytest.approx(20.5, rel=1e-4)
    assert found.law("dispatch").error >= 0.05
    there = {"soc": "A3", "ep_size": 16, "ep_group": "ep", "mc2_group": "mc2", "hccl_buffer_mb": 4096}
    layer = {"hidden_size": 7168, "moe_intermediate_size": 2048, "num_experts": 256, "num_experts_per_tok": 8}
    prices = [explain(layer, Deployment(**there, measured=measured)).answer.prices["mc2"].us for measured in ((), rows)]
    assert prices[1] < prices[0] - 50


def law_rows(law, soc, what, count):
    """Rows that a law gives."""
    draw = random.Random(f"{soc} {what}")
    made = []
    for _ in range(count):
        ranks = draw.choice((2, 4, 8, 16, 64)) if what in EXCHANGES else 1
        amount = (
            0 if what == "vector" else draw.choice((10**6, 10**7, 10**9, 10**10)) * (1000 if "matmul" in what else 1)
        )
        row = Row(soc, what, ranks, amount, 1.0)
        made.append(row._replace(us=law.us(ideal_of(row), ranks)))
    return made


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("what", WORDS)
@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_a_law_is_found_again_from_its_rows(soc, what, count):
    law, _ = stated_laws()[what]
    steeper = law.__class__(law.fixed_us * 3 + 1, law.slowdown * 2 + 1, 0.25 if what in EXCHANGES else 0.0, 0.1, "test")
    rows = law_rows(steeper, soc, what, count)
    found = fit_law(rows, law, "test")
    assert min(found.fixed_us, found.slowdown, found.growth) >= 0
    if count in (1, 12):
        assert largest_error(found, rows) < 1e-3
    worse = [row._replace(us=row.us * (2 if at else 1)) for at, row in enumerate(rows)]
    if count == 12:
        assert largest_error(fit_law(worse, law, "test"), worse) > 0.01


def test_what_was_fitted_elsewhere_has_a_larger_error():
    for what, (soc, law) in fitted_laws().items():
        assert known_law(what, soc).error == law.error
        for other in SOCS.keys() - {soc}:
            assert known_law(what, other).error == pytest.approx(law.error + ELSEWHERE)
            assert known_law(what, other).fixed_us == law.fixed_us


def test_stated_laws_and_machines_cite_their_sources():
    assert all(sources for _, sources in stated_laws().values())
    assert all(machine_of(soc).sources for soc in SOCS)


# ------------------------------------------------------------------------------------------------ ranks compare them


def test_ranks_and_caches_see_the_content_and_not_the_name(tmp_path):
    one, same = (Deployment(measured=written(tmp_path, GOOD, name)) for name in ("one.csv", "same.csv"))
    other = Deployment(measured=written(tmp_path, GOOD.replace("20.5", "20.6"), "other.csv"))
    none = Deployment()
    assert one == same and one.digest() == same.digest() and hash(one) == hash(same)
    assert len({one.digest(), other.digest(), none.digest(), Deployment(ranks_per_node=8).digest()}) == 4
    settings = [settings_record(each, MoeLowering(each)) for each in (one, same, other, none)]
    assert settings[0] == settings[1] and settings[0] != settings[2] != settings[3]
    assert json.loads(json.dumps(settings[0]))["deployment"]["measured"] == settings[0]["deployment"]["measured"]
    digests = [cache_digest(MoeLowering(each)) for each in (one, same, other, none)]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_the_rows_stay_with_a_deployment_that_is_copied(tmp_path):
    path = written(tmp_path, GOOD)
    made = Deployment(measured=path)
    path.unlink()
    assert made.replace(max_tokens=8).measured == made.measured != ()


@pytest.mark.parametrize("value", [-1, True, 2.0])
def test_ranks_per_node_is_a_number(value):
    with pytest.raises(ValueError, match=r"Deployment: ranks_per_node is .*; accepted: "):
        Deployment(ranks_per_node=value)
