"""A prediction as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_came.memory.components import LABELS
from megatron_came.memory.grid import Grid
from megatron_came.memory.precisions import ADAMW, Optimizer
from megatron_came.memory.prediction import Launch, Stage, fullest
from megatron_came.memory.text import unit_of
from megatron_came.terminal.console import table, wrapped

# Of the JSON; to be raised by whoever changes its keys.
FORMAT = 1

_STATIC = [key for key in LABELS if key != "buffers"]
_NOTES = (
    "Activations are Megatron's own estimate, in the precision of the run, attention scores not "
    "counted.",
    "Not counted: the CUDA context, NCCL's buffers, kernels' workspaces, fragmentation.",
)


def text(launch: Launch, optimizers: Sequence[Optimizer], trained: Optimizer) -> list[str]:
    """Describe a launch.

    Args:
        launch: with all its stages.
        optimizers: the columns.
        trained: the optimizer of the stages' table.
    """
    worst = fullest(launch.stages, trained)
    lines = [
        f"{launch.parameters:,} parameters, {_precision(launch.args)}",
        *wrapped(_sizes(launch.grid)),
        "",
        *wrapped(
            f"The fullest rank: pipeline stage {worst.layout.stage}, {worst.layers} layers, "
            f"{worst.layout.parameters:,} parameters"
        ),
        "",
        *_columns(worst, optimizers),
        "",
    ]
    if len(launch.stages) > 1:
        lines += [f"The fullest rank of each pipeline stage, {trained.name}:", ""]
        lines += [*_stages(launch.stages, trained), ""]
    return [*lines, *(line for note in _NOTES for line in wrapped(note))]


def _precision(args: Any) -> str:
    weights = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    gradients = "fp32" if args.accumulate_allreduce_grads_in_fp32 else weights
    return f"{weights} weights, {gradients} gradients"


def gpus(count: int) -> str:
    """A number of GPUs."""
    return f"{count} GPU" + ("s" if count > 1 else "")


def _sizes(grid: Grid) -> str:
    sizes = {
        "tensor": grid.tensor,
        "context": grid.context,
        "pipeline": grid.pipeline,
        "data": grid.data,
    }
    said = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    said = gpus(grid.world) + (f": {said} parallel" if said else "")
    if grid.virtual:
        said += f", {grid.virtual} virtual stages"
    if grid.expert > 1 or grid.expert_tensor != grid.tensor:
        said += f"; experts: tensor {grid.expert_tensor} x expert {grid.expert} x data "
        said += str(grid.expert_data)
    if grid.sharded:
        said += "; distributed optimizer"
        said += f" in {grid.instances} instances" if grid.instances > 1 else ""
    return said


def _columns(stage: Stage, optimizers: Sequence[Optimizer]) -> list[str]:
    all_components = [stage.components(optimizer) for optimizer in optimizers]
    totals = [stage.total(optimizer) for optimizer in optimizers]
    name, unit = unit_of(max(totals))

    def row(label: str, sizes: Sequence[int]) -> list[str]:
        return [label, *(f"{size / unit:.3f}" for size in sizes)]

    def of(key: str) -> list[int]:
        return [getattr(each, key) for each in all_components]

    adamw = stage.total(ADAMW)
    per_parameter = [size / stage.layout.parameters for size in of("static")]
    return table(
        [
            [name, *(optimizer.name for optimizer in optimizers)],
            *(row(LABELS[key], of(key)) for key in _STATIC),
            row("static", of("static")),
            ["  bytes per parameter", *(f"{size:.2f}" for size in per_parameter)],
            row(LABELS["buffers"], of("buffers")),
            row("activations (estimate)", [stage.activations] * len(optimizers)),
            row("total", totals),
            row("saved against AdamW", [adamw - total for total in totals]),
            ["  of AdamW's total", *(f"{1 - total / adamw:.1%}" for total in totals)],
        ]
    )


def _stages(stages: Sequence[Stage], optimizer: Optimizer) -> list[str]:
    name, unit = unit_of(max(stage.total(optimizer) for stage in stages))
    cells: dict[str, Callable[[Stage], str]] = {
        "stage": lambda stage: str(stage.layout.stage),
        "layers": lambda stage: str(stage.layers),
        "parameters": lambda stage: f"{stage.layout.parameters:,}",
        "static": lambda stage: f"{stage.components(optimizer).static / unit:.3f}",
        "comm. and scratch": lambda stage: f"{stage.components(optimizer).buffers / unit:.3f}",
        "activations": lambda stage: f"{stage.activations / unit:.3f}",
        f"total, {name}": lambda stage: f"{stage.total(optimizer) / unit:.3f}",
    }
    return table([[*cells], *([cell(stage) for cell in cells.values()] for stage in stages)])


def as_json(launch: Launch, optimizers: Sequence[Optimizer], trained: Optimizer) -> dict[str, Any]:
    """Everything that :func:`text` says, and more of every stage."""
    grid = launch.grid
    return {
        "format": FORMAT,
        "ranks": grid.world,
        "sizes": {
            "tensor": grid.tensor,
            "context": grid.context,
            "pipeline": grid.pipeline,
            "virtual_pipeline": grid.virtual or 1,
            "data": grid.data,
            "expert": grid.expert,
            "expert_tensor": grid.expert_tensor,
            "expert_data": grid.expert_data,
        },
        "distributed_optimizer_instances": grid.instances if grid.sharded else 0,
        "parameters": launch.parameters,
        "fullest_stage": fullest(launch.stages, trained).layout.stage,
        "stages": [_stage_as_json(stage, optimizers) for stage in launch.stages],
    }


def _stage_as_json(stage: Stage, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    return {
        "stage": stage.layout.stage,
        "layers": stage.layers,
        "parameters": stage.layout.parameters,
        "dense_shard": stage.shards[0],
        "expert_shard": stage.shards[1],
        "activations_estimate": stage.activations,
        "bytes": {
            optimizer.name: {
                **stage.components(optimizer).as_dict(),
                "static": stage.components(optimizer).static,
                "total": stage.total(optimizer),
            }
            for optimizer in optimizers
        },
    }
