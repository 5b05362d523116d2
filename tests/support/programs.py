"""Programs that tests start."""

import os
import subprocess
import sys

from megatron_came.cpu_megatron import switch

# What a launcher sets for its ranks.
_LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", switch.VARIABLE}


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python, without a launcher's variables and with one thread."""
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
