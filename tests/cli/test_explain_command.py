"""``moe-lowering explain``: what it reads of models, wrong usage, layout, colour, speed and imports."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_explain import BLOCK, answer, command

from moe_lowering import cli
from moe_lowering.cli.commands import parse
from moe_lowering.cli.explain.command import run_explain
from moe_lowering.cli.explain.request import IMPLEMENTATIONS as COMMAND_IMPLEMENTATIONS
from moe_lowering.cli.explain.table_text import render_table
from moe_lowering.model_configs.presets import PRESETS
from moe_lowering.passes import policy
from moe_lowering.passes.implementations import IMPLEMENTATIONS
from moe_lowering.report.width import WIDTH, use_width
from moe_lowering.vocabulary import VLLM_POLICIES

# --------------------------------------------------------------------------------------------------------------- models


def config_file(tmp_path, **values):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


def test_flags_override_the_models_values(capfd):
    block = answer(capfd, "deepseek_v3 --hidden 4096 --experts 128 --topk 4 --intermediate 512 --dtype float16")[1][
        "block"
    ]
    assert [block[k] for k in ("hidden", "experts", "top_k", "intermediate", "dtype")] == [4096, 128, 4, 512, "float16"]


def test_a_model_without_experts_lends_its_other_sizes(capfd):
    block = answer(capfd, "llama --experts 8 --topk 2")[1]["block"]
    assert [block[k] for k in ("hidden", "intermediate", "experts", "top_k")] == [4096, 11008, 8, 2]


@pytest.mark.parametrize(("model", "sizes", "activation"), [
    ("mixtral", (4096, 14336, 8, 2), "swiglu"),
    ("qwen3_moe", (2048, 768, 128, 8), "swiglu"),
    ("gpt_oss", (2880, 2880, 128, 4), "swiglu_oai"),
    ("deepseek_v4", (4096, 2048, 256, 6), "swiglu_clamp"),
    ("ernie4_5_moe", (2560, 1536, 64, 6), "swiglu"),
    ("longcat_flash", (6144, 2048, 512, 12), "swiglu"),
    ("moe", (7168, 2048, 256, 8), "swiglu"),
])  # fmt: skip
def test_model_types(capfd, model, sizes, activation):
    block = answer(capfd, model)[1]["block"]
    assert tuple(block[k] for k in ("hidden", "intermediate", "experts", "top_k")) == sizes
    assert block["activation"] == activation


def test_a_config_file_of_a_known_type(capfd, tmp_path):
    """What the file leaves out has the type's default."""
    path = config_file(
        tmp_path, model_type="qwen3_moe", hidden_size=1024, num_experts=64, torch_dtype="float16",
        quantization_config={"quant_method": "fp8"},
    )  # fmt: skip
    _, found = answer(capfd, f"{path} --ep 8")
    block = found["block"]
    assert [block[k] for k in ("hidden", "intermediate", "experts", "top_k")] == [1024, 768, 64, 8]
    assert block["dtype"] == "float16"
    assert any("quantization_config (fp8) is not read" in text for text in found["assumptions"])
    assert answer(capfd, f"{path.parent} --ep 8")[1]["block"] == block, "the folder of a checkpoint"


def test_a_config_file_without_experts_has_no_moe_layers(capfd, tmp_path):
    path = config_file(tmp_path, model_type="llama", hidden_size=1024, intermediate_size=512)
    said = f"llama in {path} has no MoE layers (did you mean llama4?); accepted"
    for given in ("explain", "lower"):
        assert cli.main([given, str(path)]) == 2
        assert said in capfd.readouterr().err
    assert command(capfd, f"{path} --experts 8 --topk 2")[0] == 0


def test_a_type_of_no_command_is_sent_to_python(capfd, tmp_path):
    path = config_file(tmp_path, model_type="no_such", hidden_size=1024, intermediate_size=512, num_experts=64, top_k=4,
                       num_experts_per_tok=4)  # fmt: skip
    assumed = answer(capfd, str(path))[1]["assumptions"]
    assert not [text for text in assumed if "moe-lowering lower" in text]
    assert [text for text in assumed if "not checked, transformers does not know this type" in text]
    assert cli.main(["lower", str(path)]) == 2
    where = "lower the model from Python (docs/examples.md)"
    assert capfd.readouterr().err.endswith(f"a type that transformers knows; {where}\n") and assumed[-1].endswith(where)


