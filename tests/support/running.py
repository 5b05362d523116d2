"""Python in a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

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


def seen_by_host_worker(*arguments: str) -> dict[str, dict[str, Any]]:
    """What ``tests/support/host_worker.py`` saw of each way that it was told to go."""
    result = run_python(
        "-m", "tests.support.host_worker", *arguments, timeout=900, MEGATRON_CAME_CPU="1"
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith('["')]
    assert len(lines) == len([word for word in arguments if word.isidentifier()]), result.stderr
    return dict(json.loads(line) for line in lines)
