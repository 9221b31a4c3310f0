"""``moe-lowering explain --why``: every rule of one implementation, those that decide first."""

import re

import pytest
from test_explain import BLOCK, ROOMY, answer, codes, command

from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.vocabulary import SOCS


def test_why_lists_what_holds_and_what_does_not(capfd):
    _, found = answer(capfd, f"{BLOCK} --ep 64 --why fused_mc2 {ROOMY}")
    why = found["why"]
    assert (why["implementation"], why["legal"]) == ("fused_mc2", False)
    rules = {rule["code"]: rule for rule in why["rules"]}
    assert rules["fused.ep_size"]["holds"] is False
    assert rules["fused.ep_size"]["value"] == 64
    source = rules["fused.tokens"].pop("sources")[0]  # of vllm-ascend's main branch; the rest is why not more
    assert source["key"] == "vllm_ascend.forward_context" and source["link"].startswith(
        "https://github.com/vllm-project/"
    )
    assert rules["fused.tokens"] | {"source": ""} == {
        "code": "fused.tokens", "operator": "dispatch_ffn_combine", "holds": True, "expression": "tokens", "value": 32,
        "limit": {"min": 1, "max": 512}, "accepted": "1 to 512", "source": "",
    }  # fmt: skip
    assert all(rule["source"] for rule in why["rules"])
    broken = {rule["code"] for rule in why["rules"] if not rule["holds"]}
    assert broken == codes(found)["fused_mc2"]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_why_of_a_legal_implementation_has_no_broken_rule(capfd, name):
    code, out, _ = command(capfd, f"{BLOCK} --ep 16 {ROOMY} --why {name}")
    assert code == 0
    assert f"why {name} is legal" in out
    assert "BROKEN" not in out
    held = re.findall(r"^    holds   \[([a-z_0-9]+\.[a-z_0-9]+)\] ", out, re.M)
    assert len(held) > 15
    assert len(held) == len(re.findall(r"^ +source: \S", out, re.M))


def test_why_of_a_refused_implementation_in_words(capfd):
    _, out, _ = command(capfd, "gpt_oss --ep 8 --why fused_mc2")
    assert re.search(
        r"BROKEN +\[fused\.bias\] has_bias is True; accepted: False\n +dispatch_ffn_combine: the experts", out
    )
    assert "holds   [fused.ep_size] ep_size is 8; accepted: 2 to 32" in out


def test_why_leads_with_what_decides(capfd):
    """The broken rules, or those nearest to their limits, stand before all else; what cannot be broken here is named only."""
    _, out, _ = command(capfd, f"{BLOCK} --ep 64 --why fused_mc2 {ROOMY}")
    head, _, rest = out.partition("  implementation ")
    assert re.search(r"why fused_mc2 is refused: 1 of its \d+ rules is broken\n +BROKEN +\[fused.ep_size\]", head)
    assert "BROKEN" not in rest and "holds  " not in head
    _, out, _ = command(capfd, f"{BLOCK} --ep 16 --tokens 128 --why mc2")
    head, _, rest = out.partition("  implementation ")
    assert "BROKEN" not in out and "holds  " not in head
    # 128 * 7,860,224 bytes of 2**30 (test_explain's own sum above), and 7168 of 8192
    near = " ".join(head[head.index("nearest limits") :].split())
    assert "[mc2.buffer] value is 1006108672 of at most 1073741824 (buffer_bytes) bytes of HCCL window (94%)" in near
    assert "[mc2.hidden] hidden is 7168 of at most 8192 (88%)" in near and near.index("94%") < near.index("88%")
    assert rest.index("[mc2.soc]") < rest.index("any block") < rest.index("[deployment.ep_size]")
    assert "ep_size is 16; accepted: 16" not in out, "the deployment is not compared with itself"


def test_why_can_be_read(capfd):
    """No list of one, no word that is not there, and no value compared with itself."""
    _, out, _ = command(capfd, f"{BLOCK} --ep 16 --why mc2")
    text = " ".join(out.split())
    assert '[mc2.comm_alg] comm_alg is ""; accepted: one of "", fullmesh_v1' in text
    assert "hierarchy is False; accepted: False" in text or "accepted: False source" in text
    assert not re.search(r"one of (?:False|True|A3) | is ;|one of ,", text)
    _, out, _ = command(
        capfd, f"{BLOCK} --ep 16 --quant w8a8 --provider vllm_ascend=0.24.0 --fused-mode 2 --why fused_mc2"
    )
    assert "[fused_decode.removed] never legal there" in " ".join(out.split()) and "False is False" not in out


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_why_of_what_cannot_be_there_at_all(capfd, name, soc):
    """A verdict that is about the SoC or about one rank has no more than that; the rules that are broken beside it are told all
    the same."""
    for ep in (1, 16):
        code, out, err = command(capfd, f"{BLOCK} --ep {ep} --soc {soc} --why {name}")
        assert code in (0, 1) and f"why {name} is " in out and "Traceback" not in err
        broken = re.findall(r"^    BROKEN  \[([a-z_0-9]+\.[a-z_0-9]+)\]", out, re.M)
        found = answer(capfd, f"{BLOCK} --ep {ep} --soc {soc} --why {name}")[1]["why"]
        assert set(broken) == {rule["code"] for rule in found["rules"] if not rule["holds"]}
        assert bool(broken) != found["legal"]
