"""Whether Triton's kernels run on a GPU: found when kernels are chosen, not at the first step."""

from __future__ import annotations

import functools
import re
import subprocess

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from megatron_came.core.hyperparameters import GroupSettings, Hyperparameters
from megatron_came.core.parameter_slice import ParameterSlice, SliceSums, StepInputs
from megatron_came.core.shard import Shard
from megatron_came.core.state import new_state
from megatron_came.kernels.backend import UnusableError
from megatron_came.kernels.triton.passes import TritonBackend


def check(device: torch.device) -> None:
    """Take a step on a GPU, of a tiny matrix and a vector.

    Raises:
        UnusableError: that fails.
    """
    problem = _problem(device)
    if problem is not None:
        raise problem


@functools.cache
def _problem(device: torch.device) -> UnusableError | None:
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        # LLVM aborts the process where it is asked for one that it does not know.
        if not knows(f"{major}{minor}"):
            return UnusableError(
                f"Triton {triton.__version__} does not know the architecture of {device}, "
                f"sm_{major}{minor}",
                "install a newer Triton",
            )
    try:
        step_once(device)
        torch.cuda.synchronize(device)
    except Exception as error:  # of Triton's, the C compiler's, the driver's
        return explained(error)
    return None


def knows(capability: str) -> bool:
    """Whether the assembler that Triton brings along knows an architecture, such as "90"."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        tool = get_ptxas(int(capability))
        path = tool[0] if isinstance(tool, tuple) else tool.path  # the former before 3.4
        listed = subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
    except (ImportError, AttributeError, TypeError, OSError, subprocess.SubprocessError):
        return True  # not to be found out in this release
    known = re.findall(r"\bsm_(\d+)", listed)
    return not known or capability in known


def step_once(device: torch.device) -> None:
    """Take a step of a tiny matrix and a vector."""
    sums, inputs = {}, {}
    for shape in ((8, 8), (8,)):
        slice_ = ParameterSlice(torch.zeros(shape, device=device), Shard.whole(shape))
        squares, (total, *instability) = (
            [torch.zeros(each.shape, dtype=torch.float64, device=device) for each in requests]
            for requests in (slice_.square_requests(), slice_.instability_requests())
        )
        sums[slice_] = SliceSums(tuple(squares), total, tuple(instability))
        state: dict[str, Tensor] = new_state(slice_.param, slice_.shard)
        grad = torch.ones_like(slice_.param)
        inputs[slice_] = StepInputs(state, grad, GroupSettings(Hyperparameters(), 1.0, 0.0, 0))
    passes = TritonBackend(device).passes(sums, is_local=True)  # kept: memory of it is written
    passes.begin(inputs).take(1, 2, 3)


def explained(error: Exception) -> UnusableError:
    """Say what is missing, and what to do."""
    if isinstance(error, OutOfResources):
        return UnusableError(
            f"its kernels take {error.required} of {error.name}, and this GPU has {error.limit}",
            "there is no remedy on this GPU",
        )
    if "C compiler" in str(error):
        return UnusableError(
            "there is no C compiler, which it builds launchers with",
            "install gcc, or name a compiler in the variable CC",
        )
    if isinstance(error, FileNotFoundError):
        return UnusableError(
            f"{error.filename} is missing", "install it, or name a C compiler in the variable CC"
        )
    if isinstance(error, subprocess.CalledProcessError):
        command = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        return UnusableError(
            f"{command} fails, see its lines above",
            "install Python's headers (python3-dev), or name another C compiler in the variable CC",
        )
    line = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    return UnusableError(line.rstrip("."), "make gpu-check shows all of the error")
