"""``--came-report-memory``: the memory of the run, measured after its first optimizer step.

Every rank makes a :class:`Report`, with what was predicted of it: a JSON file, and text.
"""

import argparse
import json
import sys
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megatron_came import memory, voice
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.run import run_args
from megatron_came.memory.measurement import measure, watch_step
from megatron_came.memory.model_kinds import kind_of
from megatron_came.memory.optimizers import HOST, ROWS, Components, is_sharded, of_launch
from megatron_came.memory.pages import ACTIVATIONS, bytes_table, human
from megatron_came.patching import Function

# Of the file; to be raised by whoever changes its keys.
FORMAT = 2

_ALLOCATOR = {
    "peak_before": "peak before the optimizer step",
    "before": "as the step begins",
    "peak_during": "peak during the step",
    "after": "as it ends",
}


@dataclass(frozen=True, slots=True)
class Report:
    """A rank's memory, in bytes."""

    rank: int
    stage: int  # of the pipeline
    optimizer: str  # what it trains with, as the columns of predictions are named
    parameters: int  # elements of its weights
    measured: Components  # its tensors
    # What was expected of them; None where it cannot be predicted.
    predicted: Components | None = None
    activations: int | None = None  # predicted activations; None likewise
    # What CUDA's allocator had given out around the optimizer step, by the keys of ``_ALLOCATOR``;
    # None without CUDA.
    allocator: dict[str, int] | None = None
    problem: str | None = None  # why there is no prediction

    def write(self, folder: Path) -> None:
        """Write the rank's file into a folder, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {"format": FORMAT, **asdict(self)}
        (folder / f"rank-{self.rank:05d}.json").write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a rank's file.

        Raises:
            ValueError: it is none, or of another format.
            OSError: it cannot be read.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            if values.pop("format") != FORMAT:
                raise ValueError(f"it is not of format {FORMAT}")
            for key in ("measured", "predicted"):
                values[key] = values[key] and Components(**values[key])
            return cls(**values)
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path} is no report of --came-report-memory ({what}): name the files that a run "
                "has written."
            ) from error

    def table(self) -> list[str]:
        """What was measured, and what was predicted."""
        measured, predicted = self.measured, self.predicted
        rows: list[tuple[str, list[int | None]]] = [
            (label, [getattr(measured, key), getattr(predicted, key, None)])
            for key, label in ROWS.items()
        ]
        if predicted is not None and self.activations is not None:
            rows.append((ACTIVATIONS, [None, self.activations]))
            rows.append(("total", [None, predicted.total + self.activations]))
        if measured.host:
            rows.append((HOST, [measured.host, getattr(predicted, "host", None)]))
        for key, size in (self.allocator or {}).items():
            rows.append((f"allocator, {_ALLOCATOR[key]}", [size, None]))
        lines = [f"rank {self.rank}, pipeline stage {self.stage}, {self.optimizer}"]
        lines += bytes_table(["measured", "predicted"], rows)
        if self.problem:
            lines.append(f"There is no prediction: {self.problem}")
        if self.allocator is None:
            lines.append("Tensors alone were measured: there is no CUDA allocator to ask.")
        return lines

    def line(self) -> str:
        """The same in one line."""
        measured = self.measured.static
        said = f"rank {self.rank:>5}, stage {self.stage:>3}: {human(measured)} static"
        if self.predicted is not None and (predicted := self.predicted.static):
            said += f", predicted {human(predicted)} ({measured / predicted - 1:+.2%})"
        if self.allocator is not None:
            peak = max(self.allocator["peak_before"], self.allocator["peak_during"])
            said += f"; allocator's peak {human(peak)}"
        return said


def fullest(reports: Sequence[Report]) -> Report:
    """The report of the rank that holds most."""
    return max(reports, key=lambda report: report.measured.total)


# Optimizers whose first step has been reported.
_reported: weakref.WeakSet[Any] = weakref.WeakSet()


def with_flags(
    original: Function, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any
) -> Any:
    """Let a function that adds Megatron's flags to a parser add those of the report as well."""
    parser = original(parser, *args, **kwargs)
    group = parser.add_argument_group(title="memory, of any optimizer")
    help = "print each rank's memory after the first optimizer step, measured and predicted, "
    help += "with any --optimizer; resets the peak of CUDA's allocator once"
    group.add_argument("--came-report-memory", action="store_true", help=help)
    help = "folder for the report of every rank (default: came_memory in the folder of --save)"
    group.add_argument("--came-memory-dir", help=help)
    return parser


