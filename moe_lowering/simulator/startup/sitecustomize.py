"""Run by Python when it starts, where ``moe-lowering simulate`` has put this folder on PYTHONPATH.

It installs the simulator's import hooks (``moe_lowering.simulator.imports``) in the program and in each Python process
that it starts. Then the next sitecustomize on the path is run, which this one hides.
"""

import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if os.environ.get("MOE_LOWERING_SIMULATOR"):
    try:
        from moe_lowering.simulator import imports
    except ModuleNotFoundError:  # not installed for this Python: the package that this file is in
        sys.path.append(str(HERE.parents[2]))
        from moe_lowering.simulator import imports
    imports.install(os.environ["MOE_LOWERING_SIMULATOR"])

for _folder in sys.path:
    _other = Path(_folder or ".", "sitecustomize.py").resolve()
    if _other.parent != HERE and _other.is_file():
        runpy.run_path(str(_other))
        break
