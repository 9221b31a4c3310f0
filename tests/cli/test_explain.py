"""``moe-lowering explain``: verdict tables, choices and JSON; --why: test_explain_why.py; sweeps:
test_explain_sweeps.py; the command itself: test_explain_command.py.

Expected codes are written by hand from the operators' sources, not from the code.
Sources: vllm_ascend.ffn_tiling, vllm_ascend.ffn_kernel, ops_transformer.dispatch, op_plugin.dispatch.
"""

import json
import re

import pytest
from json_schema import problems

from moe_lowering import cli
from moe_lowering.cli.commands import parse
from moe_lowering.cli.explain.command import run_explain
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.report.schemas import schema

# DeepSeek-V3's MoE layer
BLOCK = "--hidden 7168 --intermediate 2048 --experts 256 --topk 8"
ROOMY = "--buffer-mb 6140"


def command(capfd, given):
    """(exit code, stdout, stderr)."""
    code = cli.main(["explain", *given.split()])
    return (code, *capfd.readouterr())


def answer(capfd, given):
    """(exit code, the JSON object)."""
    code, out, _ = command(capfd, f"{given} --json")
    found = json.loads(out)
    assert not problems(found, schema("explain_table" if "rows" in found else "explain"))
    return code, found


def codes(found):
    """Codes of broken rules by implementation."""
    return {name: {v["code"] for v in verdict["violations"]} for name, verdict in found["verdicts"].items()}


# ------------------------------------------------------------------------------------------------------------ verdicts

# (command, codes of mc2, codes of fused_mc2); AllGather is legal in all of them
VERDICTS = [
    # one rank: MC2 from 2 ranks on; the fused operator from 2 to 32
    (f"{BLOCK}", {"mc2.ep_size"}, {"fused.ep_size"}),
    (f"{BLOCK} --ep 16 {ROOMY}", set(), set()),
    (f"{BLOCK} --ep 32 {ROOMY}", set(), set()),
    (f"{BLOCK} --ep 64 {ROOMY}", set(), {"fused.ep_size"}),
    # 512 tokens on a rank are the most for both on A3
    (f"{BLOCK} --ep 16 --tokens 512 {ROOMY}", set(), set()),
    (f"{BLOCK} --ep 16 --tokens 513 {ROOMY}", {"mc2.tokens"}, {"fused.tokens"}),
    (f"{BLOCK} --ep 16 --tokens 0 {ROOMY}", {"mc2.tokens"}, {"fused.tokens", "fused.receive_bound"}),
    # MC2's window: 2 * (16 * T * 16 * align(14336 + 64, 512) + (8 + 1) * T * 14336) = 7,860,224 T bytes, 959.5 MB at 128
    (f"{BLOCK} --ep 16 --tokens 128 --buffer-mb 960", set(), set()),
    (f"{BLOCK} --ep 16 --tokens 128 --buffer-mb 959", {"mc2.buffer"}, set()),
    # the fused operator's: 2 * T * 8 * 7168 in a third of the window: 168 MB at 512
    (f"{BLOCK} --ep 16 --tokens 512 --buffer-mb 168", {"mc2.buffer"}, set()),
    (f"{BLOCK} --ep 16 --tokens 512 --buffer-mb 167", {"mc2.buffer"}, {"fused.window"}),
    (f"{BLOCK} --ep 16 --buffer-mb 6141", set(), {"fused.window_offset"}),
    # float32 is for AllGather alone
    (f"{BLOCK} --ep 16 {ROOMY} --dtype float32", {"mc2.x_dtype"}, {"fused.x_dtype"}),
    # the fused operator reads FRACTAL_NZ
    (f"{BLOCK} --ep 16 {ROOMY} --weight-format nd", set(), {"fused.weight_format"}),
    # A2: 256 tokens, EP sizes from a list; no fused operator
    (f"{BLOCK} --soc A2 --ep 16 --tokens 256 {ROOMY}", set(), {"fused.soc"}),
    (f"{BLOCK} --soc A2 --ep 16 --tokens 257 {ROOMY}", {"mc2.tokens"}, {"fused.soc"}),
    (
        f"--hidden 4096 --intermediate 1024 --experts 72 --topk 6 --soc A2 --ep 9 {ROOMY}",
        {"mc2.ep_size"},
        {"fused.soc"},
    ),
    # A5: MC2 as on A3; no fused operator, so that its other limits do not count
    (f"{BLOCK} --soc A5 --ep 64 --tokens 512 {ROOMY}", set(), {"fused.soc"}),
    (f"{BLOCK} --soc A5 --ep 32 --tokens 512 {ROOMY}", set(), {"fused.soc"}),
    # H: MC2 on A3 takes 1024 to 8192
    (f"--hidden 896 --intermediate 512 --experts 64 --topk 6 --ep 8 {ROOMY}", {"mc2.hidden"}, set()),
    (f"--hidden 8224 --intermediate 512 --experts 64 --topk 6 --ep 8 {ROOMY}", {"mc2.hidden"}, set()),
    # 17 experts a token, 1032 experts
    (f"--hidden 1024 --intermediate 512 --experts 64 --topk 17 --ep 8 {ROOMY}", {"mc2.top_k"}, set()),
    (f"--hidden 1024 --intermediate 512 --experts 1032 --topk 4 --ep 8 {ROOMY}", {"mc2.experts"}, set()),
    # models: Mixtral's 8 experts make 1 a rank at EP 8 and 2 at EP 4, where the 16-bit kernel goes wrong; they are 14336 wide
    (f"mixtral --ep 2 {ROOMY}", set(), {"fused.width_max"}),
    (f"mixtral --ep 2 --intermediate 4096 {ROOMY}", set(), set()),
    (f"mixtral --ep 8 {ROOMY}", set(), {"fused.local_experts", "fused.width_max"}),
    (f"mixtral --ep 4 {ROOMY}", set(), {"fused.local_experts", "fused.width_max"}),
    # gpt-oss: clamped SwiGLU, alternating columns, biases
    (f"gpt_oss --ep 8 {ROOMY}", set(), {"fused.activation", "fused.gate_order", "fused.bias"}),
    (f"deepseek_v3 --ep 16 {ROOMY}", set(), set()),
    (f"qwen3_moe --ep 16 {ROOMY}", set(), set()),
    (f"qwen3_moe --soc A2 --ep 12 --experts 120 {ROOMY}", {"mc2.ep_size"}, {"fused.soc"}),
]


