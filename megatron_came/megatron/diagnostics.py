"""``--came-log-diagnostics``: what CAME's steps do, in Megatron's own logs."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_came.core.diagnostics import Sums, kind_of
from megatron_came.dtensors import is_dtensor
from megatron_came.megatron.parameter_names import named_parameters
from megatron_came.megatron.run import run_args
from megatron_came.megatron.sharding import chain_of
from megatron_came.patching import Function


def logged(
    original: Function,
    forward_step_func: Any,
    data: Any,
    model: Any,
    optimizer: Any,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Write figures of a step that was taken, at the log interval."""
    result = original(forward_step_func, data, model, optimizer, *rest, **kwargs)
    args = run_args()
    iteration = getattr(args, "curr_iteration", 0) + 1
    is_asked = getattr(args, "came_log_diagnostics", False) and args.optimizer == "came"
    is_skipped = result[1]  # by an overflow, or the guard
    if is_asked and not is_skipped and iteration % args.log_interval == 0:
        _write(figures_of(model, optimizer), iteration)
    return result


def figures_of(model: Sequence[Any], optimizer: Any) -> dict[str, dict[str, float]]:
    """Return the figures of the whole model, after a step and before its gradients are gone.

    A collective.
    """
    kinds = {param: kind_of(name) for name, param in named_parameters(model)}
    total = Sums.zero()
    for each in (chain := chain_of(optimizer)):
        sums = Sums.zero()
        if each.optimizer is not None:
            pairs = ((local, kinds.get(param, "other")) for param, local in each._pairs)
            sums = each.optimizer.measure(dict(pairs))
        total.added.add_(reduced(sums.added, each))
        largest = reduced(sums.largest, each, dist.ReduceOp.MAX)
        torch.maximum(total.largest, largest, out=total.largest)
    figures = total.figures()
    if chain[0].spike_guard is not None:
        figures["all"]["skipped_steps"] = chain[0].spike_guard.skipped
    return figures


def reduced(values: torch.Tensor, wrapper: Any, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Return values, on the CPU, reduced over the ranks among which an optimizer's state lies."""
    groups = [wrapper.get_grad_stats_parallel_group()]
    # Megatron adds norms of FSDP2's gradients up over its mesh as well, which this group has not.
    meshes = (local.device_mesh for _, local in wrapper._pairs if is_dtensor(local))
    groups += [mesh.get_group() for mesh in itertools.islice(meshes, 1)]  # all lie on the same
    values = values.to("cuda" if dist.get_backend(groups[0]) == "nccl" else "cpu", copy=True)
    for group in groups:
        dist.all_reduce(values, op=op, group=group)
    return values.cpu()


def _write(figures: Mapping[str, Mapping[str, float]], iteration: int) -> None:
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    for kind, values in figures.items():
        named = {f"came-{key.replace('_', '-')}/{kind}": value for key, value in values.items()}
        if (wandb := get_wandb_writer()) is not None:
            wandb.log(named, iteration)
        if (writer := get_tensorboard_writer()) is not None:
            for name, value in named.items():
                writer.add_scalar(name, value, iteration)