def test_a_config_file_of_a_type_that_transformers_does_not_know(capfd, tmp_path):
    path = config_file(
        tmp_path, model_type="brand_new", text_config={
            "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 96,
            "num_experts_per_tok": 6, "hidden_act": "silu", "torch_dtype": "bfloat16",
        },
    )  # fmt: skip
    _, found = answer(capfd, f"{path} --ep 8")
    assert [found["block"][k] for k in ("hidden", "intermediate", "experts", "top_k")] == [4096, 1536, 96, 6]
    assert any("'brand_new'" in text for text in found["assumptions"])


# --------------------------------------------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(("given", "message"), [
    ("", "argument MODEL: no model is given: --hidden, --intermediate, --experts, --topk missing; accepted: "),
    ("--hidden 64 --experts 8", "argument MODEL: no model is given: --intermediate, --topk missing; accepted: "),
    ("dots1", "argument MODEL: the config of dots1 does not say all sizes: --experts, --topk missing; accepted: "),
    ("qwen3_mo", r"argument MODEL: is 'qwen3_mo' \(did you mean qwen3_moe"),
    ("/nowhere/config.json", "argument MODEL: /nowhere/config.json is not a readable config.json"),
    (f"{BLOCK} --ep 24", "argument --ep: is 24; accepted: a divisor of the number of experts, 256"),
    (f"{BLOCK} --ep 16 --tp 3", "argument --tp: is 3; accepted: a divisor of --ep, 16"),
    (f"{BLOCK} --tp 2", "argument --tp: is 2; accepted: a divisor of --ep, 1"),
    (f"{BLOCK} --topk 257", "argument --topk: is 257; accepted: 1 to the number of experts, 256"),
    (f"{BLOCK} --why nccl", "argument --why: .*nccl.*allgather.*alltoall.*mc2.*fused_mc2"),
    (f"{BLOCK} --sweep 1..8", r"argument --sweep: is '1..8'; accepted: tokens=LOW..HIGH with 0 <= LOW <= HIGH"),
    (f"{BLOCK} --sweep tokens=8..1", r"argument --sweep: is 'tokens=8..1'; accepted: tokens=LOW..HIGH"),
    (f"{BLOCK} --sweep hidden=1..8", "argument --sweep: is 'hidden=1..8'; accepted: tokens=LOW..HIGH"),
    (f"{BLOCK} --provider vllm_ascend", "argument --provider: is 'vllm_ascend'; accepted: NAME=VERSION"),
    (f"{BLOCK} --provider vllm=1", r"argument --provider: is 'vllm=1'; accepted: NAME=VERSION, .*names: vllm_ascend, cann_ops"),
    (f"{BLOCK} --provider vllm_ascend=new", "argument --provider: is 'vllm_ascend=new'; accepted: NAME=VERSION"),
    (f"{BLOCK} --provider none --provider vllm_ascend=1", "argument --provider: is none and others; accepted: none alone"),
    (f"{BLOCK} --comm nccl", "argument --comm: .*nccl.*auto.*allgather.*alltoall.*mc2.*fused_mc2"),
    (f"{BLOCK} --policy fixed", "argument --policy: is fixed without --comm; accepted: with --comm {allgather,alltoall,"),
    (f"{BLOCK} --policy fixed --comm auto", "argument --policy: is fixed without --comm; accepted: with --comm {allg"),
    (f"{BLOCK} --comm mc2 --policy vllm_ascend_main", "argument --policy: is vllm_ascend_main with --comm mc2, .*: fixed, or"),
    (f"{BLOCK} --cann new", "argument --cann: is 'new'; accepted: a version such as"),
    (f"{BLOCK} --cann 9.x", "argument --cann: is '9.x'; accepted: a version such as 8.5.0 or 8.2.RC1"),
    (f"{BLOCK} --provider vllm_ascend=0.x", "argument --provider: is 'vllm_ascend=0.x'; accepted: NAME=VERSION"),
    (f"{BLOCK} --provider vllm-ascend=0.23.0", r"argument --provider: is 'vllm-ascend=0.23.0' \(did you mean vllm_ascend"),
    (f"{BLOCK} --ep 16,", "argument --ep: is '16,', with nothing beside a comma; accepted: values with commas between"),
    (f"{BLOCK} --quant none,,w8a8", "argument --quant: is 'none,,w8a8', with nothing beside a comma"),
    (f"{BLOCK} --soc ,A2", "argument --soc: is ',A2', with nothing beside a comma"),
    (f"{BLOCK} --tokens 1,", "argument --tokens: is '1,', with nothing beside a comma"),
    (f"{BLOCK} --tp 1,2", r"argument --tp: is '1,2'; accepted: one integer \(only --quant, --soc, --ep and --tokens take lists"),
    (f"{BLOCK} --buffer-mb 1,2", r"argument --buffer-mb: is '1,2'; accepted: one integer \(only"),
    (f"{BLOCK} --fused-mode 0,1", r"argument --fused-mode: is '0,1'; accepted: one of 0, 1, 2 \(only"),
    (f"{BLOCK} --policy auto,fixed", r"argument --policy: is 'auto,fixed'; accepted: one of auto, .* \(only --quant, --soc"),
    (f"{BLOCK} --tokens -1", "argument --tokens: "),
    (f"{BLOCK} --tokens many", "argument --tokens: is 'many'; accepted: T, or LOW..HIGH with 0 <= LOW <= HIGH <= "),
    (f"{BLOCK} --tokens 1-8", "argument --tokens: is '1-8'; accepted: T, or LOW..HIGH with 0 <= LOW <= HIGH <= "),
    (f"{BLOCK} --buffer-mb 0", "argument --buffer-mb: is '0'; accepted: an integer from 1 to"),
    (f"{BLOCK} --soc H100", "argument --soc: .*H100.*A2.*A3.*A5.*310P"),
    (f"{BLOCK} --quant int8", "argument --quant: .*int8.*none.*w8a8.*w4a8.*w4a16"),
    (f"{BLOCK} --policy best", "argument --policy: .*best.*auto.*vllm_ascend_0_13.*vllm_ascend_main"),
    (f"{BLOCK} --dtype int8", "argument --dtype: .*int8.*float32.*float16.*bfloat16"),
    (f"{BLOCK} --weight-format nz16", "argument --weight-format: .*nz16.*nd.*nz"),
    (f"{BLOCK} --color blue", "argument --color: .*blue.*auto.*always.*never"),
    (f"{BLOCK} --unequal-tokens", "argument --max-tokens: is not given, and --unequal-tokens needs it; accepted: 1 or more"),
    (f"{BLOCK} --unequal-tokens --max-tokens 8 --tokens 9", "argument --tokens: is 9; accepted: 1 to --max-tokens, 8"),
    (f"{BLOCK} --unequal-tokens --max-tokens 8 --sweep tokens=0..8", "argument --sweep: starts at 0; accepted"),
    ("gpt_oss --quant w8a8", "argument --quant: is w8a8, and the experts of gpt_oss have biases; accepted: none, as"),
    (f"{BLOCK} --hidde 8", r"argument --hidde: is no option of explain \(did you mean --hidden\?\); accepted: those of moe"),
    (f"{BLOCK} --bufer-mb=8", r"argument --bufer-mb: is no option of explain \(did you mean --buffer-mb\?\); accepted"),
    (f"{BLOCK} --colourless", "argument --colourless: is no option of explain; accepted"),
    (f"{BLOCK} --hidden_size 8", r"argument --hidden_size: is no option of explain \(did you mean --hidden\?\); accepted"),
    (f"{BLOCK} --moe-intermediate-size=8", r"argument --moe-intermediate-size: .*\(did you mean --intermediate\?\); accepted"),
    (f"{BLOCK} --num-experts-per-tok 8", r"argument --num-experts-per-tok: .* \(did you mean --topk\?\); accepted"),
    (f"{BLOCK} --comm MC3", "argument --comm: is 'MC3'; accepted: auto, allgather, "),
    (f"{BLOCK} --html", r"argument --html: is given without a value; accepted: --html FILE \(also write a page"),
    ("qwen3_moe deepseek_v3", "argument MODEL: is given twice, qwen3_moe and 'deepseek_v3'; accepted: one"),
])  # fmt: skip
def test_wrong_usage_is_one_line_and_code_2(capfd, given, message):
    code, out, err = command(capfd, given)
    assert (code, out) == (2, "")
    assert re.match(rf"moe-lowering: error: {message}", err), err
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"text_config": 3}'])
def test_an_unreadable_config_is_wrong_usage(capfd, tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    code, _, err = command(capfd, str(path))
    assert code == 2
    assert err.startswith("moe-lowering: error: argument MODEL: ")
    assert err.count("\n") == 1


def test_an_activation_that_no_block_has_is_wrong_usage(capfd, tmp_path):
    path = config_file(tmp_path, model_type="qwen3_moe", hidden_act="relu2")
    code, _, err = command(capfd, str(path))
    assert code == 2
    assert f"the activation of {path} is relu2, which the pass does not know; accepted: silu" in err


# --------------------------------------------------------------------------------------------------------------- layout

REPORTS = [
    f"{BLOCK} --ep 16 --tokens 600 --dtype float32 --buffer-mb 10",
    "gpt_oss --ep 8 --unequal-tokens --max-tokens 4096",
    f"{BLOCK} --ep 16 --provider none --buffer-mb 200 --sweep tokens=1..8192 --why mc2",
    f"{BLOCK} --soc 310P --quant w4a16 --policy vllm_ascend_main --provider cann_ops_transformer=9.1.0",
    f"{BLOCK} --ep 64 --why fused_mc2 --provider none",
    f"{BLOCK} --ep 16 --comm mc2 --tokens 600 --hierarchy --no-capture",
    f"{BLOCK} --ep 16 --tp 2 --unequal-tokens --max-tokens 600 --no-capture --policy fixed --comm alltoall",
]


@pytest.mark.parametrize("given", REPORTS)
def test_reports_fit_in_100_columns(capfd, given):
    _, out, _ = command(capfd, given)
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert not any(line != line.rstrip() for line in lines), "no blanks at the end of a line"


def test_a_long_path_fits_too(capfd, tmp_path):
    folder = tmp_path / ("a" * 120)
    folder.mkdir()
    _, out, _ = command(capfd, str(config_file(folder, model_type="mixtral")))
    assert max(map(len, out.splitlines())) <= 100


def test_no_colour_unless_on_a_terminal_or_asked(capfd, monkeypatch):
    given = f"{BLOCK} --ep 64"
    plain = command(capfd, given)[1]
    assert "\033" not in plain
    assert command(capfd, f"{given} --color never")[1] == plain
    painted = command(capfd, f"{given} --color always")[1]
    assert "\033[31m" in painted
    assert re.sub(r"\033\[\d+m", "", painted) == plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033" in command(capfd, given)[1]
    assert "\033" not in command(capfd, f"{given} --json")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert command(capfd, given)[1] == plain


def test_the_report_says_it_all(capfd):
    _, out, _ = command(capfd, f"{BLOCK} --ep 16 --tokens 128 --buffer-mb 200")
    for text in (
        "MoE block on A3: 128 tokens on a rank",
        "\n  hidden 7168, intermediate 2048, 256 experts, top 8, layers unknown, bfloat16\n",
        "16 experts on a rank, swiglu, routing weights in float32",
        "EP 16, TP 1, HCCL_BUFFSIZE 200 MB",
        "not mc2           [mc2.buffer]",
        "sources of the broken rules\n  source 1          op-plugin",
        "choice            fused_mc2 (cheapest at 128 tokens",
        "vllm_ascend 0.23.0 is installed",
    ):
        assert text in re.sub(r",\s+", ", ", out)
    assert re.search(r"^  allgather +legal +\d+ \+- \d+ us$", out, re.M)
    assert re.search(r"^  mc2 +refused: 1 rule +\d+ \+- \d+ us$", out, re.M)
    assert re.search(r"^  fused_mc2 +legal, dispatch_ffn_combine +\d+ \+- \d+ us  chosen$", out, re.M)
    assert "sizes T = 128; a rank receives up to 16384 rows; max_output_size 16384" in (re.sub(r"\s+", " ", out))
    _, with_tp, _ = command(capfd, f"{BLOCK} --ep 16 --tp 2 --tokens 127")
    assert "sizes T = 127; capacity 64 on each of 2 TP ranks; a rank receives" in re.sub(r"\s+", " ", with_tp)
    assert " ".join(out.split()).count("of HCCL_BUFFSIZE a MB is 2**20 bytes") == 1
    # 2 * 128 * 8 * 7168 bytes are 14 MB, in a third of 200 MB
    assert "[fused.window] HCCL_BUFFSIZE of 42 MB would do; it is 200 MB" in re.sub(r"\s+", " ", out)
    # of the fields that mc2.buffer names
    named = (
        "options Deployment.hccl_buffer_mb is --buffer-mb, Deployment.max_tokens is --max-tokens (T itself is --tokens)"
    )
    assert " ".join(out.split()).endswith(named)
    assert "[mc2.buffer] npu_moe_distribute_dispatch_v2: needs 960 MB of HCCL window, HCCL_BUFFSIZE is 200 MB (set" in (
        re.sub(r"\s+", " ", out)
    )


def test_the_page_shows_what_the_command_prints(capfd):
    page = (Path(__file__).parents[2] / "docs/commands.md").read_text()
    given = re.search(r"moe-lowering explain (.*--sweep \S+)", page)[1]
    printed = command(capfd, given)[1].split("ends because of\n")[1].split("\n\n")[0]
    assert re.sub(r"\s+", " ", printed) in re.sub(r"\s+", " ", page)


# ------------------------------------------------------------------------------------------------- names, speed, imports


def test_names_are_those_of_the_pass():
    assert tuple(IMPLEMENTATIONS) == COMMAND_IMPLEMENTATIONS
    assert set(policy._CHOOSERS) == set(VLLM_POLICIES)
    assert WIDTH == 100


def test_a_description_takes_milliseconds_and_no_transformers():
    code = f"""
import sys, time
from moe_lowering import cli
import moe_lowering.cli.explain.command
started = time.process_time()
assert cli.main("explain {BLOCK} --ep 16 --sweep tokens=1..8192".split()) == 0
assert time.process_time() - started < 0.8, time.process_time() - started
assert not {{"transformers", "torch_npu", "torch._dynamo"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_models_config_is_read_without_building_anything():
    """transformers' configs alone: neither torch._dynamo nor a model's code. The limit leaves a slow core room."""
    code = """
import sys, time
import transformers, transformers.models
from moe_lowering import cli
import moe_lowering.cli.explain.command
started = time.process_time()
assert cli.main("explain deepseek_v3 --ep 16 --tokens 128".split()) == 0
assert time.process_time() - started < 1.0, time.process_time() - started
loaded = {"torch_npu", "torch._dynamo", "moe_lowering.layers", "transformers.models.deepseek_v3.modeling_deepseek_v3"}
assert not loaded & sys.modules.keys(), loaded & sys.modules.keys()
"""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr


def test_help_needs_no_torch(capfd):
    started = time.perf_counter()
    code = (
        "import sys; from moe_lowering import cli\n"
        "try: cli.main(['explain', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--sweep tokens=LOW..HIGH" in done.stdout
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    "given", [f"{BLOCK} --ep 16 --tokens 600 --comm mc2", "moe", "qwen3_30b --ep 8 --sweep tokens=1..64"]
)
def test_an_explanation_prints_itself_as_the_command_prints_it(given, capfd):
    explanation = run_explain(parse(["explain", *given.split()])).explanation
    printed = command(capfd, f"{given} --color never")[1]
    assert f"{explanation}\n" == printed.partition("\n  options  ")[0].rstrip() + "\n"
    for record in (explanation, explanation.answer):
        assert len(repr(record)) < 120 and (explanation.answer.choice or "NONE") in repr(record)


@pytest.mark.parametrize(
    ("model", "layers"),
    [("moe", "1 MoE layer"), ("deepseek_v3", "58 MoE layers"), *((name, "MoE layers") for name in PRESETS)],
)
def test_the_head_says_all_sizes_on_one_line(model, layers, monkeypatch):
    """Those of its config, whatever the command says; of several deployments too."""
    monkeypatch.setenv("COLUMNS", "80")
    explanation = run_explain(parse(["explain", model])).explanation
    block = explanation.block
    sizes = rf"  hidden {block.hidden}, intermediate {block.intermediate}, {block.experts} experts, top {block.top_k}, "
    with use_width(80):
        heads = str(explanation).splitlines(), render_table(explanation, ()).splitlines()
    for head in heads:
        assert re.fullmatch(rf"{sizes}[\d ]*{layers}, bfloat16", head[1]) and len(head[1]) <= 80
    changed = run_explain(parse(["explain", model, "--hidden", "512", "--dtype", "float16"])).explanation
    assert "  hidden 512, " in str(changed) and ", float16\n" in str(changed)


def test_a_layer_of_ours_without_sizes_says_whose_they_are(capfd):
    assert "moe is one layer of this package, of the sizes of DeepSeek-V3's" in " ".join(
        command(capfd, "moe")[1].split()
    )
    assert "layers unknown" in command(capfd, BLOCK)[1]
