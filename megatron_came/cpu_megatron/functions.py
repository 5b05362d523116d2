"""Stand-ins for the few functions of Megatron itself that take a GPU for granted."""

import itertools
from typing import Any

import torch

from megatron_came.patching import Function, maker


@maker
def nothing(original: Function | None) -> Function:
    """Stand in for a function that has nothing to do on a CPU."""
    return lambda *args, **kwargs: None


@maker
def absent(original: Function | None) -> None:
    """Stand for a function of Transformer Engine, which is not there."""


def local_layers_of_bert(original: Function) -> Any:
    """Build BERT of Megatron's own layers, where its script asks for Transformer Engine's."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec

    return bert_layer_local_spec


def forking(
    original: Function, cls: type, rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any
) -> Any:
    """Fork the process that writes checkpoints in the background.

    Megatron starts it afresh, since a forked process cannot use CUDA; a fresh one would not have
    the stand-ins.
    """
    return original(cls, rank, "fork", *args, **kwargs)


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


def to_numbers(
    original: Function, tensor: Any, as_numpy: bool = False, record_stream: bool = False
) -> Any:
    """Hand the sizes of an all-to-all among experts over as numbers.

    Megatron makes numbers of them on the way from a GPU, and only there.
    """
    moved = original(tensor, as_numpy, record_stream)
    return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved


def backward_of_kept(
    original: Function, output: torch.Tensor, gradient: torch.Tensor | None
) -> None:
    """Go backward from an output that has been kept: Megatron checks that its storage is free."""
    if gradient is None:
        gradient = torch.ones_like(output)
    torch.autograd.backward(output, gradient)


# On a GPU the distributed optimizer has the Adam of Transformer Engine or apex. With torch's, which
# it falls back to, three places of the loading of a checkpoint fail or lose the step count.


def _is_plain_adam(optimizer: object) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def with_state(
    original: Function, self: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any
) -> Any:
    """Describe a state that is to be loaded, though there is none yet: that after no step."""
    if is_loading and _is_plain_adam(self.optimizer) and not self.optimizer.state:
        for parameter in itertools.chain(*(g["params"] for g in self.optimizer.param_groups)):
            self.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return original(self, model, is_loading, *args, **kwargs)


def with_steps(original: Function, self: Any, state_dict: Any) -> None:
    """Give each parameter the step count that Megatron saves once for a group of parameters.

    Megatron gives all of them the same tensor, in which each would count.
    """
    original(self, state_dict)
    adam = self.optimizer
    for group in adam.param_groups if _is_plain_adam(adam) else ():
        for parameter in group["params"]:
            if "step" in group and parameter in adam.state:
                adam.state[parameter]["step"] = torch.tensor(float(group["step"]))


@torch.no_grad()  # a slice of an fp32 weight is copied in place, which autograd forbids
def without_step(original: Function, self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    """Copy a slice without its step, which some checkpoint formats have and others do not."""
    if _is_plain_adam(self.optimizer):
        tensors = {**tensors, "step": None}
    original(self, model_param, tensors)