@pytest.mark.parametrize(("given", "mc2", "fused"), VERDICTS, ids=[given for given, _, _ in VERDICTS])
def test_verdicts(capfd, given, mc2, fused):
    code, found = answer(capfd, given)
    assert code == 0
    table = codes(found)
    assert table["allgather"] == set()
    assert table["mc2"] == mc2
    assert table["fused_mc2"] == fused
    assert {name for name, v in found["verdicts"].items() if v["legal"]} == {n for n, c in table.items() if not c}


@pytest.mark.parametrize(("given", "everywhere"), [
    (f"{BLOCK} --ep 16 --tokens 65 --max-tokens 64 {ROOMY}", "deployment.max_tokens"),
])  # fmt: skip
def test_where_nothing_is_legal_the_verdicts_are_printed_and_the_code_is_1(capfd, given, everywhere):
    code, found = answer(capfd, given)
    assert code == 1
    assert found["choice"] is None
    assert all(everywhere in found for found in codes(found).values())
    code, out, err = command(capfd, given)
    assert code == 1
    assert f"[{everywhere}]" in out
    assert err == "moe-lowering: no implementation is legal\n"


def test_310p_has_neither_mc2_nor_the_fused_operator(capfd):
    code, found = answer(capfd, f"{BLOCK} --ep 16 --soc 310P --dtype float16")
    assert code == 1
    table = codes(found)
    assert "mc2.soc" in table["mc2"]
    assert "fused.soc" in table["fused_mc2"]
    assert "allgather.soc" in table["allgather"]


def test_providers_are_assumed_named_or_none(capfd):
    assert "fused.provider" in codes(answer(capfd, f"{BLOCK} --ep 16 --provider none")[1])["fused_mc2"]
    assert (
        "mega_moe.weight_list"
        in codes(answer(capfd, f"{BLOCK} --ep 16 --provider cann_ops_transformer=9.1.0")[1])["fused_mc2"]
    )
    given = answer(capfd, f"{BLOCK} --ep 16 --provider vllm_ascend=0.23.0")[1]
    assert given["verdicts"]["fused_mc2"]["legal"]
    assert not any("vllm_ascend" in text for text in given["assumptions"])


