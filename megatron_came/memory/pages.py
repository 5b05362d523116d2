"""A prediction as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_came.memory.optimizers import (
    ADAMW,
    HOST,
    LABELS,
    ROWS,
    Optimizer,
    element_bytes,
    has_fsdp,
    is_sharded,
    name_of_fsdp,
)
from megatron_came.terminal.console import counted, table, wrapped

if TYPE_CHECKING:
    from megatron_came.memory.grid import Grid
    from megatron_came.memory.prediction import Launch
    from megatron_came.memory.stages import Stage

# Of the JSON; to be raised by whoever changes its keys.
FORMAT = 2

ACTIVATIONS = "activations (estimate)"
_COPIES = "or: copies in the step"
_NOTES = (
    "Activations are Megatron's own estimate, in the precision of the run, attention scores not "
    "counted.",
    "Not counted: the CUDA context, NCCL's buffers, kernels' workspaces, fragmentation; on a GPU "
    "up to 36 MiB of partial sums for each optimizer of CAME that Megatron builds.",
)
_NOTE_ON_COPIES = (
    "In a step, when activations are gone, Adam copies moments of 8 bits to fp32, Lion and Muon "
    "gather all weights in a copy: the total has what is more. Counted, not measured."
)
_NOTE_ON_STEPS_BACK = (
    "With --came-spike-guard CAME copies r, c and v for the length of a step, when activations are "
    "gone."
)
_NOTE_ON_OFFLOAD = (
    "What CAME has on the CPU, for each GPU, is in no other row: state, and copies of gradients "
    "and weights that travel. The other optimizers are not offloaded here. As a run starts, the "
    "main weights of all are made on the GPU before some move."
)
_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def unit_of(largest: float) -> tuple[str, int]:
    """The largest unit that ``largest`` bytes are at least one of, and its bytes."""
    return next((unit for unit in _UNITS.items() if largest >= unit[1]), ("KiB", 2**10))


def human(size: float) -> str:
    """A size with its unit."""
    name, unit = unit_of(abs(size))
    return f"{size / unit:.2f} {name}"


def sizes_of(grid: Grid) -> str:
    """The parallel sizes above 1, such as "tensor 2 x data 4"."""
    names = ("tensor", "context", "pipeline", "data")
    return " x ".join(f"{name} {size}" for name in names if (size := getattr(grid, name)) > 1)


def bytes_table(
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[int | str | None]]],
) -> list[str]:
    """A table in one unit of bytes, which its upper left corner names; of numbers, that is."""
    largest = max((cell for _, cells in rows for cell in cells if isinstance(cell, int)), default=0)
    name, unit = unit_of(largest)

    def shown(cell: int | str | None) -> str:
        return f"{cell / unit:.3f}" if isinstance(cell, int) else cell or ""

    return table([[name, *heads], *([label, *map(shown, cells)] for label, cells in rows)])


def text(launch: Launch, optimizers: Sequence[Optimizer], trained: Optimizer) -> list[str]:
    """Describe a launch, with a column for each optimizer; stages with the trained one alone."""
    worst = launch.fullest(trained)
    names = {2: "bf16" if launch.args.bf16 else "fp16", 4: "fp32"}
    weights, gradients = (names[size] for size in element_bytes(launch.args))
    lines = [
        f"{launch.parameters:,} parameters, {weights} weights, {gradients} gradients",
        *wrapped(_layout(launch)),
        "",
        *wrapped(
            f"The fullest rank: pipeline stage {worst.number}, {counted(worst.layers, 'layer')}, "
            f"{worst.parameters:,} parameters"
        ),
        "",
        *_columns(worst, optimizers),
        "",
    ]
    if len(launch.stages) > 1:
        lines += [f"The fullest rank of each pipeline stage, {trained.name}:", ""]
        lines += [*_stages(launch.stages, trained), ""]
    notes = [*_NOTES]
    notes += _made_whole(launch, worst)
    copying = [optimizer for optimizer in optimizers if worst.step(optimizer)]
    if not all(optimizer.steps_back for optimizer in copying):
        notes.append(_NOTE_ON_COPIES)
    if any(optimizer.steps_back for optimizer in copying):
        notes.append(_NOTE_ON_STEPS_BACK)
    if trained.offloads:
        notes.append(_NOTE_ON_OFFLOAD)
    if size := worst.checkpoint(trained):
        notes.append(
            f"While a checkpoint is saved or loaded, {trained.name} takes up to {human(size)} "
            "beside what is static, and no activations."
        )
    return [*lines, *(line for note in notes for line in wrapped(note))]


def _made_whole(launch: Launch, stage: Stage) -> list[str]:
    """What FSDP makes for a while, which is not counted."""
    if not has_fsdp(launch.args):
        return []
    from megatron_came.memory import fsdp  # imports Megatron, as only a prediction need

    sizes = fsdp.made_whole(launch.args, launch.chunks[stage.number])
    named = zip(("weights", "gradients"), sizes, strict=True)
    what = [f"{human(size)} of {name}" for name, size in named if size]
    if not what:
        return []
    return [
        "Nor counted: layers are whole while they compute, at least the largest, "
        f"{' and '.join(what)}, and what is fetched ahead."
    ]


def _layout(launch: Launch) -> str:
    grid = launch.grid
    sizes = sizes_of(grid)
    said = counted(grid.world, "GPU") + (f": {sizes} parallel" if sizes else "")
    if grid.virtual:
        said += f", {grid.virtual} virtual stages"
    if grid.expert > 1 or grid.expert_tensor != grid.tensor:
        said += f"; experts: tensor {grid.expert_tensor} x expert {grid.expert} x data "
        said += str(grid.expert_data)
    if has_fsdp(launch.args):
        said += f"; {name_of_fsdp(launch.args)}"
    elif grid.sharded:
        said += "; distributed optimizer"
        said += f" in {grid.instances} instances" if grid.instances > 1 else ""
    return said


def _columns(stage: Stage, optimizers: Sequence[Optimizer]) -> list[str]:
    components = [stage.components(optimizer) for optimizer in optimizers]
    totals = [stage.total(optimizer) for optimizer in optimizers]
    adamw = stage.total(ADAMW)
    rows: list[tuple[str, list[int | str | None]]] = [
        (label, [getattr(each, key) for each in components]) for key, label in ROWS.items()
    ]
    per_parameter = [each.static / stage.parameters for each in components]
    # Behind "static", of which it is.
    rows.insert(-1, ("  bytes per parameter", [f"{size:.2f}" for size in per_parameter]))
    rows.append((ACTIVATIONS, [stage.activations] * len(optimizers)))
    copies = [stage.step(optimizer) for optimizer in optimizers]
    if any(copies):
        rows.append((_COPIES, [*copies]))
    rows += [
        ("total", [*totals]),
        ("saved against AdamW", [adamw - total for total in totals]),
        ("  of AdamW's total", [f"{1 - total / adamw:.1%}" for total in totals]),
    ]
    if any(each.host for each in components):
        rows.append((HOST, [each.host for each in components]))
    return bytes_table([optimizer.name for optimizer in optimizers], rows)


def _stages(stages: Sequence[Stage], optimizer: Optimizer) -> list[str]:
    name, unit = unit_of(max(stage.total(optimizer) for stage in stages))
    rows = [["stage", "layers", "parameters", "static", "comm. and scratch", "activations"]]
    rows[0].append(f"total, {name}")
    for stage in stages:
        components = stage.components(optimizer)
        sizes = (components.static, components.buffers, stage.activations, stage.total(optimizer))
        rows.append([str(stage.number), str(stage.layers), f"{stage.parameters:,}"])
        rows[-1] += [f"{size / unit:.3f}" for size in sizes]
    return table(rows)


def bars(stage: Stage, optimizers: Sequence[Optimizer]) -> tuple[dict[str, dict[str, float]], str]:
    """What a rank holds, as a stacked bar for each optimizer, and the unit of the bars."""
    name, unit = unit_of(max(stage.total(optimizer) for optimizer in optimizers))
    more = {each.name: stage.working(each) - stage.activations for each in optimizers}
    found = {}
    for optimizer in optimizers:
        components = stage.components(optimizer)
        heights = {label: getattr(components, key) / unit for key, label in LABELS.items()}
        heights[ACTIVATIONS] = stage.activations / unit
        if any(more.values()):
            heights["what a step's copies take more"] = more[optimizer.name] / unit
        found[optimizer.name.replace(" ", "\n", 1)] = heights  # bars are narrow
    return found, f"{name} on the fullest rank"


def as_json(launch: Launch, optimizers: Sequence[Optimizer], trained: Optimizer) -> dict[str, Any]:
    """Everything that :func:`text` says, and more of every stage."""
    grid = launch.grid
    data = ("data", "expert", "expert_tensor", "expert_data")
    return {
        "format": FORMAT,
        "ranks": grid.world,
        "sizes": {
            **{name: getattr(grid, name) for name in ("tensor", "context", "pipeline")},
            "virtual_pipeline": grid.virtual or 1,
            **{name: getattr(grid, name) for name in data},
        },
        "distributed_optimizer_instances": grid.instances if is_sharded(launch.args) else 0,
        "parameters": launch.parameters,
        "fullest_stage": launch.fullest(trained).number,
        "stages": [
            {
                "stage": stage.number,
                "layers": stage.layers,
                "parameters": stage.parameters,
                "dense_shard": stage.shards[0],
                "expert_shard": stage.shards[1],
                "activations_estimate": stage.activations,
                "bytes": {
                    optimizer.name: {
                        **asdict(stage.components(optimizer)),
                        "static": stage.components(optimizer).static,
                        "step_copies": stage.step(optimizer),
                        "total": stage.total(optimizer),
                        "checkpoint": stage.checkpoint(optimizer),
                    }
                    for optimizer in optimizers
                },
            }
            for stage in launch.stages
        ],
    }
