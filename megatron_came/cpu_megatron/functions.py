"""Stand-ins for the few functions of Megatron itself that take a GPU for granted."""

from __future__ import annotations

from typing import Any

import torch

from megatron_came.patching import Function, around


def nothing(original: Function | None) -> Function:
    """Stand in for a function that has nothing to do on a CPU."""
    return lambda *args, **kwargs: None


def absent(original: Function | None) -> None:
    """Stand for a function of Transformer Engine, which is not there."""


@around
def local_layers_of_bert(original: Function) -> Any:
    """Build BERT of Megatron's own layers, where its script asks for Transformer Engine's."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec

    return bert_layer_local_spec


@around
def forking(
    original: Function, cls: type, rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any
) -> Any:
    """Fork the process that writes checkpoints in the background.

    Megatron starts it afresh, since a forked process cannot use CUDA; a fresh one would not have
    the stand-ins.
    """
    return original(cls, rank, "fork", *args, **kwargs)


@around
def copying(original: Function, self: Any, *args: Any, **kwargs: Any) -> None:
    """Copy the tensors of a checkpoint before they are written.

    From a GPU they are copied anyway. Those of a CPU are not, and training would go on to change
    tensors that a process in the background is writing.
    """
    original(self, *args, **kwargs)
    self.write_buckets = [
        (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
        for path, key, (data, tensors) in self.write_buckets
    ]


@around
def to_numbers(
    original: Function, tensor: Any, as_numpy: bool = False, record_stream: bool = False
) -> Any:
    """Hand the sizes of an all-to-all among experts over as numbers.

    Megatron makes numbers of them on the way from a GPU, and only there.
    """
    moved = original(tensor, as_numpy, record_stream)
    return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved


@around
def backward_of_kept(
    original: Function, output: torch.Tensor, gradient: torch.Tensor | None
) -> None:
    """Go backward from an output that has been kept: Megatron checks that its storage is free."""
    if gradient is None:
        gradient = torch.ones_like(output)
    torch.autograd.backward(output, gradient)
