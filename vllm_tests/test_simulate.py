"""``moe-lowering simulate``: what a program and its children find."""

import conftest


def test_children_find_the_device_too(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys\n"
        "code = 'import torch_npu, torch, acl; print(torch.ones(2).npu().sum().item(), acl.get_soc_name())'\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)\n"
        "print('torch' in sys.modules)\n"
        "sys.exit(7)\n"
    )
    code, out, error = conftest.simulate(script)
    assert (code, out.split()) == (7, ["2.0", "Ascend910_9391", "False"]), error


def test_the_library_of_vllm_ascend(tmp_path):
    """Its real schemas; our kernels where there are some, and an error by name where there are none."""
    script = tmp_path / "operators.py"
    script.write_text(
        "import torch, torch_npu, vllm_ascend._build_info, vllm_ascend.vllm_ascend_C\n"
        "ops = torch.ops._C_ascend\n"
        "x = torch.randn(3, 8).npu()\n"
        "y, inverse, total = ops.npu_add_rms_norm_bias(x, x, torch.ones(8).npu(), torch.ones(8).npu())\n"
        "right = torch.nn.functional.rms_norm(2 * x.cpu(), (8,), eps=1e-6) + 1\n"
        "print(torch.allclose(y.cpu(), right), vllm_ascend._build_info.__device_type__)\n"
        "try:\n    ops.moe_gating_top_k_hash(torch.randn(3, 16).npu(), 2)\n"
        "except RuntimeError as error:\n    print('libopapi' in str(error) or error)\n"
    )
    code, out, error = conftest.simulate(script)
    assert code == 0 and out.strip().endswith("True A3\nTrue"), (out, error)
