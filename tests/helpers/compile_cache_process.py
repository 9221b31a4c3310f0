"""One process that uses npugraph_ex's compile cache: what ``test_compile_cache`` starts.

    python compile_cache_process.py CACHE_DIR DEPLOYMENT_JSON TOKENS...

Prints one JSON object: whether the pass ran, the cache's files, and for each token count the result or the error.
"""

import json
import pathlib
import sys

import moe_lowering
from moe_lowering import Deployment, MoE, MoeLowering, npugraph_ex_options, simulator

simulator.enable("A3")
import torch  # noqa: E402
from torch import nn  # noqa: E402


class Model(nn.Module):
    """One MoE layer; ``forward`` is what is cached."""

    def __init__(self):
        super().__init__()
        self.moe = MoE(64, 32, 4, 2)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8

    def forward(self, x):
        return self.moe(x)


def main(folder, fields, *counts):
    from torch.npu.npugraph_ex.inference import cache_compile

    lowering = MoeLowering(Deployment(**json.loads(fields)))
    options = npugraph_ex_options(lowering.deployment, lowering=lowering, force_eager=True)
    model = Model()
    cached = cache_compile(model.forward, dynamic=True, cache_dir=folder, options=options)
    answers = []
    for tokens in map(int, counts):
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
        try:
            with torch.no_grad():
                y = cached(x)
                answers.append(float((y - model(x)).abs().max()))
        except Exception as error:
            answers.append(str(error))
    files = sorted(str(f.parent.relative_to(folder)) for f in pathlib.Path(folder).rglob("compiled_module"))
    return {"lowered": len(lowering.reports), "files": files, "answers": answers, "from": moe_lowering.__file__}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