def with_report(
    original: Function,
    forward_step_func: Any,
    data: Any,
    model: Any,
    optimizer: Any,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Let Megatron's training step report, where ``--came-report-memory`` asks for it."""
    args = run_args()
    if not getattr(args, "came_report_memory", False) or optimizer in _reported:
        return original(forward_step_func, data, model, optimizer, *rest, **kwargs)
    with watch_step(model, optimizer) as allocated:
        result = original(forward_step_func, data, model, optimizer, *rest, **kwargs)
    skipped = result[1]
    if not skipped:  # without a step there may be no state yet
        _reported.add(optimizer)
        _report(args, model, optimizer, allocated[-1] if allocated else None)
    return result


def _report(
    args: argparse.Namespace,
    model: Sequence[Any],
    optimizer: Any,
    allocator: dict[str, int] | None,
) -> None:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.training import print_rank_0

    if not isinstance(model[0], DistributedDataParallel):
        print_rank_0(
            "--came-report-memory measures Megatron's own DistributedDataParallel, not FSDP."
        )
        return
    report = _report_of(args, model, optimizer, allocator)
    folder = folder_of(args)
    if folder is not None:
        report.write(folder)
    reports = voice.of_all_ranks(report)
    print_rank_0("\n".join(_text(reports, folder)))
    _write_to_tensorboard(args, fullest(reports))


def folder_of(args: argparse.Namespace) -> Path | None:
    """Where the ranks write their reports; None for nowhere."""
    if args.came_memory_dir:
        return Path(args.came_memory_dir)
    return Path(args.save) / "came_memory" if args.save else None


def _report_of(
    args: argparse.Namespace,
    model: Sequence[Any],
    optimizer: Any,
    allocator: dict[str, int] | None,
) -> Report:
    """Measure this rank, and predict it from the flags, with nothing of the run's tensors."""
    from megatron.core import parallel_state

    kind = of_launch(args)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    parameters = sum(param.numel() for chunk in model for param in chunk.parameters())
    shards = (0, 0)
    if is_sharded(args):
        shards = (model[0].intra_dp_cp_group.rank(), model[0].intra_expt_dp_group.rank())
    predicted = activations = problem = None
    try:
        memory.check_release()
        from megatron_came.memory.prediction import Launch

        if kind is None:
            raise UnsupportedError(f"the state of --optimizer {args.optimizer} is not known here.")
        kinds = {**vars(args), "model_kind": kind_of(sys.argv[0])}
        rank = Launch(argparse.Namespace(**kinds)).rank(stage, shards)
        if rank.parameters != parameters:
            raise UnsupportedError(
                f"the flags describe a GPT model of {rank.parameters} parameters on this rank, and "
                f"the run has another one, of {parameters}."
            )
        predicted, activations = rank.components(kind), rank.activations
    except UnsupportedError as error:
        problem = str(error)
    return Report(
        rank=voice.rank(),
        stage=stage,
        optimizer=args.optimizer if kind is None else kind.name,
        parameters=parameters,
        measured=measure(model, optimizer),
        predicted=predicted,
        activations=activations,
        allocator=allocator,
        problem=problem,
    )


def _text(reports: Sequence[Report], folder: Path | None) -> list[str]:
    stages: dict[int, list[Report]] = {}
    for report in reports:
        stages.setdefault(report.stage, []).append(report)
    lines = ["", "Memory after the first optimizer step, of the fullest rank", ""]
    lines += fullest(reports).table()
    if len(reports) > 1:
        lines += ["", "The fullest rank of each pipeline stage:"]
        lines += [fullest(stages[stage]).line() for stage in sorted(stages)]
    if folder is not None:
        lines += ["", f"Every rank's report: {folder}"]
    return [*lines, ""]


def _write_to_tensorboard(args: argparse.Namespace, report: Report) -> None:
    """Write the fullest rank's bytes where Megatron has a writer: on the last rank."""
    from megatron.training.global_vars import get_tensorboard_writer

    writer = get_tensorboard_writer()
    if writer is None:
        return
    sizes = {f"allocator-{key}": size for key, size in (report.allocator or {}).items()}
    for kind, values in (("measured", report.measured), ("predicted", report.predicted)):
        if values is not None:
            sizes |= {f"{key}-{kind}": size for key, size in asdict(values).items()}
    for name, size in sizes.items():
        iteration = getattr(args, "curr_iteration", 0) + 1  # it is that of the one before
        writer.add_scalar(f"memory-MiB/{name}", size / 2**20, iteration)
