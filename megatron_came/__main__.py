"""``python -m megatron_came``: the command ``megatron-came``."""

import sys

from megatron_came.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
