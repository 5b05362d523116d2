"""How a training run lays a pipeline stage out in memory: Megatron's buffers, and their shards."""

import argparse
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from megatron.core.distributed.param_and_grad_buffer import group_params_for_buffers
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer
from torch import Tensor

from megatron_came.core.int8 import BLOCK
from megatron_came.core.momentum import MOMENTUM
from megatron_came.core.parameter_slice import ParameterSlice
from megatron_came.core.saved import MOST_BYTES
from megatron_came.core.state import MATRIX_FACTORS, new_state
from megatron_came.core.sums import SumBuffer
from megatron_came.megatron.cpu_offload import evenly
from megatron_came.megatron.errors import UnsupportedError, refused_by_megatron
from megatron_came.megatron.sharding import ModelGroups, shard_of
from megatron_came.memory.grid import Grid
from megatron_came.memory.meta_model import Chunk
from megatron_came.memory.optimizers import Components, Optimizer
from megatron_came.memory.stand_ins import META, SizedGroup


@dataclass(frozen=True, slots=True)
class Buffer:
    """One of Megatron's buffers of weights and gradients, and what each shard of it holds."""

    weights: int  # bytes of weights, padding included
    gradients: int  # bytes of gradients, likewise
    weight: int  # bytes of a weight
    gradient: int  # bytes of a gradient
    of_experts: bool  # cut over the experts' data-parallel ranks
    # (2, shards), number of elements without padding, and of the blocks that share a scale of int8.
    held: Tensor
    away: Tensor  # those that CAME keeps on the CPU
    bucket: int = 0  # number of elements of the largest bucket; 0 where nothing is cut
    # It is of what Lion and Muon take, and not of what they leave to another.
    by_matrix: bool = False
    # Bytes of fp32 main weights that the buffer has, padding included; None where the optimizer has
    # those of what it updates.
    main_weights: int | None = None

    @property
    def elements(self) -> Tensor:
        """Number of elements without padding, by shard."""
        return self.held[0]


