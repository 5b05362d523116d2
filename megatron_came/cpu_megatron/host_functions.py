"""Stand-ins for the few functions of Megatron itself that take a GPU for granted."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_came.megatron.compat.cpu import forks_checkpoint_worker


def use_compiled_dataset_helpers() -> None:
    """Do not compile Megatron's data set helpers where they come compiled and without a Makefile.

    That is megatron-core's wheel: its training loop asks for ``make`` all the same, and stops.
    """
    import megatron.core.datasets.utils as dataset_utils

    has_makefile = (Path(dataset_utils.__file__).parent / "Makefile").exists()
    if not has_makefile and importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        dataset_utils.compile_helpers = lambda: None


def _fork_checkpoint_worker() -> None:
    """Fork the process that writes checkpoints in the background.

    Megatron starts it afresh, since a forked process cannot use CUDA; a fresh one would not have
    the stand-ins.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    if not forks_checkpoint_worker():
        return
    start = PersistentAsyncCaller._get_process.__func__

    @functools.wraps(start)
    def start_by_fork(
        cls: type, rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any
    ) -> Any:
        return start(cls, rank, "fork", *args, **kwargs)

    PersistentAsyncCaller._get_process = classmethod(start_by_fork)


def _snapshot_checkpoint_tensors() -> None:
    """Copy the tensors of a checkpoint before they are written.

    From a GPU they are copied to the host's memory anyway.  Those of a CPU are not, and training
    would go on to change tensors that a process in the background is writing.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    prepare: Callable[..., None] = FileSystemWriterAsync.prepare_write_data

    @functools.wraps(prepare)
    def prepare_copies(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare(self, *args, **kwargs)
        self.write_buckets = [
            (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (data, tensors) in self.write_buckets
        ]

    FileSystemWriterAsync.prepare_write_data = prepare_copies


def _move_routing_to_numpy() -> None:
    """Hand the sizes of an all-to-all among experts over as numbers.

    Megatron makes numbers of them on the way from a GPU to the host, and only there.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    move = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(move)
    def move_to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = move(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    moe_utils.maybe_move_tensor_to_cpu = move_to_numpy
    token_dispatcher.maybe_move_tensor_to_cpu = move_to_numpy


def _keep_pipeline_outputs() -> None:
    """Keep what a pipeline stage has sent until its backward pass.

    Megatron frees the storage right after the send, which a GPU's stream has ordered by then; gloo
    may still be reading it.
    """
    from megatron.core.pipeline_parallel import schedules

    def backward(output: torch.Tensor, gradient: torch.Tensor | None) -> None:
        """Megatron's, without its check that the storage has been freed."""
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

    schedules.deallocate_output_tensor = lambda *args, **kwargs: None
    schedules.custom_backward = backward


def install() -> None:
    """Put the stand-ins in place, for good."""
    _keep_pipeline_outputs()
    use_compiled_dataset_helpers()
    _fork_checkpoint_worker()
    _snapshot_checkpoint_tensors()
    _move_routing_to_numpy()