def test_verdicts_are_those_of_the_pass():
    """The same block traced from a model, with the deployment that ``explain`` makes."""
    import torch

    from moe_lowering import MoE, testing

    for options, fields in (("--tokens 600", {}), ("--dtype float32", {}), ("--buffer-mb 10", {"hccl_buffer_mb": 10})):
        request = parse(f"explain --hidden 1024 --intermediate 512 --experts 64 --topk 4 --ep 8 {options}".split())
        described = run_explain(request).explanation.answer.judgement.verdicts
        dtype = torch.float32 if request.dtype else torch.bfloat16
        with testing.fake_deployment(ep_size=8, **fields) as deployment:
            with testing.fake_tensors():
                model = MoE(1024, 512, 64, 4, deployment=deployment, dtype=dtype)
                x = torch.empty(request.tokens or 32, 1024, dtype=dtype)
            traced = testing.lower_graph(model, x, deployment=deployment).report.blocks[0].verdicts
        for name in IMPLEMENTATIONS:
            broken = {v.code for v in described[name].violations}
            assert broken == {v.code for v in traced[name].violations} - {"deployment.torch_npu"}


# ----------------------------------------------------------------------------------------------------- choice, policies


def test_policies_choose_as_vllm_ascend_does(capfd):
    """§1.2: A3 up to 32 ranks fuses when the operator is there, else MC2 up to the capacity of 512 tokens."""
    main = f"{BLOCK} --ep 16 {ROOMY} --policy vllm_ascend_main"
    assert answer(capfd, main)[1]["choice"] == "fused_mc2"
    plain = answer(capfd, f"{main} --provider none")[1]
    assert (plain["choice"], plain["policy"]["selects"]) == ("mc2", "mc2")
    above = answer(capfd, f"{main} --provider none --tokens 513")[1]
    assert (above["choice"], above["policy"]["selects"]) == ("alltoall", "alltoall")
    # §1.2: A2 wants at most 24 experts a rank and 16 ranks
    assert answer(capfd, f"{BLOCK} --soc A2 --ep 16 {ROOMY} --policy vllm_ascend_main")[1]["choice"] == "mc2"
    assert answer(capfd, f"{BLOCK} --soc A2 --ep 8 {ROOMY} --policy vllm_ascend_main")[1]["choice"] == "allgather"


@pytest.mark.parametrize(("quantisation", "selects"), [("none", "mc2"), ("w8a8", "fused_mc2"), ("w4a8", "mc2")])
def test_the_rule_of_0_13_reads_the_quantisation(capfd, quantisation, selects):
    """§1.1: the fused operator is for w8a8_dynamic alone."""
    given = f"{BLOCK} --ep 16 {ROOMY} --policy vllm_ascend_0_13 --quant {quantisation}"
    assert answer(capfd, given)[1]["policy"] == {"name": "vllm_ascend_0_13", "selects": selects}


def test_with_unequal_token_counts_the_declared_bound_decides(capfd):
    unequal = f"{BLOCK} --ep 16 {ROOMY} --unequal-tokens"
    few = answer(capfd, f"{unequal} --max-tokens 512 --tokens 1")[1]
    many = answer(capfd, f"{unequal} --max-tokens 512 --tokens 512")[1]
    assert few["choice"] == many["choice"] == "fused_mc2"
    assert few["verdicts"] == many["verdicts"]
    above = answer(capfd, f"{unequal} --max-tokens 513 --tokens 1")[1]
    assert above["choice"] == "allgather"
    assert "mc2.tokens" in codes(above)["mc2"]


@pytest.mark.parametrize("policy", ["", "--policy fixed", "--policy auto"])
def test_comm_chooses_that_one_or_none(capfd, policy):
    """As MoeLowering(comm="mc2"): every verdict is there, and none but the asked one is chosen."""
    code, found = answer(capfd, f"{BLOCK} --ep 16 {ROOMY} --comm mc2 {policy}")
    assert (code, found["choice"], found["reason"]) == (0, "mc2", "mc2 was asked for and is legal")
    assert found["policy"] == {"name": "fixed", "selects": "mc2"}
    assert found["verdicts"]["fused_mc2"]["legal"], "which would be cheaper"
    code, found = answer(capfd, f"{BLOCK} --ep 16 {ROOMY} --tokens 513 --comm mc2 {policy}")
    assert (code, found["choice"]) == (1, None)
    assert found["reason"] == "mc2 was asked for and is not legal: [mc2.tokens]"
    assert found["verdicts"]["allgather"]["legal"] and found["sizes"] is None


