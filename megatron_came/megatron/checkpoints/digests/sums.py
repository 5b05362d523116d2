"""What a rank adds to the digests of a model and its optimizer, and their sums over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor

from megatron_came.core import int8
from megatron_came.core.digests import WEIGHTS, Box, Saved, digest, digest_fp32, name_of, unsigned
from megatron_came.core.momentum import MOMENTUM as MOMENTUM_KEY
from megatron_came.core.momentum import SCALE
from megatron_came.core.remainders import join
from megatron_came.core.state import FACTORS, REMAINDER
from megatron_came.kernels.digests import adder
from megatron_came.megatron.checkpoints.digests.leaves import Entry
from megatron_came.megatron.checkpoints.factors import pieces_of
from megatron_came.voice import rank

# Elements that are converted in one piece, whole blocks of int8.
_PIECE = 1 << 18

Pieces = Iterator[tuple[int, Tensor]]


@dataclass(slots=True)
class Sum:
    """What is known of a tensor so far: its digest, and the ranks that added to it."""

    shape: tuple[int, ...]
    dtype: str
    total: int | Tensor = 0
    flaw: str | None = None
    ranks: list[int] = field(default_factory=list)

    @property
    def saved(self) -> Saved:
        """As it stands in a record."""
        return Saved(self.shape, self.dtype, unsigned(int(self.total)))


class Sums:
    """Digests in the making, by kind and name.

    Args:
        looks: whether values that no state of CAME's has are to be noted, too.
    """

    def __init__(self, *, looks: bool = False) -> None:
        self._looks = looks
        self._sums: dict[tuple[str, str], Sum] = {}

    def add_weights(self, entry: Entry) -> None:
        """Add the weights of an entry, where this rank stands for all that hold them."""
        for leaf in entry.leaves:
            if leaf.is_main:
                values, shape = leaf.values, leaf.box.size
                with torch.no_grad():
                    total = digest(values, shape, leaf.alone, add=adder(values.device))
                self._add(WEIGHTS, leaf.name, leaf.box, _name(values.dtype), total)
                self._look(WEIGHTS, leaf.name, values)

    def add_slice(
        self, kind: str, entry: Entry, pieces: Pieces, start: int | None, *, also: str | None = None
    ) -> None:
        """Add a slice of main weights or momentum.

        Args:
            kind: of the two.
            entry: of the parameter.
            pieces: of the slice: where they begin in it, and their values in fp32 or bf16, flat.
            start: where the slice begins in the parameter; None for all of the parameter, of which
                the other data-parallel ranks have copies.
            also: a kind that has the same values.
        """
        leaves = [
            leaf
            for leaf in entry.leaves
            if leaf.is_view and (leaf.is_first if start is not None else leaf.is_main)
        ]
        shape = tuple(entry.sharded.data.shape)
        for leaf in leaves:  # a rank that holds nothing knows the name all the same
            for each in filter(None, (kind, also)):
                self._add(each, leaf.name, leaf.box, "float32", 0)
        if not leaves:
            return
        for begin, values in pieces:
            for leaf in leaves:
                total = digest_fp32(
                    values, shape, leaf.box, start=(start or 0) + begin, add=adder(values.device)
                )
                for each in filter(None, (kind, also)):
                    self._add(each, leaf.name, leaf.box, "float32", total)
                self._look(kind, leaf.name, values)

    def add_factors(self, entry: Entry, param: Tensor, state: Mapping[str, Tensor]) -> None:
        """Add the factors of a parameter."""
        for key in FACTORS:
            for piece, _ in (
                pieces_of(key, state[key], entry.sharded, param) if key in state else ()
            ):
                if not is_main_replica(piece.replica_id):
                    continue
                axes, key_of = (
                    piece.prepend_axis_num,
                    piece.key.removeprefix(f"optimizer.state.{key}."),
                )
                size = tuple(piece.data.shape)
                offset, shape = piece.global_offset[axes:], piece.global_shape[axes:]
                box = Box((0,) * len(size), size, tuple(offset), tuple(shape))
                name = name_of(key_of, tuple(piece.global_offset[:axes]))
                total = digest_fp32(piece.data, size, box, add=adder(piece.data.device))
                self._add(key, name, box, "float32", total)
                self._look(key, name, piece.data)

    def _add(self, kind: str, name: str, box: Box, dtype: str, total: int | Tensor) -> None:
        known = self._sums.setdefault((kind, name), Sum(box.shape, dtype))
        known.total = known.total + total

    def _look(self, kind: str, name: str, values: Tensor) -> None:
        if not self._looks or not values.is_floating_point():
            return
        for piece in torch.split(values.detach().reshape(-1), _PIECE):
            if not piece.isfinite().all():
                self._sums[kind, name].flaw = "a number that is not finite"
            elif kind in FACTORS and piece.numel() and piece.amin() < 0:
                self._sums[kind, name].flaw = "a negative number"

    def over_all_ranks(self) -> dict[str, dict[str, Sum]]:
        """Return the sums of all ranks, by kind and name."""
        mine = {
            where: Sum(one.shape, one.dtype, unsigned(int(one.total)), one.flaw, [rank()])
            for where, one in self._sums.items()
        }
        totals: dict[str, dict[str, Sum]] = {}
        for theirs in _on_first_rank(mine):  # on all, this would be work and memory for nothing
            for (kind, name), one in theirs.items():
                known = totals.setdefault(kind, {}).setdefault(name, Sum(one.shape, one.dtype, 0))
                known.total = unsigned(int(known.total) + int(one.total))
                known.flaw = known.flaw or one.flaw
                known.ranks += one.ranks
        found = [totals]
        if dist.is_initialized():
            dist.broadcast_object_list(found, 0)
        return found[0]


def _on_first_rank(value: Any) -> list[Any]:
    """Return a value of every rank on the first, nothing on the others."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if rank() == 0 else None
    dist.gather_object(value, values, 0)
    return values or []


def as_it_is(values: Tensor) -> Pieces:
    """One piece."""
    yield 0, values.detach().reshape(-1)


def momentum_pieces(state: Mapping[str, Tensor]) -> Pieces:
    """The momentum, as it goes into a checkpoint."""
    momentum = state[MOMENTUM_KEY].detach().view(-1)
    if momentum.dtype != torch.int8:
        yield 0, momentum
        return
    for begin in range(0, momentum.numel(), _PIECE):
        piece = momentum[begin : begin + _PIECE]
        yield begin, int8.dequantize(piece, state[SCALE], begin)


def main_pieces(part: Tensor, state: Mapping[str, Tensor]) -> Pieces:
    """The main weights, in fp32."""
    part = part.detach().view(-1)
    if REMAINDER not in state:
        yield 0, part
        return
    remainder = state[REMAINDER].view(-1)
    for begin in range(0, part.numel(), _PIECE):
        span = slice(begin, begin + _PIECE)
        yield begin, join(part[span], remainder[span])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
