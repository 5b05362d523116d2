"""``--came-report-memory``: the memory of the run, measured after its first optimizer step."""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_came.megatron.errors import UnsupportedError
from megatron_came.memory.components import LABELS, Components
from megatron_came.memory.measurement import Allocated, measure, parameters, watch_step
from megatron_came.memory.records import Record, describe, fullest, line
from megatron_came.patching import Function

_ALLOCATED = [field.name for field in fields(Allocated)]

# Optimizers whose first step has been reported.
_reported: weakref.WeakSet[Any] = weakref.WeakSet()


def with_report(original: Function) -> Function:
    """Let Megatron's training step report, where ``--came-report-memory`` asks for it."""

    def train_step(
        forward_step_func: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **kwargs: Any
    ) -> Any:
        from megatron.training.global_vars import get_args

        args = get_args()
        if not getattr(args, "came_report_memory", False) or optimizer in _reported:
            return original(forward_step_func, data, model, optimizer, *rest, **kwargs)
        with watch_step(model, optimizer) as allocated:
            result = original(forward_step_func, data, model, optimizer, *rest, **kwargs)
        skipped = result[1]
        if not skipped:
            _reported.add(optimizer)
            _report(args, model, optimizer, allocated[-1] if allocated else None)
        return result

    return train_step


def _report(
    args: argparse.Namespace, model: Sequence[Any], optimizer: Any, allocated: Allocated | None
) -> None:
    from megatron.core.distributed import DistributedDataParallel

    if not isinstance(model[0], DistributedDataParallel):
        _say("--came-report-memory measures Megatron's own DistributedDataParallel, not FSDP.")
        return
    record = _record(args, model, optimizer, allocated)
    folder = _folder(args)
    if folder is not None:
        record.write(folder)
    records = _gather(record)
    _say("\n".join(_text(records, folder)))
    _write_to_tensorboard(args, fullest(records))


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def _folder(args: argparse.Namespace) -> Path | None:
    if args.came_memory_dir:
        return Path(args.came_memory_dir)
    return Path(args.save) / "came_memory" if args.save else None


def _record(
    args: argparse.Namespace, model: Sequence[Any], optimizer: Any, allocated: Allocated | None
) -> Record:
    from megatron.core import parallel_state

    from megatron_came.memory.precisions import of_launch

    kind = of_launch(args)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    predicted = activations = problem = None
    try:
        predicted, activations = _predict(args, model, stage)
    except UnsupportedError as error:
        problem = str(error)
    return Record(
        rank=dist.get_rank(),
        stage=stage,
        optimizer=kind.name if kind is not None else args.optimizer,
        parameters=parameters(model),
        measured=measure(model, optimizer),
        predicted=predicted,
        activations=activations,
        allocator=None if allocated is None else allocated.as_dict(),
        problem=problem,
    )


def _predict(args: argparse.Namespace, model: Sequence[Any], stage: int) -> tuple[Components, int]:
    """This rank's components and activations, from the flags; nothing of the run's tensors."""
    from megatron_came.memory.precisions import of_launch
    from megatron_came.memory.prediction import Launch

    optimizer = of_launch(args)
    if optimizer is None:
        raise UnsupportedError(f"the state of --optimizer {args.optimizer} is not known here.")
    launch = Launch(args)
    shards = (
        (model[0].intra_dp_cp_group.rank(), model[0].intra_expt_dp_group.rank())
        if args.use_distributed_optimizer
        else (0, 0)
    )
    predicted = launch.rank(stage, shards)
    count = predicted.layout.parameters
    if count != parameters(model):
        raise UnsupportedError(
            f"the flags describe a GPT model of {count} parameters on this rank, and the run has "
            f"another one, of {parameters(model)}."
        )
    return predicted.components(optimizer), predicted.activations


def _gather(record: Record) -> list[Record]:
    """The records of all ranks, by rank, without the reasons for missing predictions."""
    missing = [-1] * len(LABELS)
    values = [
        record.stage,
        record.parameters,
        *record.measured.as_dict().values(),
        *(missing if record.predicted is None else record.predicted.as_dict().values()),
        -1 if record.activations is None else record.activations,
        *(record.allocator or dict.fromkeys(_ALLOCATED, -1)).values(),
    ]
    mine = torch.tensor(values, dtype=torch.int64, device=torch.cuda.current_device())
    all_values = mine.new_empty(dist.get_world_size() * len(values))
    dist.all_gather_into_tensor(all_values, mine)
    return [
        record if rank == record.rank else _from_values(record, rank, row)
        for rank, row in enumerate(all_values.view(-1, len(values)).tolist())
    ]


def _from_values(mine: Record, rank: int, values: list[int]) -> Record:
    parts = iter(values)
    stage, count = next(parts), next(parts)
    measured, predicted = ({key: next(parts) for key in LABELS} for _ in range(2))
    activations = next(parts)
    allocator = dict(zip(_ALLOCATED, parts, strict=True))
    return Record(
        rank=rank,
        stage=stage,
        optimizer=mine.optimizer,
        parameters=count,
        measured=Components(**measured),
        predicted=None if predicted["weights"] < 0 else Components(**predicted),
        activations=None if activations < 0 else activations,
        allocator=None if allocator["after"] < 0 else allocator,
        problem="its report says why." if predicted["weights"] < 0 else None,
    )


def _text(records: Sequence[Record], folder: Path | None) -> list[str]:
    stages: dict[int, list[Record]] = {}
    for record in records:
        stages.setdefault(record.stage, []).append(record)
    lines = ["", "Memory after the first optimizer step, of the fullest rank", ""]
    lines += describe(fullest(records))
    if len(records) > 1:
        lines += ["", "The fullest rank of each pipeline stage:"]
        lines += [line(fullest(stages[stage])) for stage in sorted(stages)]
    if folder is not None:
        lines += ["", f"Every rank's report: {folder}"]
    return [*lines, ""]


def _write_to_tensorboard(args: argparse.Namespace, record: Record) -> None:
    """Write the fullest rank's bytes where Megatron has a writer: on the last rank."""
    from megatron.training.global_vars import get_tensorboard_writer

    writer = get_tensorboard_writer()
    if writer is None:
        return
    iteration = getattr(args, "curr_iteration", 0) + 1
    for kind, values in (("measured", record.measured), ("predicted", record.predicted)):
        if values is not None:
            for key, size in values.as_dict().items():
                writer.add_scalar(f"memory-MiB/{key}-{kind}", size / 2**20, iteration)
    for key, size in (record.allocator or {}).items():
        writer.add_scalar(f"memory-MiB/allocator-{key}", size / 2**20, iteration)


def with_flags(original: Function) -> Function:
    """Let a function that adds Megatron's flags to a parser add those of the report."""

    def add_megatron_arguments(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        group = parser.add_argument_group(title="memory of a run, with any --optimizer")
        group.add_argument(
            "--came-report-memory",
            action="store_true",
            help="print each rank's memory after the first optimizer step, measured and predicted; "
            "resets the peak of CUDA's allocator once",
        )
        group.add_argument(
            "--came-memory-dir",
            help="folder for the report of every rank (default: came_memory in the folder of "
            "--save)",
        )
        return parser

    return add_megatron_arguments
