"""What a case runs instead of CAME: the authors' optimizer, or CAME with a deliberate fault."""

import argparse
import builtins
import contextlib
import errno
import functools
import io
import itertools
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import came_pytorch
import torch
import torch.distributed as dist

from megatron_came.core import spike_guard, sums
from megatron_came.core.reference import update
from megatron_came.dtensors import local_of
from tests.support import quantized
from tests.training import fsdp_memory, other_models, shared_weights
from tests.training.damaged_settings import DAMAGE, damaged

_LETTERS = {"beta1": "b1", "beta2": "b2", "beta3": "b3", "clip_threshold": "d"}


class Oracle(came_pytorch.CAME):
    """The authors' class where the host builds CAME, on one rank, which holds whole tensors.

    Whatever CAME is asked to keep in fewer bits, it keeps in fp32. With options that the authors'
    class has not it is the reference, in float64.
    """

    kernel_choices = ()
    _own, _unfactored = {}, frozenset()

    def __init__(self, *args, kernels, cuda_graph, momentum_dtype, remainders, seed, **kwargs):
        names = ("bias_correction", "cautious", "no_confidence")
        self._options = {name: kwargs.pop(name) for name in names}
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def step(self, closure=None):
        if not (any(self._options.values()) or any(self._own.values()) or self._unfactored):
            return super().step(closure)
        for group in self.param_groups:
            names = ("b1", "b2", "b3", "eps1", "eps2")
            letters = dict(zip(names, (*group["betas"], *group["eps"]), strict=True))
            letters |= {"eta": group["lr"], "d": group["clip_threshold"], **self._options}
            letters["weight_decay"] = group["weight_decay"]
            for param in group["params"]:
                weight, gradient = param.double(), param.grad.double()
                if param in self._unfactored:
                    weight, gradient = weight.flatten(), gradient.flatten()
                own = {_LETTERS.get(name, name): v for name, v in self._own.get(param, {}).items()}
                update(weight, gradient, self.state[param], **letters | own)
                param.copy_(weight.view_as(param))

    def set_shards(self, shards, names=None, own=None):
        if any(shard.tp_size > 1 or shard.dp_group is not None for shard in shards.values()):
            raise ValueError("the oracle knows no shards")
        self._own = own or {}
        self._unfactored = {param for param, shard in shards.items() if not shard.factored}

    def init_state(self):
        """Its state is created at the first step."""


def without_sums_over(kind: str):
    """Leave out the reductions over the ``dp_group`` or the ``tp_group``."""
    original = sums.SumBuffer.__init__

    def without(self, requests, *given):
        original(self, [replace(request, **{kind: None}) for request in requests], *given)

    return mock.patch.object(sums.SumBuffer, "__init__", without)


def _with_models(change):
    """Models that are changed once they are built."""
    from megatron.core.models.gpt import GPTModel

    original = GPTModel.__init__

    def changed(self, *args, **kwargs):
        original(self, *args, **kwargs)
        change(self)

    return mock.patch.object(GPTModel, "__init__", changed)


