# PYTHON_ARGCOMPLETE_OK
"""``python -m moe_lowering``: the same as the command ``moe-lowering``."""

import sys

from moe_lowering.cli import main

if __name__ == "__main__":
    sys.exit(main())
