"""Wrong usage of every command: one line that names the value and what is accepted, exit code 2, and nothing is started."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lowering import cli
from moe_lowering.model_configs import values as config_values
from moe_lowering.model_configs.check import LARGEST, NAMES, OTHER_SIZES, check_values
from moe_lowering.model_configs.errors import ModelError

# What a config.json may hold, by what is wrong with it.
FILES = {
    "list.json": [],
    "number.json": 5,
    "type_list.json": {"model_type": ["qwen3_moe"]},
    "type_object.json": {"model_type": {"a": 1}},
    "type_number.json": {"model_type": 3},
    "type_unknown.json": {"model_type": "no_such_type"},
    "text.json": {"model_type": "qwen3_moe", "text_config": 5},
    "topk.json": {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 9},
    "heads.json": {"model_type": "qwen3_moe", "num_attention_heads": 8, "num_key_value_heads": 3},
}
RAW = {
    "empty.json": b"",
    "half.json": b'{"model_type": ',
    "binary.json": bytes(range(256)),
    "nested.json": b"[" * 100_000 + b"]" * 100_000,
    "digits.json": b'{"model_type": "qwen3_moe", "hidden_size": ' + b"9" * 5000 + b"}",
    "infinite.json": b'{"model_type": "qwen3_moe", "hidden_size": 1e400}',
}
NO_SIZES = (0, -5, 1.5, True, "64", {}, 2**31)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("configs")
    for name, values in FILES.items():
        (made / name).write_text(json.dumps(values))
    for name, raw in RAW.items():
        (made / name).write_bytes(raw)
    (made / "without").mkdir()
    return made


def transformers_folder() -> str:
    found = importlib.util.find_spec("transformers")
    return found.submodule_search_locations[0]


def refused(capfd, *given: str) -> str:
    """The one line of a command that is wrong."""
    capfd.readouterr()
    assert cli.main(list(given)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("moe-lowering: error: ") and err.count("\n") == 1, err
    assert "accepted: " in err or "required: " in err, err
    assert len(err) < 1200, len(err)
    return err


@pytest.mark.parametrize("command", ["lower", "explain"])
@pytest.mark.parametrize("name", [*FILES, *RAW, "without", "missing.json"])
def test_files(command, name, folder, capfd):
    if command == "explain" and name in ("type_unknown.json",):  # its sizes would do: it has none
        assert "missing" in refused(capfd, command, str(folder / name))
        return
    assert "argument MODEL: " in refused(capfd, command, str(folder / name))


@pytest.mark.parametrize("command", ["lower", "explain"])
@pytest.mark.parametrize("value", NO_SIZES, ids=repr)
@pytest.mark.parametrize("name", ["hidden_size", "moe_intermediate_size", "num_experts_per_tok", "num_attention_heads"])
def test_sizes(command, name, value, tmp_path, capfd):
    """Also where the model has another attribute that would be taken in its place."""
    if value == 0 and value is not True and name in NAMES["top_k"]:
        value = -1  # 0 says that a model has no experts
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen3_moe", "intermediate_size": 64, name: value}))
    line = refused(capfd, command, str(path))
    assert name in line and str(LARGEST) in line


def test_every_size_is_checked(tmp_path, capfd):
    for name in (*(name for names in NAMES.values() for name in names), *OTHER_SIZES):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": "qwen3_moe", "text_config": {name: -5}}))
        assert f"{name} in " in refused(capfd, "explain", str(path))


# Of one config.json each, with 8 experts: what is wrong, and the same with one thing changed.
VALUES = [
    ({"hidden_act": "silo"}, {"hidden_act": "silu"}),
    ({"hidden_act": 3}, {"hidden_act": None}),
    ({"hidden_activation": ["silu"]}, {"hidden_activation": "silu"}),
    ({"rope_scaling": "yarn"}, {"rope_scaling": None}),
    ({"rope_parameters": []}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ({"torch_dtype": "float15"}, {"torch_dtype": "float16"}),
    ({"dtype": 16}, {"dtype": "bfloat16"}),
    ({"n_group": 3}, {"n_group": 2}),
    ({"n_group": -1}, {"n_group": 0}),
    ({"n_group": 2, "topk_group": 3}, {"n_group": 2, "topk_group": 2}),
    ({"n_group": 2, "topk_group": "1"}, {"n_group": 2, "topk_group": 1}),
    ({"norm_topk_prob": "yes"}, {"norm_topk_prob": True}),
    ({"rms_norm_eps": "small"}, {"rms_norm_eps": 1e-6}),
    ({"rope_theta": -1}, {"rope_theta": 1e4}),
]


@pytest.mark.parametrize("command", ["lower", "explain"])
@pytest.mark.parametrize(("wrong", "right"), VALUES, ids=lambda values: json.dumps(values))
def test_values(command, wrong, right, tmp_path, capfd):
    path = tmp_path / "config.json"
    sizes = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
    path.write_text(json.dumps({**sizes, **wrong}))
    assert list(wrong)[-1] in refused(capfd, command, str(path))
    check_values({**sizes, **right}, path, needs_type=True)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_an_odd_head(kind, tmp_path, capfd):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind, "head_dim": 127}))
    assert "head_dim" in refused(capfd, "lower", str(path))
    check_values({"model_type": kind, "head_dim": 128}, path, needs_type=True)


def test_every_value_is_checked(tmp_path):
    for name in (*config_values.OBJECTS, *config_values.FLAGS, *config_values.NUMBERS, *config_values.DTYPES):
        with pytest.raises(ModelError, match=name):
            check_values({"model_type": "qwen3_moe", "text_config": {name: [1]}}, tmp_path, needs_type=True)


def test_models_with_experts_are_not_dense():
    """Else a model that is lowered today is refused: every module of transformers that takes an experts implementation."""
    folder = Path(transformers_folder(), "models")
    with_experts = {
        f.parent.name for f in folder.glob("*/modeling_*.py") if "use_experts_implementation" in f.read_text()
    }
    assert len(with_experts) > 20 and not {kind for kind in with_experts if config_values.is_dense(kind)}
    assert config_values.is_dense("bert") and config_values.is_dense("llama")
    assert not config_values.is_dense("llava"), "it may be made of any model for text"
    assert not config_values.is_dense("no_such_type"), "what is not found is not known to be dense"


NAMES_OF_MODELS = ["", " ", "qwen4_moe", "x" * 5000, "bert\n", "moe\0", "\N{SNOWMAN}"]


@pytest.mark.parametrize("command", ["lower", "explain"])
@pytest.mark.parametrize("model", NAMES_OF_MODELS, ids=range(len(NAMES_OF_MODELS)))
def test_names(command, model, capfd):
    assert "argument MODEL: is " in refused(capfd, command, model)


NUMBERS = ["-1", "1e3", "1.0", "", "ten", "0x10", str(2**31), str(2**40), str(2**63), str(2**64), "9" * 5000, "٣"]
OPTIONS = {
    "lower": ("--tokens", "--ep", "--tp", "--layers", "--replays"),
    "explain": (
        "--tokens",
        "--ep",
        "--tp",
        "--hidden",
        "--intermediate",
        "--experts",
        "--topk",
        "--buffer-mb",
        "--max-tokens",
    ),
}


@pytest.mark.parametrize(("command", "option"), [(c, o) for c, options in OPTIONS.items() for o in options])
def test_numbers(command, option, capfd):
    for number in NUMBERS:
        assert option in refused(capfd, command, "moe", f"{option}={number}")
    if (command, option) != ("explain", "--tokens"):
        assert option in refused(capfd, command, "moe", f"{option}=0")


OTHERS = [
    ["lower"],
    ["no_such_command"],
    ["lower", "moe", "--comm", "mc3"],
    ["lower", "moe", "--soc", "A4"],
    ["lower", "moe", "--dtype", "int8"],
    ["lower", "moe", "--quant", "w2a2"],
    ["lower", "moe", "--fused-mode", "3"],
    ["lower", "moe", "--provider", "vllm_ascend"],
    ["lower", "moe", "--provider", "none", "--provider", "vllm_ascend=0.23.0"],
    ["lower", "moe", "--no-such-option"],
    ["lower", "moe", "more"],
    ["lower", "moe", "--ep", "2", "--tp", "3"],
    ["lower", "moe", "--quant", "w8a8", "--dtype", "float32"],
    ["lower", "moe", "--capture", "--fake"],
    ["lower", "moe", "--replays", "2"],
    ["lower", "moe", "--tokens", str(2**20)],
    ["lower", "moe", "--layers", "1001"],
    ["lower", "moe", "--capture", "--replays", "100001"],
    ["lower", "moe", "--ep", "1024"],
    ["lower", "mixtral", "--ep", "5"],
    ["lower", "moe", "--fake", "--ep", "3"],
    ["lower", "bert"],
    ["explain", "moe", "--topk", "300"],
    ["explain"],
    ["explain", "--hidden", "64"],
    ["explain", "moe", "--policy", "fixed"],
    ["explain", "moe", "--comm", "mc2", "--policy", "vllm_ascend_main"],
    ["explain", "moe", "--sweep", "tokens=5..1"],
    ["explain", "moe", "--sweep", f"tokens=1..{2**40}"],
    ["explain", "moe", "--sweep", "tokens=1.."],
    ["explain", "moe", "--sweep", "experts=1..2"],
    ["explain", "moe", "--cann", "new"],
    ["explain", "moe", "--why", "mc3"],
    ["explain", "moe", "--color", "red"],
    ["matrix", "--no-such-option"],
    ["models", "qwen3_moe"],
    ["simulate", "--soc", "A9", "--", "x"],
    ["explore"],
    *([command, "moe", "--html", where] for command in ("lower", "explain") for where in ("", "/proc/x.html", "/proc")),
]


@pytest.mark.parametrize("given", OTHERS, ids=" ".join)
def test_options(given, capfd):
    refused(capfd, *given)


def test_right_usage_of_the_same_kinds(tmp_path, capfd):
    """The twin: a file with sizes that a model can have is read."""
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"model_type": "qwen3_moe", "hidden_size": 1024, "num_experts": 8, "num_experts_per_tok": 8})
    )
    assert cli.main(["explain", str(path), "--tokens", "0", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)


# --- whole processes --------------------------------------------------------------------------------------------------

WATCH = """
import sys
from moe_lowering import cli
code = cli.main(sys.argv[1:])
print(sorted({"torch", "transformers"} & {*sys.modules}))
sys.exit(code)
"""


def process(program: list[str], given: list[str], **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *program, *given]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False, **options)


@pytest.mark.parametrize(
    "given",
    [
        ["lower", "moe", "--tokens", "0"],
        ["lower", "qwen4_moe"],
        ["explain", "qwen4_moe"],
        ["lower", "list.json"],
        ["explain"],
        ["explain", "moe", "--unequal-tokens"],
        ["explain", "moe", "--ep", "4,8", "--tp", "8"],
    ],
    ids=" ".join,
)
def test_nothing_is_imported_for_a_wrong_command(given, folder):
    done = process(["-c", WATCH], given, cwd=folder, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr


@pytest.mark.parametrize("given", [["--version"], ["--help"], ["lower", "--help"]], ids=" ".join)
def test_a_help_that_cannot_be_written(given):
    with Path("/dev/full").open("w") as full:
        done = process(["-m", "moe_lowering"], given, stdout=full)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "accepted: " in done.stderr, done.stderr
    assert process(["-m", "moe_lowering"], given, stdout=subprocess.PIPE).returncode == 0


@pytest.mark.parametrize("where", ["full", "closed"])
def test_a_report_that_cannot_be_written(where):
    program = ["-m", "moe_lowering"]
    given = ["explain", "moe"]
    if where == "full":
        with Path("/dev/full").open("w") as full:
            done = process(program, given, stdout=full)
    else:
        done = process(program, given, preexec_fn=lambda: os.close(1))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("moe-lowering: ")]
    assert len(lines) == 1 and "accepted: " in lines[0], done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_stderr_is_wrong_usage():
    """Else what libraries print would stand beside the report."""
    command = [sys.executable, "-m", "moe_lowering", "explain", "moe", "--json"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2), text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