def test_the_head_says_what_was_asked_for(capfd):
    """A size or dtype that is not the model's stands in the title; --comm is no policy that is fixed."""
    _, out, _ = command(capfd, "deepseek_v3 --ep 16 --hidden 4096 --experts 256 --dtype float16")
    title = " ".join(out.partition("\n  hidden")[0].split())
    assert title == (
        "deepseek_v3 with hidden 4096 in place of 7168, dtype float16 in place of bfloat16 on A3: 32 tokens on a rank"
    )
    _, out, _ = command(capfd, "deepseek_v3 --ep 8,16 --topk 4")
    assert out.startswith("deepseek_v3 with top_k 4 in place of 8 in several deployments\n")
    for as_it_is in ("deepseek_v3 --hidden 7168 --dtype bfloat16", "qwen3_moe --dtype float16", "moe --hidden 1024"):
        assert f"{as_it_is.split()[0]} on A3: " in command(capfd, f"{as_it_is} --ep 16")[1]
    head = " ".join(command(capfd, f"{BLOCK} --ep 16 --comm fused_mc2 --provider none")[1].split())
    assert "no provider, fused_mc2 asked for " in head and "policy" not in head and "[fused.provider]" in head
    strict = command(capfd, f"{BLOCK} --ep 16 --comm fused_mc2 --provider none --policy fixed")[1]
    assert "fused_mc2 asked for, and nothing else" in " ".join(strict.split())


def test_comm_shows_the_rules_of_that_one(capfd):
    code, out, err = command(capfd, f"{BLOCK} --ep 16 {ROOMY} --tokens 513 --comm mc2")
    assert code == 1 and err == "moe-lowering: mc2 was asked for and is not legal: [mc2.tokens]\n"
    assert "not mc2 " in out and "[mc2.tokens]" in out and "mc2 asked for" in re.sub(r"\s+", " ", out)
    assert "not fused_mc2     [fused.tokens] (--why fused_mc2 says it in full)" in out, (
        "the others by their codes alone"
    )
    out = " ".join(command(capfd, f"{BLOCK} --ep 64 --tokens 600 --comm mc2")[1].split())
    priced = "nothing is chosen; what is legal would take allgather:"
    assert priced in out and priced not in " ".join(command(capfd, f"{BLOCK} --ep 64 --comm mc2")[1].split())
    assert "[fused.ep_size], [fused.tokens] (--why fused_mc2 says them in full)" in out
    assert (
        out.count("[fused.tokens]") == 1 and "[fused." not in command(capfd, f"{BLOCK} --ep 16 {ROOMY} --comm mc2")[1]
    )


def test_without_a_provider_that_is_said_first(capfd):
    """Rules for versions of what is not there come after it."""
    _, out, _ = command(capfd, "qwen3_30b --ep 16 --provider none")
    broken = out.split("not fused_mc2")[1].split("assumed")[0]
    assert re.findall(r"\[(fused\.\w+)\]", broken) == ["fused.provider", "fused.variant", "fused.local_experts_padding"]
    assert "(a rule for vllm_ascend<0.18); weight_dtype is bfloat16; accepted: int8 (use" in " ".join(broken.split())


def test_without_capture_alltoall_sends_what_there_is(capfd):
    given = f"{BLOCK} --ep 16 --comm alltoall"
    assert answer(capfd, f"{given} --no-capture")[1]["verdicts"]["alltoall"]["form"] == "exact"
    for captured in ("", "--capture"):
        assert answer(capfd, f"{given} {captured}")[1]["verdicts"]["alltoall"]["form"] == "static"
    deployment = answer(capfd, f"{given} --no-capture")[1]["deployment"]
    assert deployment["capture"] is False
    assert re.search(
        r"^  alltoall +legal, exact +\d+ \+- \d+ us  chosen$", command(capfd, f"{given} --no-capture")[1], re.M
    )


