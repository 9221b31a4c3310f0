"""``load_experts``: equal to loading all and sharding, within 1.2 times of what stays, and nothing half done on bad files."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import loading_models as models
import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_lowering
from moe_lowering import CheckpointError, load_experts
from moe_lowering.loading import load

# Keys for each expert, joined (qwen3_moe); renamed (mixtral); stacked, with biases (gpt_oss); a buffer that is stored
# (deepseek_v3); no gate (nemotron_h); stacked and turned (qwen3_vl_moe_text).
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "nemotron_h")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(config, folder, the model with all experts) of a family, made once."""
    made = {}

    def of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            config = models.config_of(family)
            models.save(config, folder)
            assert len(list(folder.glob("*.safetensors"))) > 2
            made[family] = config, folder, models.load_all(config, folder)
        return made[family]

    return of


def assert_equal(model, reference):
    ours, theirs = dict(model.state_dict()), dict(reference.state_dict())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype, name
        assert ours[name].is_contiguous() or not theirs[name].is_contiguous(), name
    for (name, buffer), (_, other) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_loading_all_and_sharding(checkpoints, family):
    config, folder, whole = checkpoints(family)
    for ranks in (1, 2, 4):
        for rank in {0, ranks - 1}:
            model = load_experts(models.on_meta(config), folder, models.deployment(ranks, rank))
            assert_equal(model, models.load_all_then_shard(whole, ranks, rank))
            ids = torch.arange(8)[None]
            if ranks == 1:
                assert torch.equal(
                    model(input_ids=ids, use_cache=False).logits, whole(input_ids=ids, use_cache=False).logits
                )


def test_another_rank_has_other_experts(checkpoints):
    """The twin: what is compared above differs between ranks."""
    config, folder, whole = checkpoints("qwen3_moe")
    model = load_experts(models.on_meta(config), folder, models.deployment(2, 0))
    with pytest.raises(AssertionError):
        assert_equal(model, models.load_all_then_shard(whole, 2, 1))


def test_floats_are_cast_as_the_model_has_them(checkpoints):
    config, folder, whole = checkpoints("qwen3_moe")
    model = load_experts(models.on_meta(config).float(), folder, models.deployment(2, 1))
    assert_equal(model, models.load_all_then_shard(whole, 2, 1).float())


def test_a_model_of_ones_own(tmp_path):
    torch.manual_seed(0)
    whole = moe_lowering.MoE(64, 32, num_experts=8, top_k=2, selection_bias=True, expert_bias=True)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with torch.device("meta"):
            model = moe_lowering.MoE(64, 32, num_experts=8, top_k=2, selection_bias=True, expert_bias=True)
        load_experts(model, path, models.deployment(4, 2))
        assert_equal(model, models.load_all_then_shard(whole, 4, 2))


# ------------------------------------------------------------------------------------------------------- what is refused


def change(folder, key, edit):
    """Edit the shard that has a key, and its index; a tensor that ``edit`` makes None goes from the file alone."""
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"][key]
    tensors = load_file(file)
    tensors[key] = edit(tensors[key])
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def forget(folder, key):
    """A key that neither index nor file has."""
    change(folder, key, lambda tensor: None)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][key]
    (folder / INDEX).write_text(json.dumps(index))


def add(folder, key, tensor):
    save_file({key: tensor}, folder / "more.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][key] = "more.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def cut(folder):
    file = first_shard(folder)
    file.write_bytes(file.read_bytes()[:-1])


def damage(folder):
    file = first_shard(folder)
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])


def overlap(folder):
    """A header by which the second tensor begins where the first one does."""
    file = first_shard(folder)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    places = sorted(about["data_offsets"] for key, about in header.items() if key != "__metadata__")
    for about in header.values():
        if about.get("data_offsets") == places[1]:
            about["data_offsets"] = [0, places[1][1] - places[1][0]]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
