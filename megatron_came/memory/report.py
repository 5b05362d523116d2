"""``--came-report-memory``: the memory of the run, measured after its first optimizer step."""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_came.megatron.errors import UnsupportedError
from megatron_came.memory.measurement import measure, watch_step
from megatron_came.memory.optimizers import of_launch
from megatron_came.memory.records import Record, fullest

# Optimizers whose first step has been reported.
_reported: weakref.WeakSet[Any] = weakref.WeakSet()


def with_flags(original: Any) -> Any:
    """Let a function that adds Megatron's flags to a parser add those of the report as well."""

    def add_megatron_arguments(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        group = parser.add_argument_group(title="memory, of any optimizer")
        group.add_argument(
            "--came-report-memory",
            action="store_true",
            help="print each rank's memory after the first optimizer step, measured and predicted, "
            "with any --optimizer; resets the peak of CUDA's allocator once",
        )
        group.add_argument(
            "--came-memory-dir",
            help="folder for the report of every rank (default: came_memory in the folder of "
            "--save)",
        )
        return parser

    return add_megatron_arguments


def with_report(original: Any) -> Any:
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
    record = _record(args, model, optimizer, allocator)
    folder = folder_of(args)
    if folder is not None:
        record.write(folder)
    records = [record] * dist.get_world_size()
    dist.all_gather_object(records, record)
    print_rank_0("\n".join(_text(records, folder)))
    _write_to_tensorboard(args, fullest(records))


def folder_of(args: argparse.Namespace) -> Path | None:
    """Where the ranks write their reports; None for nowhere."""
    if args.came_memory_dir:
        return Path(args.came_memory_dir)
    return Path(args.save) / "came_memory" if args.save else None


def _record(
    args: argparse.Namespace,
    model: Sequence[Any],
    optimizer: Any,
    allocator: dict[str, int] | None,
) -> Record:
    """Measure this rank, and predict it from the flags, with nothing of the run's tensors."""
    from megatron.core import parallel_state

    from megatron_came.memory.prediction import Launch

    kind = of_launch(args)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    parameters = sum(param.numel() for chunk in model for param in chunk.parameters())
    shards = (0, 0)
    if args.use_distributed_optimizer:
        shards = (model[0].intra_dp_cp_group.rank(), model[0].intra_expt_dp_group.rank())
    predicted = activations = problem = None
    try:
        if kind is None:
            raise UnsupportedError(f"the state of --optimizer {args.optimizer} is not known here.")
        rank = Launch(args).rank(stage, shards)
        if rank.parameters != parameters:
            raise UnsupportedError(
                f"the flags describe a GPT model of {rank.parameters} parameters on this rank, and "
                f"the run has another one, of {parameters}."
            )
        predicted, activations = rank.components(kind), rank.activations
    except UnsupportedError as error:
        problem = str(error)
    return Record(
        rank=dist.get_rank(),
        stage=stage,
        optimizer=args.optimizer if kind is None else kind.name,
        parameters=parameters,
        measured=measure(model, optimizer),
        predicted=predicted,
        activations=activations,
        allocator=allocator,
        problem=problem,
    )


def _text(records: Sequence[Record], folder: Path | None) -> list[str]:
    stages: dict[int, list[Record]] = {}
    for record in records:
        stages.setdefault(record.stage, []).append(record)
    lines = ["", "Memory after the first optimizer step, of the fullest rank", ""]
    lines += fullest(records).table()
    if len(records) > 1:
        lines += ["", "The fullest rank of each pipeline stage:"]
        lines += [fullest(stages[stage]).line() for stage in sorted(stages)]
    if folder is not None:
        lines += ["", f"Every rank's report: {folder}"]
    return [*lines, ""]


def _write_to_tensorboard(args: argparse.Namespace, record: Record) -> None:
    """Write the fullest rank's bytes where Megatron has a writer: on the last rank."""
    from megatron.training.global_vars import get_tensorboard_writer

    writer = get_tensorboard_writer()
    if writer is None:
        return
    sizes = {f"allocator-{key}": size for key, size in (record.allocator or {}).items()}
    for kind, values in (("measured", record.measured), ("predicted", record.predicted)):
        if values is not None:
            sizes |= {f"{key}-{kind}": size for key, size in asdict(values).items()}
    for name, size in sizes.items():
        iteration = getattr(args, "curr_iteration", 0) + 1
        writer.add_scalar(f"memory-MiB/{name}", size / 2**20, iteration)
