"""Stand-ins for the few functions of Megatron itself that take a GPU for granted."""

from __future__ import annotations

from typing import Any

import torch

from megatron_came.patching import Function


def nothing(original: Function | None) -> Function:
    """Stand in for a function that has nothing to do on a CPU."""
    return lambda *args, **kwargs: None


def absent(original: Function | None) -> None:
    """Stand for a function of Transformer Engine, which is not there."""


def local_layers_of_bert(original: Function) -> Function:
    """Build BERT of Megatron's own layers, where its script asks for Transformer Engine's."""

    def get_bert_layer_with_transformer_engine_spec() -> Any:
        from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec

        return bert_layer_local_spec

    return get_bert_layer_with_transformer_engine_spec


def forking(original: Function) -> Function:
    """Fork the process that writes checkpoints in the background.

    Megatron starts it afresh, since a forked process cannot use CUDA; a fresh one would not have
    the stand-ins.
    """

    def get_process(cls: type, rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any) -> Any:
        return original(cls, rank, "fork", *args, **kwargs)

    return get_process


def copying(original: Function) -> Function:
    """Copy the tensors of a checkpoint before they are written.

    From a GPU they are copied anyway. Those of a CPU are not, and training would go on to change
    tensors that a process in the background is writing.
    """

    def prepare_write_data(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.write_buckets = [
            (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (data, tensors) in self.write_buckets
        ]

    return prepare_write_data


def to_numbers(original: Function) -> Function:
    """Hand the sizes of an all-to-all among experts over as numbers.

    Megatron makes numbers of them on the way from a GPU, and only there.
    """

    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        moved = original(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    return maybe_move_tensor_to_cpu


def backward_of_kept(original: Function) -> Function:
    """Go backward from an output that has been kept: Megatron checks that its storage is free."""

    def custom_backward(output: torch.Tensor, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            gradient = torch.ones_like(output)
        # Not torch.autograd.backward, inside which the stand-in for device="cuda" is off.
        torch.autograd.Variable._execution_engine.run_backward(
            tensors=(output,),
            grad_tensors=(gradient,),
            keep_graph=False,
            create_graph=False,
            inputs=(),
            allow_unreachable=True,
            accumulate_grad=True,
        )

    return custom_backward
