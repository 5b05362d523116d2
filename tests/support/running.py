"""Python in a process of its own."""

import os
import subprocess
import sys

from megatron_came.cpu_megatron import switch


def run_python(
    *arguments: str, timeout: float = 200, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python, without a launcher's variables and with one thread."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", switch.VARIABLE}
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