@dataclass(frozen=True, slots=True)
class Stage:
    """A pipeline stage as its ranks hold it, and one of them."""

    number: int  # from 0
    layers: int  # number of transformer layers
    parameters: int  # number of elements of one rank's weights
    frozen: int  # bytes of weights that are not trained
    buffers: tuple[Buffer, ...]  # of the others, cut evenly
    whole_buffers: tuple[Buffer, ...]  # the same for optimizers that take tensors whole
    factors: int  # bytes of r and c of all matrices, and of v of all vectors
    confidence: int  # bytes of R and C of all matrices
    sums: int  # bytes of CAME's sums over ranks
    # Those of the factors, of the confidence and of the sums that are on the CPU.
    offloaded: tuple[int, int, int] = (0, 0, 0)
    # Which shards of dense and of experts' parameters the rank holds.
    shards: tuple[int, int] = (0, 0)
    whole_shards: tuple[int, int] = (0, 0)  # the same of ``whole_buffers``
    activations: int = 0  # bytes of its activations, by Megatron's estimate
    saves: bool = False  # whether the run has checkpoints
    gathers: bool = False  # whether these gather the optimizer's state on GPUs, bucket by bucket

    def components(self, optimizer: Optimizer) -> Components:
        """What the rank keeps from step to step."""
        main_weights = momentum = second_moment = copies = 0
        buffers = self._buffers(optimizer)
        # Beside gradients in fp32 CAME copies those in 16 bits, too.
        copied = optimizer.copies_gradients or len({each.gradient for each in buffers}) > 1
        for buffer, elements, blocks, of_buffer in self._held(optimizer):
            momentum += int(of_buffer.momentum_bytes(elements, blocks))
            if buffer.main_weights is None:
                main_weights += elements * of_buffer.main_weights_bytes(buffer.weight)
            else:
                main_weights += buffer.main_weights
            second_moment += elements * of_buffer.moment_bytes
            if buffer.gradient == 2 and copied:
                copies += elements * 4
        if optimizer.second_moment in ("factors", "confidence"):
            second_moment += self.factors
        if optimizer.is_came:
            second_moment += self.confidence
            copies += self.sums
        if optimizer.offloads:
            second_moment -= sum(self.offloaded[:2])
        return Components(
            weights=self.frozen + sum(buffer.weights for buffer in buffers),
            gradients=sum(buffer.gradients for buffer in buffers),
            main_weights=main_weights,
            momentum=momentum,
            second_moment=second_moment,
            buffers=copies,
            host=self._host(optimizer, copied) if optimizer.offloads else 0,
        )

    def _host(self, optimizer: Optimizer, copied: bool) -> int:
        """Bytes on the CPU: state, sums, and of weights and gradients the copies that travel."""
        size = sum(self.offloaded)
        for buffer in self.buffers:
            elements, blocks = buffer.away[:, self.shards[buffer.of_experts]].tolist()
            gradient = 4 if buffer.gradient == 2 and copied else buffer.gradient
            main_weights = optimizer.main_weights_bytes(buffer.weight)
            size += elements * (main_weights + buffer.weight + gradient)
            size += int(optimizer.momentum_bytes(elements, blocks))
        return size

    def _buffers(self, optimizer: Optimizer) -> tuple[Buffer, ...]:
        return self.buffers if optimizer.rest is None else self.whole_buffers

    def _held(self, optimizer: Optimizer) -> Iterator[tuple[Buffer, int, int, Optimizer]]:
        """Elements and blocks that the rank updates of each buffer, and with which optimizer."""
        shards = self.shards if optimizer.rest is None else self.whole_shards
        for buffer in self._buffers(optimizer):
            # Most have no other.
            own = optimizer if buffer.by_matrix else optimizer.rest or optimizer
            kept = buffer.held - buffer.away if own.offloads else buffer.held
            elements, blocks = kept[:, shards[buffer.of_experts]].tolist()
            yield buffer, elements, blocks, own

    def step(self, optimizer: Optimizer) -> int:
        """Most bytes that a step takes beside what is kept: of dense or of experts' parameters.

        Fp32 copies of what has fewer bits, or all weights, where they are gathered out of place;
        of CAME r, c and v, where it may take a step back.
        """
        copies = [0, 0]
        if optimizer.steps_back:
            return self.factors - (self.offloaded[0] if optimizer.offloads else 0)
        for buffer, elements, _, own in self._held(optimizer):
            copies[buffer.of_experts] += elements * own.unpacked(in_step=True)
            if optimizer.rest is not None and buffer.held.shape[1] > 1:
                copies[buffer.of_experts] += buffer.weights
        return max(copies)

    def working(self, optimizer: Optimizer) -> int:
        """Bytes beside what is kept: activations or, where they are more, the copies of a step."""
        return max(self.activations, self.step(optimizer))

    def total(self, optimizer: Optimizer) -> int:
        """Most bytes of the rank in an iteration."""
        return self.components(optimizer).total + self.working(optimizer)

    def checkpoint(self, optimizer: Optimizer) -> int:
        """Most bytes that saving or loading a checkpoint takes beside what is kept.

        Of a bucket that is gathered, its state in fp32 and the rank's own shard of that.
        """
        if not self.saves:
            return 0
        own = MOST_BYTES if optimizer.is_came else 0
        own += sum(
            elements * each.unpacked(in_step=False)
            for _, elements, _, each in self._held(optimizer)
        )
        gathered = [
            4 * (each.bucket + each.bucket // each.held.shape[1])
            for each in self._buffers(optimizer)
            if self.gathers and not each.by_matrix
        ]
        return own + max(gathered, default=0)

    def peak(self, optimizer: Optimizer) -> int:
        """Bytes of the rank in an iteration or, where they are more, at a checkpoint."""
        kept = self.components(optimizer).total
        return kept + max(self.working(optimizer), self.checkpoint(optimizer))

    def of_fullest_ranks(self, grid: Grid) -> Self:
        """The stage, seen from the ranks that hold most elements."""
        return replace(
            self,
            shards=_fullest(self.buffers, grid),
            whole_shards=_fullest(self.whole_buffers, grid),
        )


def _fullest(buffers: Iterable[Buffer], grid: Grid) -> tuple[int, int]:
    """The shards, dense and of experts, of the rank that holds most elements."""
    shards = grid.shards_of_ranks()
    # By elements, of what stays on the GPU.
    held = sum((each.held - each.away)[0, shards[each.of_experts]] for each in buffers)
    rank = int(torch.as_tensor(held).argmax())
    return int(shards[0][rank]), int(shards[1][rank])


def lay_out(args: argparse.Namespace, grid: Grid, number: int, chunks: Sequence[Chunk]) -> Stage:
    """Lay out a stage as Megatron's ``DistributedDataParallel`` and its optimizers do."""
    params = [param for chunk in chunks for param in chunk.params]
    ddp_config, bucket_size = bucketing(args, grid, params)
    away = _offloaded(args, grid, chunks)
    buffers: list[Buffer] = []
    for index, chunk in enumerate(chunks):
        # Megatron makes one bucket of all but the first chunk of the first stage.
        whole = index > 0 or number > 0 or args.overlap_param_gather_with_optimizer_step
        buffers += _buffers(ddp_config, grid, chunk, None if whole else bucket_size, away)
    factors, confidence, sums = _whole_on_every_rank(params, grid)
    away_factors, away_confidence, _ = _whole_on_every_rank(away, grid)
    return Stage(
        number=number,
        layers=sum(chunk.layers for chunk in chunks),
        parameters=sum(param.numel() for param in params),
        frozen=sum(param.nbytes for param in params if not param.requires_grad),
        buffers=tuple(buffers),
        whole_buffers=tuple(_whole_buffers(params, ddp_config, grid)),
        factors=factors,
        confidence=confidence,
        sums=sums,
        offloaded=(away_factors, away_confidence, sums if away else 0),
        saves=any(getattr(args, name, None) for name in ("save", "load")),
        gathers=bool(
            getattr(args, "dist_ckpt_optim_fully_reshardable", False)
            and not getattr(args, "distrib_optim_fully_reshardable_mem_efficient", False)
        ),
    )


def bucketing(
    args: argparse.Namespace, grid: Grid, params: Iterable[Tensor]
) -> tuple[Any, int | None]:
    """Megatron's settings of buffers, which it may refuse, and the size of their buckets."""
    from megatron.training.training import get_megatron_ddp_config, resolve_ddp_bucket_size

    try:
        config = get_megatron_ddp_config(args)
    except AssertionError as error:
        raise UnsupportedError(refused_by_megatron(error)) from error
    ranks: Any = SizedGroup(grid.data * grid.context)
    numel = sum(param.numel() for param in params)
    return config, resolve_ddp_bucket_size(config, ranks, config.overlap_grad_reduce, numel)


def _whole_buffers(params: Sequence[Tensor], ddp_config: Any, grid: Grid) -> Iterable[Buffer]:
    """Give whole tensors to ranks in turn, as Megatron's layer-wise optimizer does.

    Of equal size those of Lion and Muon come first.
    """
    trained = [param for param in params if param.requires_grad]
    owners: dict[Tensor, int] = {}
    for of_experts, shards in enumerate(grid.shards):
        # Megatron marks experts by allreduce=False.
        own = [param for param in trained if of_experts != getattr(param, "allreduce", True)]
        own.sort(key=lambda param: (param.numel(), not is_managed_by_layer_wise_optimizer(param)))
        for place, param in enumerate(own):
            # To and fro over the ranks, by which their shares become more alike.
            turn, owner = divmod(place, shards)
            owners[param] = shards - 1 - owner if turn % 2 else owner
    groups = group_params_for_buffers(trained, ddp_config.grad_reduce_in_fp32)
    for key, (members, _) in groups.items():
        for by_matrix in (False, True):
            some = [p for p in members if is_managed_by_layer_wise_optimizer(p) == by_matrix]
            sizes = torch.tensor([p.numel() for p in some], dtype=torch.int64, device="cpu")
            places = torch.tensor([owners[p] for p in some], dtype=torch.int64, device="cpu")
            held = _none(grid.shards[key.is_expert_parallel]).index_add(1, places, counts(sizes))
            yield replace(buffer_of(key, int(sizes.sum()), held), by_matrix=by_matrix)


def _buffers(
    ddp_config: Any, grid: Grid, chunk: Chunk, bucket_size: int | None, away: set[Tensor]
) -> Iterable[Buffer]:
    trained = [param for param in chunk.params if param.requires_grad]
    if not grid.sharded:
        groups = group_params_for_buffers(trained, ddp_config.grad_reduce_in_fp32)
        for key, (params, _) in groups.items():
            sizes = torch.tensor([param.numel() for param in params], device="cpu")
            yield buffer_of(key, int(sizes.sum()), counts(sizes).sum(1, keepdim=True))
        return
    dense, experts = grid.shards
    layout = DistributedOptimizer.compute_full_param_layout(
        trained, bucket_size, dense, ddp_config, expert_data_parallel_world_size=experts
    )
    for key, buffer in layout.layouts.items():
        yield cut(key, buffer, experts if key.is_expert_parallel else dense, away)


def counts(sizes: Tensor) -> Tensor:
    """Return what a :class:`Buffer` counts of so many elements: themselves, and blocks of int8."""
    return torch.stack([sizes, -(-sizes // BLOCK)])  # rounded up


def _none(shards: int) -> Tensor:
    return torch.zeros(2, shards, dtype=torch.int64, device="cpu")


def buffer_of(
    key: Any, padded: int, held: Tensor, away: Tensor | None = None, bucket: int = 0
) -> Buffer:
    """Make a buffer of one of Megatron's keys, so many elements and what its shards hold."""
    weight, gradient = key.param_dtype.itemsize, key.grad_dtype.itemsize
    away = torch.zeros_like(held) if away is None else away
    sizes = padded * weight, padded * gradient, weight, gradient
    return Buffer(*sizes, key.is_expert_parallel, held, away, bucket)


def cut(key: Any, buffer: Any, shards: int, away: Container[Tensor] = ()) -> Buffer:
    """Cut every bucket of Megatron's layout of a buffer evenly into so many shards.

    As ``DistributedOptimizer._build_model_gbuf_range`` does.
    """
    held = _none(shards), _none(shards)  # of all parameters, and of those that are offloaded
    for param, (start, stop, bucket) in buffer.param_index_map.items():
        bucket_start, bucket_stop = buffer.bucket_indices[bucket]
        size = (bucket_stop - bucket_start) // shards
        # The shards that have some of it, and where it is cut among them.
        first, last = (start - bucket_start) // size, (stop - 1 - bucket_start) // size
        bounds = bucket_start + size * torch.arange(first, last + 2, device="cpu")
        for each in held[: 1 + (param in away)]:
            each[:, first : last + 1] += counts(bounds.clamp(start, stop).diff())
    largest = max(stop - start for start, stop in buffer.bucket_indices)
    return buffer_of(key, buffer.bucket_indices[-1][1], *held, largest)


def _offloaded(args: argparse.Namespace, grid: Grid, chunks: Iterable[Chunk]) -> set[Tensor]:
    """The parameters that CAME keeps on the CPU, see ``cpu_offload.chosen``."""
    found = set[Tensor]()
    for chunk in chunks if args.optimizer_cpu_offload else ():
        for is_dense in (True, False):
            params = [p for p in chunk.params if getattr(p, "allreduce", True) == is_dense]
            own, fraction = [p for p in params if p.requires_grad], args.optimizer_offload_fraction
            found |= evenly(own, fraction, has_copies=grid.pipeline > 1)
    return found


def _whole_on_every_rank(params: Iterable[Tensor], grid: Grid) -> tuple[int, ...]:
    """Bytes of CAME's factors, of its confidence and of its sums, of all trained parameters."""
    groups = _groups(grid)
    known: dict[tuple[object, ...], tuple[int, int, int]] = {}  # of parameters that are alike
    found = [(0, 0, 0)]
    for param in params:
        if param.requires_grad:
            shard = shard_of(param, groups)
            alike = (shard.shape, param.dtype, shard.tp_dim, shard.tp_size, shard.factored)
            if alike not in known:
                known[alike] = _bytes_of_one(ParameterSlice(param, shard))
            found.append(known[alike])
    return tuple(map(sum, zip(*found, strict=True)))


def _bytes_of_one(param: ParameterSlice) -> tuple[int, int, int]:
    state = new_state(param.param, param.shard)
    sizes = {key: value.nbytes for key, value in state.items() if key != MOMENTUM}
    confidence = sum(sizes.get(key, 0) for key in MATRIX_FACTORS[2:])
    sums = SumBuffer([*param.square_requests(), *param.instability_requests()], META).flat.nbytes
    return sum(sizes.values()) - confidence, confidence, sums


def _groups(grid: Grid) -> ModelGroups:
    tensor: Any = SizedGroup(grid.tensor)
    experts: Any = SizedGroup(grid.expert_tensor)
    embedding: Any = SizedGroup(min(grid.pipeline, 2))  # the first and the last stage
    return ModelGroups(tp=tensor, expert_tp=experts, embedding=embedding)


def full_parameters(chunk: Chunk, grid: Grid) -> int:
    """Number of elements that a chunk's weights have on all tensor- and expert-parallel ranks.

    Megatron's second copy of tied embeddings is none of them.
    """
    groups = _groups(grid)
    return sum(
        param.numel()
        * shard_of(param, groups).tp_size
        * (1 if getattr(param, "allreduce", True) else grid.expert)
        for param in chunk.params
        if not getattr(param, "shared", False)
    )