def _trainable(is_trainable):
    """Models of which some parameters are frozen, by their full names."""

    def freeze(model):
        first = {f".{i}.": layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
        for name, param in model.named_parameters():
            for local, number in first.items():
                if f"decoder.layers{local}" in name:
                    name = name.replace(local, f".{number}.", 1)
                    break
            param.requires_grad = is_trainable(name)

    return _with_models(freeze)


FROZEN = {
    # The first layer of four.
    "frozen-layer": lambda name: ".layers.0." not in name,
    # All that the first of two pipeline stages holds.
    "frozen-stage": lambda name: any(part in name for part in (".2.", ".3.", "final", "output")),
    # All but so few elements that data-parallel ranks own none.
    "frozen-but-one": lambda name: name == "decoder.final_layernorm.weight",
}


def _silent_weights():
    """Tensor-parallel layers that do not say that their weights are cut."""
    from megatron.core.tensor_parallel import layers

    original = layers.ColumnParallelLinear.__init__

    def silent(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.weight is not None:  # the tied output layer has none of its own
            self.weight.tensor_model_parallel = False

    return mock.patch.object(layers.ColumnParallelLinear, "__init__", silent)


def _killed_while_saving():
    """The process dies by SIGKILL in its second save, with the data written and the rest not."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    original, saves = writer.retrieve_write_results, []

    def die(self, *args, **kwargs):
        saves.append(self)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    return mock.patch.object(writer, "retrieve_write_results", die)


def _loss_times(factor):
    """The loss of a micro-batch is so many times as large, by its number; an iteration has two."""
    from megatron_came import pretrain_gpt

    original, numbers = pretrain_gpt.loss_func, itertools.count(1)

    def changed(mask, output):
        return original(mask, output * factor(next(numbers)))

    return mock.patch.object(pretrain_gpt, "loss_func", changed)


def _spiky(iteration=3, factor=100.0):
    """The loss of one iteration is many times as large."""
    return _loss_times(lambda number: factor if (number + 1) // 2 == iteration else 1.0)


def _is_last():
    return int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


def _without_numba_on_last():
    """The last rank cannot import Numba."""
    return mock.patch.dict(
        sys.modules, {"megatron_came.kernels.cpu.launch": None} if _is_last() else {}
    )


def _frozen_on_last(name):
    """One parameter is frozen on the last rank alone."""
    is_last = _is_last()
    return _trainable(lambda full_name: not (is_last and full_name == name))


def _uncut_on_last():
    """On the last rank a weight is said to be cut, but not where."""

    def forget(model):
        if _is_last():
            model.decoder.layers[0].mlp.linear_fc1.weight.partition_dim = -1

    return _with_models(forget)


def _unlisted_on_last():
    """The last rank cannot say what its model would load."""

    def break_(model):
        if _is_last():
            model.sharded_state_dict = mock.Mock(side_effect=AssertionError("a list"))

    return _with_models(break_)


def _without_memory():
    """No model can be loaded."""
    fail = mock.Mock(side_effect=RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    return _with_models(lambda model: setattr(model, "load_state_dict", fail))


def _bad_gradient(value, first, times=1000):
    """From iteration ``first`` on, the last rank's gradient of one weight has three bad elements.

    An iteration is two micro-batches; so many iterations, or computations of one, are spoiled.
    """
    calls = []

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx, grad):
            calls.append(grad)
            if 0 < len(calls) - 2 * (first - 1) <= 2 * times:
                grad = grad.clone()
                grad.view(-1)[[1, 5, 7]] = value
            return grad

    def with_spoiled(layer, args, kwargs):  # a hook on the weight would go when FSDP2 cuts it
        return args, {**kwargs, "weight": Spoiled.apply(layer.weight)}

    def spoil(model):
        if dist.get_rank() == dist.get_world_size() - 1:
            layer = model.decoder.layers[0].mlp.linear_fc1
            layer.register_forward_pre_hook(with_spoiled, with_kwargs=True)

    return _with_models(spoil)


def _bad_main_weight(iteration):
    """After the step of one iteration, a main weight of the last rank's is NaN."""
    from megatron.training import get_args, training

    original = training.train_step

    def spoiled(forward, data, model, optimizer, *args, **kwargs):
        result = original(forward, data, model, optimizer, *args, **kwargs)
        if get_args().curr_iteration + 1 == iteration and _is_last():
            here = optimizer.param_groups[0]["params"]
            local_of(max(here, key=torch.Tensor.numel)).detach().view(-1)[0] = float("nan")
        return result

    return mock.patch.object(training, "train_step", spoiled)


def _fp8_on_last():
    """On the last rank weights are in fp8, and nobody gathers them so."""

    def quantize(model):
        if _is_last():
            layer = model.decoder.layers[0].mlp.linear_fc1
            layer.weight = quantized.parameter(layer.weight.bfloat16(), "delayed")

    stack = contextlib.ExitStack()
    stack.enter_context(quantized.plugged_in())
    stack.enter_context(_with_models(quantize))
    return stack


def _released():
    """A checkpoint is made a release once it is saved."""
    from megatron.training import checkpointing, training

    original = checkpointing.save_checkpoint

    def release(*args, **kwargs):
        original(*args, **kwargs)
        folder = Path(checkpointing.get_args().save)
        next(folder.glob("iter_*")).rename(folder / "release")
        (folder / "latest_checkpointed_iteration.txt").write_text("release")

    return mock.patch.object(training, "save_checkpoint", release)


def _all_documents():
    """Megatron's own number of made-up documents, which ``worker`` reduces."""
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    return mock.patch.object(MockGPTLowLevelDataset, "size", 100_000)


def _broadcasting():
    """Lion's and Muon's weights by broadcasts: gloo does not gather tensors of several sizes."""
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    gathered = LayerWiseDistributedOptimizer.broadcast_params
    return mock.patch.object(LayerWiseDistributedOptimizer, "allgather_params", gathered)


@contextlib.contextmanager
def _in_fp8():
    """Layers' weights lie in fp8 tensors of a stand-in's, and Megatron gathers them so.

    The flags themselves want layers of Transformer Engine's.
    """
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.module import Float16Module
    from megatron.training import checkpointing, get_args

    module, settings = Float16Module.__init__, DistributedDataParallelConfig.__init__
    saved = checkpointing.generate_state_dict

    def quantising(self, config, model, *args, **kwargs):
        module(self, config, model, *args, **kwargs)
        for each in model.decoder.modules():
            if isinstance(each, ColumnParallelLinear | RowParallelLinear):
                weight = quantized.parameter(each.weight, get_args().fp8_recipe)
                vars(weight).update(vars(each.weight))
                each.weight = weight

    def gathering(self, *args, **kwargs):
        settings(self, *args, **{**kwargs, "fp8_param_gather": True})

    def saying_so(args, *rest, **kwargs):
        flags = argparse.Namespace(**{**vars(args), "fp8_param_gather": True})
        return saved(flags, *rest, **kwargs)

    with (
        quantized.plugged_in(),
        mock.patch.object(checkpointing, "generate_state_dict", saying_so),
        mock.patch.object(Float16Module, "__init__", quantising),
        mock.patch.object(DistributedDataParallelConfig, "__init__", gathering),
    ):
        yield


@contextlib.contextmanager
def _failing_on_last(number, nth, kind):
    """On the last rank the ``nth`` file of a checkpoint that is opened so (r or w) fails."""
    opened, original = [], open

    def failing(file, mode="r", *args, **kwargs):
        if _is_last() and "/iter_" in str(file) and ("r" if mode[0] == "r" else "w") == kind:
            opened.append(file)
            if len(opened) == nth:
                raise OSError(number, os.strerror(number), str(file))
        return original(file, mode, *args, **kwargs)

    with mock.patch.object(builtins, "open", failing), mock.patch.object(io, "open", failing):
        yield


def apply(name: str, stack: contextlib.ExitStack) -> None:
    """Enter the patches of a variant."""
    from megatron_came.megatron import builder

    patches = {
        "came": contextlib.nullcontext,
        "all-documents": _all_documents,
        "oracle": lambda: mock.patch.object(builder, "CAME", Oracle),
        **{name: functools.partial(_trainable, test) for name, test in FROZEN.items()},
        **{name: functools.partial(other_models.in_place, name) for name in other_models.MODELS},
        **{n: functools.partial(shared_weights.in_place, n) for n in shared_weights.MODELS},
        "exploding": lambda: _loss_times(lambda n: 1e25 if n > 4 else 1.0),
        "no-numba-on-last": _without_numba_on_last,
        "frozen-on-last": lambda: _frozen_on_last("decoder.layers.1.mlp.linear_fc1.weight"),
        "tied-frozen-on-last": lambda: _frozen_on_last("output_layer.weight"),
        "uncut-on-last": _uncut_on_last,
        "unlisted-on-last": _unlisted_on_last,
        "no-memory": _without_memory,
        "nan-gradient": lambda: _bad_gradient(float("nan"), 3),
        "nan-gradient-at-first": lambda: _bad_gradient(float("nan"), 1),
        "nan-gradient-once": lambda: _bad_gradient(float("nan"), 3, times=1),
        "inf-gradient": lambda: _bad_gradient(float("inf"), 3),
        "nan-loss": lambda: _loss_times(lambda n: float("nan") if n > 4 and _is_last() else 1.0),
        "nan-main-weight": lambda: _bad_main_weight(4),
        "fp8-on-last": _fp8_on_last,
        "released": _released,
        "spiky": _spiky,
        "fsdp-memory": fsdp_memory.measured,
        "spike-late": lambda: _spiky(7, 1e3),
        "soon-guarded": lambda: mock.patch.object(spike_guard, "LEAST", 4),
        **{f"damaged-{name}": functools.partial(damaged, name) for name in DAMAGE},
        "silent": _silent_weights,
        "killed": _killed_while_saving,
        "fp8": _in_fp8,
        "broadcasting": _broadcasting,
        "full-disc": lambda: _failing_on_last(errno.ENOSPC, 2, "w"),
        **{
            f"unreadable-{nth}": functools.partial(_failing_on_last, errno.EIO, nth, "r")
            for nth in range(1, 20)
        },
        "no_dp_sum": lambda: without_sums_over("dp_group"),
        "no_tp_sum": lambda: without_sums_over("tp_group"),
    }
    stack.enter_context(patches[name]())