PLAIN = "model.layers.0.self_attn.q_proj.weight"
FAULTS = {
    "no folder": (shutil.rmtree, "no such folder; accepted: a local folder"),
    "an empty folder": (
        lambda f: [file.unlink() for file in f.glob("model*")],
        "neither model.safetensors.index.json nor",
    ),
    "no shard": (lambda f: first_shard(f).unlink(), "is missing; model.safetensors.index.json says that it has"),
    "a shard without a key": (lambda f: change(f, PLAIN, lambda t: None), f"has no {PLAIN}, which model.safe"),
    "a shard cut short": (cut, "is no complete safetensors file"),
    "a damaged header": (damage, "its header would have 1099511627776 bytes"),
    "tensors in one place": (overlap, "of the data, and what stands before it ends at"),
    "a damaged index": (lambda f: (f / INDEX).write_text("{}"), "is no index of safetensors (KeyError"),
    "a nested index": (lambda f: (f / INDEX).write_text("[" * 100_000), "is no index of safetensors (RecursionError"),
    "an index that leads elsewhere": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../b"}}'),
        "not that of a file beside",
    ),
    "no expert": (
        lambda f: forget(f, EXPERT),
        f"/copy: has no {EXPERT} for model.layers.1.mlp.experts.gate_up_proj",
    ),
    "no plain key": (lambda f: forget(f, PLAIN), f"/copy: has no key for {PLAIN}"),
    "no key at all": (
        lambda f: (f / INDEX).write_text('{"weight_map": {}}'),
        "/copy: has no key for model.embed_tokens",
    ),
    "one key more": (
        lambda f: add(f, "model.other", torch.zeros(1)),
        "has model.other, for which Qwen3MoeForCausalLM has no",
    ),
    "an expert more": (
        lambda f: add(f, EXPERT.replace("5", "8"), torch.zeros(32, 64, dtype=models.DTYPE)),
        "has 9 keys",
    ),
    "another shape of one expert": (
        lambda f: change(f, EXPERT, lambda t: t[1:].clone()),
        f"{EXPERT} has shape [31, 64]; accepted: [32, 64]",
    ),
    "another shape of the first expert": (
        lambda f: change(f, EXPERT.replace("5", "0"), lambda t: t[1:].clone()),
        f"{EXPERT.replace('5', '0')} has shape [31, 64]; accepted: [32, 64]",
    ),
    "another shape of a plain key": (
        lambda f: change(f, PLAIN, lambda t: t.T[1:].contiguous()),
        f"{PLAIN} has shape [63, 64]",
    ),
    "whole numbers in an expert": (
        lambda f: change(f, EXPERT, lambda t: t.to(torch.int8)),
        f"{EXPERT} is torch.int8; accepted: torch.bfloat16, or another",
    ),
    "8-bit floats": (
        lambda f: change(f, PLAIN, lambda t: t.to(torch.float8_e4m3fn)),
        f"{PLAIN} is torch.float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_are_refused_and_the_model_stays_as_it_was(checkpoints, tmp_path, fault):
    config, folder, _ = checkpoints("qwen3_moe")
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage_files, message = FAULTS[fault]
    damage_files(copied)
    model = models.on_meta(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_experts(model, copied, models.deployment(2, 0))
    assert message in str(error.value), error.value
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert_loads(model, folder)  # the same model, from files that are whole


def test_an_index_is_no_file_of_tensors(checkpoints):
    config, folder, _ = checkpoints("qwen3_moe")
    with pytest.raises(
        CheckpointError, match=r"index\.json: is no \.safetensors file; accepted: such a file, or the folder "
    ):
        load_experts(models.on_meta(config), folder / INDEX, models.deployment(2, 0))


def assert_loads(model, folder):
    load_experts(model, folder, models.deployment(2, 0))
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_one_file_comes_before_an_index_that_it_left_behind(checkpoints, tmp_path):
    """As for ``from_pretrained``: ``save_pretrained`` in one file takes the shards away, and leaves their index."""
    config, folder, _ = checkpoints("qwen3_moe")
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors = {key: tensor for file in copied.glob("*.safetensors") for key, tensor in load_file(file).items()}
    for file in copied.glob("*.safetensors"):
        file.unlink()
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, copied / "model.safetensors", {"format": "pt"})
    model = models.on_meta(config)
    load_experts(model, copied, models.deployment(2, 0))
    assert_equal(model, models.load_all_then_shard(models.load_all(config, copied), 2, 0))
    (copied / "model.safetensors").unlink()  # the twin: then the index counts, whose shards are gone
    with pytest.raises(CheckpointError, match="is missing; model"):
        load_experts(models.on_meta(config), copied, models.deployment(2, 0))


@pytest.mark.parametrize("device", ["none_such", "cuda", "meta", 1.5])
def test_a_device_on_which_nothing_can_be_is_refused(checkpoints, device):
    config, folder, _ = checkpoints("qwen3_moe")
    model = models.on_meta(config)
    with pytest.raises(ValueError, match=r"load_experts: device is .*; accepted: a torch.device of this machine"):
        load_experts(model, folder, models.deployment(2, 0), device=device)
    assert all(tensor.is_meta for tensor in model.parameters())


def test_a_file_that_goes_while_it_is_read(checkpoints, tmp_path, monkeypatch):
    config, folder, _ = checkpoints("qwen3_moe")
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    plan = load.make_plan
    monkeypatch.setattr(load, "make_plan", lambda *arguments: (plan(*arguments), first_shard(copied).unlink())[0])
    model = models.on_meta(config)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_experts(model, copied, models.deployment(2, 0))
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    monkeypatch.undo()
    assert_loads(model, folder)


def held(model):
    """What the modules of a model hold, by the identity of each object."""
    return [
        (
            name,
            sorted((key, id(value)) for key, value in vars(module).items()),
            *map(list, (module._parameters.items(), module._buffers.items())),
        )
        for name, module in model.named_modules()
    ]


# Steps after reading, and at which of its calls each fails, after it was done.
STEPS = {"_make_buffers": 1, "_read": 3, "shard_experts": 1, "_assign": 3, "tie_weights": 1}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_whatever_fails_the_model_is_as_it_was(checkpoints, monkeypatch, step, error):
    config, folder, _ = checkpoints("qwen3_moe")
    model, calls = models.on_meta(config), []
    owner = model if step == "tie_weights" else load
    done = getattr(owner, step)

    def fail(*arguments):
        result = done(*arguments)
        calls.append(step)
        if len(calls) == STEPS[step]:
            raise error("no room")
        return result

    before = held(model)
    with monkeypatch.context() as patch:
        if step == "tie_weights":  # of the class: an attribute of the model would be seen as a change
            patch.setattr(type(model), step, lambda self: fail())
        else:
            patch.setattr(load, step, fail)
        with pytest.raises(error):
            load_experts(model, folder, models.deployment(2, 0))
    assert len(calls) == STEPS[step] and held(model) == before
    assert_loads(model, folder)
    assert held(model) != before, "the twin: what is held tells a model that was filled"


def test_other_models_and_deployments_are_refused(checkpoints):
    config, folder, whole = checkpoints("qwen3_moe")
    sharded = moe_lowering.shard_experts(models.on_meta(config), models.deployment(2, 0))
    for model, place, message in (
        (whole, models.deployment(2, 0), "on cpu'; accepted: a model that was made under torch.device"),
        (models.on_meta(config), models.deployment(3, 0), "num_experts is 8; accepted: a multiple of ep_size, 3"),
        (sharded, models.deployment(2, 0), "was sharded before"),
        (torch.nn.Linear(2, 2, device="meta"), models.deployment(2, 0), "has no MoE module"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_experts(model, folder, place)
    for path in (3, None):
        with pytest.raises(ValueError, match=r"path is .*; accepted: the path of a folder or file"):
            load_experts(models.on_meta(config), path, models.deployment(2, 0))


def test_a_buffer_that_nobody_makes_is_refused(tmp_path):
    layer = moe_lowering.MoE(8, 8, num_experts=2, top_k=1)
    save_file(layer.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = moe_lowering.MoE(8, 8, num_experts=2, top_k=1)
        model.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(ValueError, match=r"MoE\.table'; accepted: buffers that are in the checkpoint"):
        load_experts(model, tmp_path, models.deployment(2, 0))
    assert model.table.is_meta


# ---------------------------------------------------------------------------------------------------------------- memory


def test_peak_memory_is_near_what_stays(tmp_path):
    """On two and four ranks: at most 1.2 times, where loading all and sharding takes more than all."""
    from transformers import Qwen3MoeConfig

    def config(**sizes):
        return Qwen3MoeConfig(
            num_hidden_layers=3, num_experts=16, num_experts_per_tok=2, vocab_size=128, num_attention_heads=2,
            num_key_value_heads=2, head_dim=32, **sizes,
        )  # fmt: skip

    folder = tmp_path / "checkpoint"
    models.save(config(hidden_size=1024, moe_intermediate_size=512), folder, "40MB")
    models.save(config(hidden_size=32, moe_intermediate_size=16), Path(f"{folder}-small"))
    helper = Path(__file__).parents[1] / "helpers" / "loading_process.py"
    command = [sys.executable, str(helper), str(folder), "2", "4"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for ranks, ways in json.loads(done.stdout.splitlines()[-1]).items():
        own, whole = ways["own"], ways["all"]
        assert own["kept"] == whole["kept"] > 30e6
        assert own["peak"] <= 1.2 * own["kept"], (ranks, ways)
        assert whole["peak"] > 1.5 * whole["kept"], (ranks, ways)
        print(ranks, ways)
