"""Break the package on purpose, one fault at a time, and see that the tests notice.

    .venv/bin/python scripts/check_mutations.py [NAME...]

Each fault is one replacement in one file of a copy of the repository. A fault survives if the tests
named with it still pass; the script then fails. ``make check-mutations`` runs it.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

SHARDED = "tests/core/test_sharded.py"
KERNELS = "tests/kernels/test_kernels.py"
ADDRESSES = "tests/kernels/test_kernel_addresses.py"
THREADS = "tests/kernels/test_kernel_threads.py"
UNCHANGED = "tests/optimizer/test_unchanged_steps.py -k seen"
PEAKS = "tests/megatron/test_checkpoint_peaks.py"
SMALLER = "tests/core/test_smaller_state.py"
SHARDING = "tests/megatron/test_sharding.py"
RESUME = "tests/training/test_checkpoints.py -k full-at-tp2"
LEGACY = "tests/training/test_checkpoints.py -k legacy-vpp"
FIGURES = "tests/core/test_diagnostics.py -k plain"
OFFLOAD = "tests/megatron/test_cpu_offload.py"
GUARD = "tests/optimizer/test_spike_guard.py"
GRAPHS = "tests/kernels/test_cuda_graphs.py -k changed"


@dataclass(frozen=True)
class Fault:
    """One replacement in one file, and the tests that must fail with it."""

    name: str
    file: str
    before: str
    after: str
    tests: str = SHARDED


FAULTS = (
    Fault(
        "look at the same rows of every tensor-parallel rank",
        "core/diagnostics.py",
        "divmod(full_row - first_row, size + jump)",
        "divmod(full_row, size + jump)",
        FIGURES,
    ),
    Fault(
        "count what several ranks hold several times",
        "core/diagnostics.py",
        "weight = look.weight / shard.replicas",
        "weight = look.weight",
        FIGURES,
    ),
    Fault(
        "figures of elements beside the slice",
        "core/diagnostics.py",
        "if known is not None and is_cut:",
        "if False:",
        FIGURES,
    ),
    Fault(
        "replay launches over tables that are no longer there",
        "kernels/triton/graphs.py",
        "if launches != self._launches:",
        "if self._launches is None:",
        GRAPHS,
    ),
    Fault(
        "leave the second moments of a skipped step",
        "step.py",
        "            torch._foreach_copy_(*self.moments)",
        "            pass",
        GUARD,
    ),
    Fault(
        "leave the sums of the CPU out of a reduction",
        "core/sums.py",
        "self.flat.add_(self.host.to(self.flat.device, non_blocking=True))",
        "pass",
        OFFLOAD,
    ),
    Fault(
        "leave the complete sums on the device",
        "core/sums.py",
        "self.host.copy_(self.flat)",
        "pass",
        OFFLOAD,
    ),
    Fault(
        "leave offloaded weights on the CPU",
        "megatron/cpu_offload.py",
        "slice_.send(local.detach())",
        "pass",
        OFFLOAD,
    ),
    Fault(
        "let optimizers that step together decide each for itself",
        "core/spike_guard.py",
        "self._waiting = list(self.members or [member])",
        "self._waiting = [member]",
        GUARD,
    ),
    Fault(
        "guard a step that is over",
        "optimizer.py",
        "in_passes = bool(self.spike_guard)",
        "in_passes = False",
        GUARD,
    ),
    Fault(
        "take state for what it was by its address alone",
        "snapshots.py",
        "            and all(map(is_, now.state, map(call, self.state)))\n",
        "",
        UNCHANGED,
    ),
    Fault(
        "convert what a checkpoint holds at once",
        "core/saved.py",
        "AT_ONCE = 1 << 18",
        "AT_ONCE = 1 << 40",
        PEAKS,
    ),
    Fault(
        "skip the DP reduction",
        "core/sums.py",
        "over_dp = _merged((*bounds[index], requests[index].dp_group) for index in bounds)",
        "over_dp = []",
    ),
    Fault(
        "skip the TP reduction",
        "core/sums.py",
        "over_tp = _merged((*bounds[index], requests[index].tp_group) for index in bounds)",
        "over_tp = []",
    ),
    Fault(
        "reduce over the wrong group",
        "core/parameter_slice.py",
        "if not summed_over_tp:",
        "if summed_over_tp:",
    ),
    Fault(
        "row mean over the local columns",
        "core/shard.py",
        'return self.local_matrix[2] * (self.tp_size if self.tp_axis == "columns" else 1)',
        "return self.local_matrix[2]",
    ),
    Fault(
        "mean of a factor that is not whole",
        "kernels/eager.py",
        'return factors.mean_of(column if shard.tp_axis == "rows" else row)',
        "return factors.mean_of(row)",
    ),
    Fault(
        "alias instability and gradient statistics",
        "kernels/eager.py",
        "r, c, R, C = (boxes.factor(key) for key in MATRIX_FACTORS)",
        "r, c, R, C = (boxes.factor(key) for key in MATRIX_FACTORS[:2] * 2)",
    ),
    Fault(
        "scale a vector's momentum by lr in place",
        "core/passes.py",
        "    param.add_(step, alpha=-lr)",
        "    param.add_(step.mul_(lr), alpha=-1.0)",
    ),
    Fault(
        "count padding",
        "core/shard.py",
        "return math.prod(self.shape) * self.tp_size",
        "return -(-math.prod(self.shape) // 64) * 64 * self.tp_size",
    ),
    Fault(
        "drop the clip's reduction over TP",
        "core/parameter_slice.py",
        "requests = [self._request(summed_over_tp=axis is not None)]",
        "requests = [self._request(summed_over_tp=False)]",
    ),
    Fault(
        "state in bf16",
        "core/state.py",
        "return torch.float64 if param.dtype == torch.float64 else torch.float32",
        "return torch.bfloat16",
    ),
    Fault(
        "the guess used as the clip divisor",
        "kernels/eager.py",
        "            divisor,\n            row_scale[box.batch, box.rows],",
        "            guess,\n            row_scale[box.batch, box.rows],",
    ),
    Fault(
        "instability with the guess",
        "core/factors.py",
        "delta = divisor.reciprocal() - guess.to(torch.float64).reciprocal()",
        "delta = torch.zeros_like(divisor)",
    ),
    Fault(
        "column offsets off by one",
        "core/shard.py",
        "columns=_range(first_column + column, box[2]),",
        "columns=_range(max(first_column + column - 1, 0), box[2]),",
    ),
    Fault(
        "drop eps1",
        "kernels/eager.py",
        "factors.update_moment(moment, squares, count=count, eps=hyper.eps1, beta=hyper.beta2)",
        "factors.update_moment(moment, squares, count=count, eps=0.0, beta=hyper.beta2)",
    ),
    Fault(
        "copies go on from their own sums",
        "core/sums.py",
        "if request.copies_group is not None",
        "if False",
    ),
    Fault(
        "copies add their sums",
        "core/sums.py",
        "request.copies_group, dist.ReduceOp.MAX",
        "request.copies_group, dist.ReduceOp.SUM",
    ),
    Fault(
        "Triton: one kind of parameters taken for all",
        "kernels/triton/launch.py",
        "kind = self.kinds[owners[row]]._asdict()",
        "kind = self.kinds[0]._asdict()",
        KERNELS,
    ),
    Fault(
        "Triton: a row of int8 momentum that lies in two blocks read with the first one's scale",
        "kernels/triton/tiles.py",
        "is_own = (across >> SHIFT) < over_lines(rest >> SHIFT, small)",
        "is_own = across >= 0",
        f"{SMALLER} -k own_block",
    ),
    Fault(
        "Triton: ranges of a factor that are not added to its mean",
        "kernels/triton/factors.py",
        "mask=number < count, other=0.0)",
        "mask=number < 1, other=0.0)",
        KERNELS,
    ),
    Fault(
        "Triton: steps not counted, so that all round with the same bits",
        "kernels/triton/passes.py",
        "self._tables.groups[:, GroupField.STEP].add_(1)",
        "pass",
        SMALLER,
    ),
    Fault(
        "Numba: all steps round with the same bits",
        "kernels/cpu/launch.py",
        "step_key(self.slice.key, self.settings.step)",
        "step_key(self.slice.key, 0)",
        SMALLER,
    ),
    Fault(
        "a gradient copied as a whole",
        "kernels/eager.py",
        "self._grad = given.grad.reshape(-1)",
        "self._grad = given.grad.reshape(-1).clone()",
        KERNELS,
    ),
    Fault(
        "Numba: the last element of a slice left out",
        "kernels/cpu/sums.py",
        "min(offset + geometry.columns, geometry.size)",
        "min(offset + geometry.columns, geometry.size - 1)",
        KERNELS,
    ),
    Fault(
        "Numba: tiles share their scratch",
        "kernels/cpu/sums.py",
        "row_sums, partial[number, 0])",
        "row_sums, partial[0, 0])",
        KERNELS,
    ),
    Fault(
        "Numba: the pool changes PyTorch's number of threads",
        "kernels/cpu/threads.py",
        "torch.set_num_threads(before)",
        "pass",
        THREADS,
    ),
    Fault(
        "Numba: a fork not noticed",
        "kernels/cpu/threads.py",
        "return os.getpid() != _PROCESS",
        "return os.getpid() == 0",
        THREADS,
    ),
    Fault(
        "Triton: the guess used as the clip divisor",
        "kernels/triton/tiles.py",
        "inverse_divisor = tl.load(divisor_of(divisors, param, matrix, 1))",
        "inverse_divisor = tl.load(divisor_of(divisors, param, matrix, 0))",
        KERNELS,
    ),
    Fault(
        "Numba: tensors that have moved not found",
        "kernels/cpu/launch.py",
        "if seen != self._seen:",
        "if not self._seen:",
        ADDRESSES,
    ),
    Fault(
        "addresses not refreshed",
        "kernels/triton/addresses.py",
        "if row != self._rows[index]:",
        "if not self._rows[index]:",
        ADDRESSES,
    ),
    Fault(
        "expert group mixed with the dense group",
        "megatron/sharding.py",
        'return self.tp if getattr(param, "allreduce", True) else self.expert_tp',
        "return self.tp",
        SHARDING,
    ),
    Fault(
        "factors not saved",
        "megatron/checkpoints/factors.py",
        'return {"format": FORMAT, "parameters": parameters}',
        'return {"format": FORMAT, "parameters": {key: {} for key in parameters}}',
        RESUME,
    ),
    Fault(
        "legacy factors not loaded",
        "megatron/distributed.py",
        "self.optimizer.state[self._pairs[position][1]][key].copy_(mine)",
        "pass",
        LEGACY,
    ),
    Fault(
        "row factors saved as replicas of one tensor-parallel rank",
        "megatron/checkpoints/factors.py",
        "tensor + leaf.global_offset[axis] // leaf.local_shape[axis]",
        "tensor + 1",
        RESUME,
    ),
)


def survives(fault: Fault, folder: Path) -> bool:
    """Whether the tests pass in a copy of the repository with the fault in it."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in ("megatron_came", "scripts", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    file = copy / "megatron_came" / fault.file
    source = file.read_text()
    if source.count(fault.before) != 1:
        raise SystemExit(f"{fault.name}: {fault.file} does not hold its line exactly once.")
    file.write_text(source.replace(fault.before, fault.after))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += fault.tests.split()
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if done.returncode > 1:  # negative: a signal ended it, as a kernel may that reads elsewhere
        raise SystemExit(
            f"{fault.name}: pytest did not run.\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 0


def main() -> None:
    """Try the faults named on the command line, or all."""
    names = sys.argv[1:]
    unknown = set(names) - {fault.name for fault in FAULTS}
    if unknown:
        raise SystemExit(f"No fault is called {sorted(unknown)[0]!r}; FAULTS has their names.")
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        for fault in FAULTS:
            if names and fault.name not in names:
                continue
            alive = survives(fault, Path(folder))
            print(f"{'SURVIVES' if alive else 'noticed '}  {fault.name}", flush=True)
            survivors += [fault.name] * alive
    if survivors:
        raise SystemExit(f"{len(survivors)} of the faults were not noticed.")


if __name__ == "__main__":
    main()
