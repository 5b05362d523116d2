"""A variant of cases: bytes of a rank with FSDP around its first step, written as JSON."""

import json
from itertools import chain
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_came import CAME
from megatron_came.core.parameter_slice import gradient_of
from megatron_came.dtensors import local_of
from megatron_came.memory.measurement import component_of


def storages(tensors):
    """Sizes of the memory that tensors lie in, by address."""
    found = (local_of(tensor).untyped_storage() for tensor in tensors if tensor is not None)
    return {each.data_ptr(): each.nbytes() for each in found if each.nbytes()}


def size_of(tensors, without=()):
    found = storages(tensors)
    return sum(found[address] for address in found.keys() - set(without))


def buffers_of(model, name):
    """The data of Megatron-FSDP's buffers; none with FSDP2."""
    buffer = getattr(model, "param_and_grad_buffer", None)
    groups = getattr(buffer, "parameter_groups", ())
    return [own.data for group in groups if (own := getattr(group, name)) is not None]


def weights_of(model):
    kept = buffers_of(model, "model_weight_buffer")
    buffer = getattr(model, "param_and_grad_buffer", None)
    if buffer is None:
        return list(model.parameters())
    # Without a buffer they are the model's own, as they were before FSDP.
    return kept or [param for group in buffer.parameter_groups for param in group.params]


def gradients_of(model):
    return buffers_of(model, "main_grad_buffer") or [param.grad for param in model.parameters()]


def inner_of(optimizer):
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each.optimizer for each in chained if each.optimizer is not None]


def after(model, optimizer):
    """Bytes by component, but for gradients, which a step may drop."""
    inner = inner_of(optimizer)
    weights = storages(weights_of(model))
    updated = [p for each in inner for group in each.param_groups for p in group["params"]]
    sizes = {"weights": sum(weights.values()), "momentum": 0, "second_moment": 0, "host": 0}
    for states in chain.from_iterable(each.state.values() for each in inner):
        for key, value in states.items():
            if isinstance(value, torch.Tensor) and key != "step":
                sizes[component_of(key)] += size_of([value])
    main = buffers_of(model, "main_weight_buffer") or updated
    sizes["main_weights"] = size_of(main, weights)
    copies = size_of((gradient_of(param) for param in updated), storages(gradients_of(model)))
    sums = size_of(chain.from_iterable(each.sums for each in inner if isinstance(each, CAME)))
    return {**sizes, "buffers": copies + sums}


def measured():
    """Measure around the first step, and write into the folder of --came-memory-dir."""
    from megatron.training import get_args, training

    original = training.train_step

    def train_step(forward, data, model, optimizer, *args, **kwargs):
        step, seen = optimizer.step, {}

        def watched(*args, **kwargs):
            seen["gradients"] = size_of(gradients_of(model[0]))
            result = step(*args, **kwargs)
            seen.update(after(model[0], optimizer))
            return result

        with mock.patch.object(optimizer, "step", watched):
            result = original(forward, data, model, optimizer, *args, **kwargs)
        folder = Path(get_args().came_memory_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
        return result

    return mock.patch.object(training, "train_step", train_step)
