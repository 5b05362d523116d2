"""CAME's kernels for CPUs, loaded from Numba's cache or compiled once before ranks are forked."""

import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from megatron_came import CAME
from megatron_came.kernels import dispatch
from megatron_came.voice import say_once

FP32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
# What trainings have: dtypes of weights, gradients, momentum and the model's copy of the weights.
KINDS = (
    (BF16, BF16, INT8, None),
    (FP32, FP32, FP32, None),
    (FP32, FP32, INT8, None),
    (FP32, FP32, BF16, None),
    (FP32, BF16, FP32, BF16),
    (FP32, FP32, FP32, BF16),
)


def load() -> None:
    """Take a step of each kind; where they are compiled, two at a time before."""
    with contextlib.suppress(ImportError):  # of Numba, without which CAME runs in plain PyTorch
        from numba.core.registry import cpu_target

        import megatron_came.kernels.cpu.launch  # noqa: F401
        from megatron_came.kernels.cpu.update import update

        cpu_target.typing_context.refresh()  # which the first kernel that is loaded would do
        cpu_target.target_context.refresh()
        torch.set_num_threads(1)  # no pool is started, which would not outlive a fork
        _step(KINDS[0])
        if update._serial.stats.cache_misses:
            with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
                list(pool.map(_step, KINDS[1:]))
        for kind in KINDS:
            _step(kind)
        dispatch.adder(torch.device("cpu"))
        say_once.cache_clear()  # the ranks say themselves who computes their steps


def _step(kind: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None]) -> None:
    weights, gradients, momentum, copy = kind
    params = [torch.nn.Parameter(torch.ones(shape, dtype=weights)) for shape in ((8, 6), (7,))]
    settings = {"momentum_dtype": momentum, "remainders": weights == BF16}
    optimizer = CAME(params, lr=1e-2, kernels="numba", **settings)
    if copy:
        optimizer.set_model_weights({param: param.detach().to(copy) for param in params})
    for param in params:
        param.decoupled_grad = torch.ones_like(param, dtype=gradients)
    optimizer.step()
