"""The launch scripts in examples/, and how tests run them."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron_came.data.indexed import DatasetWriter
from megatron_came.terminal.children import end_with_parent

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("*/train_*.sh"))
GPT2 = [name for name in SCRIPTS if name.startswith("gpt2_medium/")]
# They run what only a checkout of Megatron-LM has.
FROM_CHECKOUTS = ["bert/train_8gpus.sh", "t5/train_8gpus.sh"]
# torchrun and python of the environment that runs the tests are the first on the path.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def run(
    script: str, *arguments: str, path: str = PATH, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script with these variables and none of its others."""
    ours = set(re.findall(r"`([A-Z_]{5,})`", (EXAMPLES / "README.md").read_text()))
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith(("SLURM", "RANK", "WORLD_SIZE", "MASTER"))
    }
    parent = os.getpid()
    return subprocess.run(
        # On a SIGTERM torchrun ends its workers; a SIGKILL would leave them behind.
        ["timeout", "300", str(EXAMPLES / script), *arguments],
        env={**kept, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: end_with_parent(parent, signal.SIGTERM),
    )


def dry_run(script: str, *arguments: str, **variables: str) -> list[str]:
    """The words of the command that a script prints."""
    done = run(script, *arguments, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.replace("\\\n", ""))


def smoke(script: str, output: Path, *arguments: str, **variables: str) -> str:
    """Run a script for real, shrunken and on the CPU; returns all that it printed."""
    variables = {"SMOKE": "1", "OUTPUT": str(output), "MEGATRON_CAME_CPU": "1", **variables}
    done = run(script, *arguments, **variables)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-6000:]
    assert "SMOKE=1: processes" in done.stderr
    return printed


def losses(log: str) -> dict[int, float]:
    """The training losses by iteration."""
    found = re.findall(r" iteration +(\d+)/.*?lm loss: (\S+)", log)
    return {int(iteration): float(loss) for iteration, loss in found}


def write_checkout(folder: Path) -> Path:
    """The names of the scripts that the examples look for in a checkout of Megatron-LM."""
    for name in ("pretrain_gpt", "examples/bert/pretrain_bert", "examples/t5/pretrain_t5"):
        script = folder / f"{name}.py"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.touch()
    return folder


class Cluster:
    """Stand-ins for srun and scontrol: "nodes" that are all this machine."""

    def __init__(self, folder: Path, nodes: int) -> None:
        programs = folder / "bin"
        programs.mkdir()
        self.path = os.pathsep.join([str(programs), PATH])
        self.variables = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "all",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }
        for name, body in (
            ("scontrol", "echo localhost; echo others"),
            (
                "srun",
                'n=$2; shift 6; for ((; n > 0; n--)); do "$@" & p+=($!); done; wait "${p[@]}"',
            ),
        ):
            (programs / name).write_text(f"#!/bin/bash\n{body}\n")
            (programs / name).chmod(0o755)


def write_dataset(prefix: Path, documents: int) -> None:
    """Documents of 90 tokens of GPT-2's vocabulary."""
    writer = DatasetWriter(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), vocab_size=50257)
    for start in range(documents):
        writer.add(np.arange(start, start + 90, dtype=np.int32))
    writer.finish()
