"""What a worker writes down of a training."""

import hashlib
from unittest import mock

import torch
import torch.distributed as dist

from megatron_came.core import sums
from megatron_came.dtensors import local_of
from tests.support import quantized


def digest(tensors):
    """One digest of tensors, bit for bit."""
    sha = hashlib.sha256()
    for tensor in map(local_of, tensors):
        if isinstance(tensor, quantized.QuantizedTensor):
            tensor = tensor.dequantize()
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def optimizer_digest(optimizer):
    """Digest of all that a Megatron optimizer updates and keeps; None where it has nothing."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    tensors = []
    for inner in (part.optimizer for part in chain if part.optimizer is not None):
        params = [param for group in inner.param_groups for param in group["params"]]
        tensors += params
        tensors += [
            value
            for param in params
            for value in inner.state[param].values()
            if isinstance(value, torch.Tensor)
        ]
    return digest(tensors)


class CountedCollectives:
    """Stands in for ``torch.distributed`` where CAME takes its collectives from.

    Attributes:
        calls: how many of each.
    """

    def __init__(self):
        self.calls = {"all_reduce": 0, "broadcast": 0}

    def __getattr__(self, name):
        function = getattr(dist, name)
        if name not in self.calls:
            return function

        def counted(*args, **kwargs):
            self.calls[name] += 1
            return function(*args, **kwargs)

        return counted


class Recorder:
    """Stands in for functions of Megatron's training loop and writes down what they return.

    Args:
        watches: also whether steps change anything that fail or are skipped.

    Attributes:
        seen: what is written down; plain values, to be read as JSON.
    """

    def __init__(self, *, watches):
        self._watches = watches
        self.seen = {
            "losses": [],
            "skipped": [],
            "grad_norms": [],
            "zeros": [],
            "params_norms": [],
            "collectives": [],
            "changed_though_skipped": [],
            "changed_though_failed": None,
            "weights": {},
            "state": None,
            "steps": [],
            "error": None,
        }
        self._model, self._optimizer = [], None

    def install(self, stack):
        """Enter the patches."""
        import megatron.training.training as training

        train_step, params_norm = training.train_step, training.calc_params_l2_norm

        def recording_train_step(forward, data, model, optimizer, *args, **kwargs):
            self._model, self._optimizer = model, optimizer
            before = optimizer_digest(optimizer) if self._watches else None
            try:
                result = train_step(forward, data, model, optimizer, *args, **kwargs)
            except BaseException:
                if self._watches:
                    self.seen["changed_though_failed"] = before != optimizer_digest(optimizer)
                raise
            self._write(result, before)
            return result

        def recording_params_norm(*args, **kwargs):
            self.seen["params_norms"].append(params_norm(*args, **kwargs))
            return self.seen["params_norms"][-1]

        self._collectives = CountedCollectives()
        stack.enter_context(mock.patch.object(sums, "dist", self._collectives))
        for name, function in (
            ("train_step", recording_train_step),
            ("calc_params_l2_norm", recording_params_norm),
        ):
            stack.enter_context(mock.patch.object(training, name, function))

    def _write(self, result, before):
        losses, skipped, grad_norm, zeros = result[0], result[1], result[5], result[6]
        if "lm loss" in losses:
            self.seen["losses"].append(float(losses["lm loss"]))
        self.seen["skipped"].append(int(skipped))
        self.seen["collectives"].append(dict(self._collectives.calls))
        self.seen["grad_norms"].append(None if grad_norm is None else float(grad_norm))
        self.seen["zeros"].append(None if zeros is None else float(zeros))
        if skipped and self._watches:
            self.seen["changed_though_skipped"].append(before != optimizer_digest(self._optimizer))

    def finish(self):
        """Digest the weights and the optimizer's state, and return all that was written down."""
        for chunk in self._model:
            for name, param in chunk.named_parameters():
                self.seen["weights"][name.removeprefix("module.").removeprefix("module.")] = digest(
                    [param]
                )
        if self._optimizer is not None:
            self.seen["state"] = optimizer_digest(self._optimizer)
            self.seen["steps"] = [group.get("step") for group in self._optimizer.param_groups]
        return self.seen
