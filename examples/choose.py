"""Choosing a deployment for published models, from Python: python examples/choose.py [npu]"""

import argparse

import moe_lowering

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("device", nargs="?", choices=("cpu", "npu"), help="changes nothing: it only computes")
parser.parse_args()

SIZES = {
    "DeepSeek-V3": {"hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "layers": 58},
    "Qwen3-235B-A22B": {"hidden": 4096, "intermediate": 1536, "experts": 128, "top_k": 8, "layers": 94},
}
MODELS = {name: moe_lowering.BlockDescription(quantisation="w8a8", **sizes) for name, sizes in SIZES.items()}
MACHINES = (("A2", 64), ("A3", 16), ("A3", 32), ("A3", 64))

print(f"{'model':<16} {'SoC':<3} {'EP':>2} {'128 tokens':<11} 1..4096 tokens, each up to")
for name, block in MODELS.items():
    for soc, ranks in MACHINES:
        deployment = moe_lowering.Deployment(
            soc=soc,
            ep_size=ranks,
            ep_group="ep",
            mc2_group="mc2",
            hccl_buffer_mb=1024,
            weight_format="nz",
            providers=(("vllm_ascend", "0.23.0"),),  # built from source; () says that nothing brings fused operators
            installed=(),  # of another machine
        )
        explanation = moe_lowering.explain(block, deployment, tokens=128, sweep=(1, 4096))
        pieces = ", ".join(f"{piece.choice} {piece.high}" for piece in explanation.pieces)
        print(f"{name:<16} {soc:<3} {ranks:>2} {explanation.answer.choice:<11} {pieces}")
        memory = explanation.answer.memory(block.layers)
        if not memory.fits:
            print(f"{'':<25} {memory}")
        for implementation, verdict in explanation.answer.judgement.verdicts.items():
            if verdict.violations:
                codes = ", ".join(dict.fromkeys(violation.code for violation in verdict.violations))
                print(f"{'':<25} not {implementation}: {codes}")