def test_two_levels_have_their_own_window(capfd):
    """OP: the window of A2 in two levels is another sum than that of A2 in one, and no fused operator knows them."""
    one, two = (answer(capfd, f"{BLOCK} --soc A2 --ep 16 --comm mc2 {given}")[1] for given in ("", "--hierarchy"))
    assert (one["deployment"]["mc2_hierarchy"], two["deployment"]["mc2_hierarchy"]) == (False, True)
    windows = [found["sizes"]["windows"][0]["needed"]["value"] for found in (one, two)]
    assert windows[0] != windows[1]
    broken = [codes(answer(capfd, f"{BLOCK} --ep 16 {ROOMY} {given}")[1])["fused_mc2"] for given in ("", "--hierarchy")]
    assert broken[0] == set() and broken[1] != set()


def test_the_shown_window_is_what_the_limit_is_on(capfd):
    """7,860,224 T bytes, as in the sweep below."""
    sizes = answer(capfd, f"{BLOCK} --ep 16 --tokens 128 --comm mc2")[1]["sizes"]
    (window,) = sizes["windows"]
    assert window == {
        "code": "mc2.buffer", "needed": {"value": 128 * 7860224, "most": 128 * 7860224}, "accepted": 2**30,
        "unit": "bytes of HCCL window", "needed_mb": 960,
    }  # fmt: skip
    assert (sizes["capacity"]["value"], sizes["received"]["value"], sizes["range"]) == (128, 16384, "T = 128")


def test_declared_token_counts_are_called_t(capfd):
    given = f"{BLOCK} --ep 16 --tp 2 {ROOMY} --unequal-tokens --max-tokens 1100"
    _, out, _ = command(capfd, f"{given} --why mc2")
    assert "[mc2.tokens] tokens is ((T + 1)//2); accepted: 1 to 512" in re.sub(r"\s+", " ", out)
    assert not re.search(r"\b[su]\d+\b", out)
    violation = answer(capfd, given)[1]["verdicts"]["mc2"]["violations"][0]
    assert violation["message"].endswith("accepted: 1 to 512; the deployment declares 1 <= T <= 1100")


# --------------------------------------------------------------------------------------------------------------- JSON


def test_json_keys(capfd):
    _, found = answer(capfd, "deepseek_v3 --ep 16 --tokens 128 --cann 8.5.0 --why mc2 --sweep tokens=1..64")
    assert found.keys() == {
        "model", "block", "deployment", "policy", "assumptions", "choice", "reason", "sizes", "costs", "verdicts", "sweep",
        "memory", "beside", "why", "changes", "schema_version",
    }  # fmt: skip
    assert found["model"] == "deepseek_v3"
    assert found["block"] == {
        "hidden": 7168, "intermediate": 2048, "experts": 256, "local_experts": 16, "top_k": 8, "activation": "swiglu",
        "interleaved": False, "has_bias": False, "quantisation": "none", "tokens": 128, "dtype": "bfloat16",
        "routing_dtype": "float32",
    }  # fmt: skip
    deployment = found["deployment"]
    assert (deployment["soc"], deployment["ep_size"], deployment["cann"]) == ("A3", 16, "8.5.0")
    assert deployment["providers"] == {"vllm_ascend": "0.23.0"}
    assert found["verdicts"].keys() == IMPLEMENTATIONS.keys()
    for verdict in found["verdicts"].values():
        assert verdict.keys() == {"legal", "form", "cost_us", "cost_error_us", "violations"}
        assert verdict["cost_us"] > verdict["cost_error_us"] > 0
    (buffer, *_) = [v for v in found["verdicts"]["mc2"]["violations"] if v["code"] == "mc2.buffer"] or [None]
    assert buffer is None, "1024 MB hold 128 tokens"
    violation = answer(capfd, "deepseek_v3 --ep 16 --tokens 137")[1]["verdicts"]["mc2"]["violations"][0]
    assert violation.keys() == {
        "code", "message", "operator", "quantity", "limit", "accepted", "value", "source", "sources", "advice", "buffer",
    }  # fmt: skip
    assert violation["value"] == 137 * 7860224
    assert violation["limit"] == {"max": 1024 * 2**20, "unit": "bytes of HCCL window"}
    assert violation["buffer"] == {"buffer_mb": 1024, "needed_mb": 1027}
    assert found["sweep"][0].keys() == {"from", "to", "choice", "boundary", "because"}
    assert found["why"].keys() == {"implementation", "legal", "rules"}


def test_without_sweep_and_why_their_keys_are_absent(capfd):
    assert not {"sweep", "why"} & answer(capfd, BLOCK)[1].keys()
