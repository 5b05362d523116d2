"""What a rank adds to the digests of a model and its optimizer, and their sums over all ranks."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_came.core.digests import (
    MAIN_WEIGHTS,
    MOMENTUM,
    WEIGHTS,
    PlacedBox,
    Shape,
    Term,
    signed,
    terms,
    unsigned,
)
from megatron_came.core.records import Saved
from megatron_came.core.saved import Ranges
from megatron_came.core.state import FACTORS, without_averaged_axis
from megatron_came.kernels.dispatch import adder
from megatron_came.megatron.checkpoints.digests.leaves import Entry, Leaf
from megatron_came.megatron.quantized import is_quantized, plain
from megatron_came.voice import collectives_device

KINDS = (WEIGHTS, MAIN_WEIGHTS, MOMENTUM, *FACTORS)
# Elements that wait to be added up; those that were converted need memory.
_WAITING = 1 << 23

# In place of a dtype, of weights whose loaded values may differ from those in the file.
FP8 = "fp8"

Kinds = tuple[str, ...]
Names = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclass(frozen=True, slots=True)
class Totals:
    """What all ranks have added.

    Attributes:
        tensors: by kind and name.
        copies: likewise the digests of all copies that other ranks' parts stand for in ``tensors``.
        flaws: kind and name of tensors that no state of CAME's can be, and why.
        differing: by name, how many weights are not their main weights, rounded.
    """

    tensors: Mapping[str, Mapping[str, Saved]]
    copies: Mapping[str, Mapping[str, int]]
    flaws: list[tuple[str, str, str]]
    differing: Mapping[str, int]


class Sums:
    """Digests in the making, by kind and name.

    It also notes values that no state of CAME's has, be they about to be saved or ``is_loaded``.

    Attributes:
        names: with shape and dtype, of all tensors that any rank may hold of these entries.
        differing: by name, how many weights are not their main weights, rounded.
    """

    def __init__(self, entries: Mapping[int, Entry], *, is_loaded: bool = False) -> None:
        self.names: Names = tuple(
            dict.fromkeys(
                (leaf.name, leaf.box.shape, _dtype_of(entry, leaf, is_loaded=is_loaded))
                for entry in entries.values()
                for leaf in entry.leaves
            )
        )
        # Of what stands for all that hold the same, and of these others, the copies.
        self._totals: tuple[dict[tuple[str, str], int], ...] = ({}, {})
        self._untrained: set[str] = set()
        self._infinite: set[tuple[str, str]] = set()
        self._negative: set[tuple[str, str]] = set()
        self.differing: Counter[str] = Counter()
        self._waiting: list[tuple[dict[tuple[str, str], int], Kinds, str, Term]] = []
        self._factors: list[tuple[set[tuple[str, str]], Tensor]] = []
        self._size = 0

    @property
    def held(self) -> list[tuple[str, str]]:
        """Kind and name of all that this rank has added to."""
        return list(dict.fromkeys(itertools.chain(*self._totals)))

    @property
    def flawed(self) -> set[tuple[str, str]]:
        """Kind and name of what this rank has added that no state of CAME's can be."""
        return self._infinite | self._negative

    def add_weights(self, entry: Entry, *, is_trained: bool = True) -> None:
        """Add the weights of an entry, where this rank stands for its data-parallel group."""
        if not is_trained:
            self._untrained.update(leaf.name for leaf in entry.leaves)
        if entry.start is not None:
            self.add_slice((WEIGHTS,), entry, in_one_range(entry.tensor), entry.start)
            return
        self._add((WEIGHTS,), plain(entry.tensor), _of_groups(entry.views))
        for leaf in entry.leaves:
            if leaf.copy is not None and leaf.is_main:
                self.add_box(leaf.name, leaf.copy, leaf.box.offset, leaf.box.shape)

    def add_box(self, name: str, values: Tensor, offset: Shape, shape: Shape) -> None:
        """Add a box of a weight of this shape, which does not lie in the rank's own tensor."""
        box = PlacedBox.alone(tuple(values.shape), offset, shape)
        self._add((WEIGHTS,), values, [Leaf(name, box, is_first=True, is_dp_first=True)])

    def add_slice(self, kinds: Kinds, entry: Entry, ranges: Ranges, start: int | None) -> None:
        """Add a slice of main weights or momentum: of all kinds that have these values.

        Args:
            kinds: of the values.
            entry: of the parameter.
            ranges: of the slice: where they begin in it, and their values in fp32 or bf16, flat.
            start: where the slice begins in the parameter; None for all of the parameter, of which
                the other data-parallel ranks have copies.
        """
        leaves = list(entry.views) if start is not None else _of_groups(entry.views)
        shape = entry.shape or tuple(entry.tensor.shape)
        for begin, values in ranges if leaves else ():
            self._add(kinds, values, leaves, shape, (start or 0) + begin, start is not None)

    def add_factors(self, entry: Entry, state: Mapping[str, Tensor]) -> None:
        """Add the factors of a parameter."""
        for key in FACTORS:
            if key in state:
                self._add((key,), state[key], _of_groups(entry.factor(key)))

    def _add(
        self,
        kinds: Kinds,
        values: Tensor,
        leaves: list[Leaf],
        local: tuple[int, ...] | None = None,
        start: int = 0,
        is_slice: bool = False,
    ) -> None:
        local = tuple(values.shape) if local is None else local
        as_fp32 = kinds != (WEIGHTS,)
        for leaf in leaves:
            totals = self._totals[not (leaf.is_first if is_slice else leaf.is_main)]
            for kind in kinds:
                totals.setdefault((kind, leaf.name), 0)
            found = terms(values, local, leaf.box, start=start, as_fp32=as_fp32)
            self._waiting += ((totals, kinds, leaf.name, term) for term in found)
        if kinds[0] in FACTORS and leaves and values.numel():
            names = {(kinds[0], leaf.name) for leaf in leaves}
            self._factors.append((names, values.detach().reshape(-1)))
        self._size += values.numel()
        if self._size >= _WAITING:
            self.flush()

    def flush(self) -> None:
        """Add up what waits; the tensors may change afterwards."""
        devices = {term.bits.device for *_, term in self._waiting}
        for device in devices:
            here = [each for each in self._waiting if each[-1].bits.device == device]
            sums = adder(device)([term for *_, term in here])
            for (totals, kinds, name, _), added in zip(here, sums, strict=True):
                for kind in kinds:
                    totals[kind, name] += added.total
                if name not in self._untrained and not added.is_finite:
                    self._infinite.add((kinds[0], name))
        # One look at all of them; at each alone only where a number is negative, or NaN.
        if self._factors and not _least([values for _, values in self._factors]) >= 0:
            for names, values in self._factors:
                if (values < 0).any():
                    self._negative |= names
        self._waiting, self._factors, self._size = [], [], 0

    def over_all_ranks(self, names: Names) -> Totals:
        """Add up over all ranks, which give the names of all ranks' sums.

        What they exchange does not grow with their number.
        """
        self.flush()
        known: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, shape, dtype in names:
            known.setdefault(name, (shape, dtype))
        order = {name: place for place, name in enumerate(known)}
        table = np.zeros((7, len(KINDS), len(known)), np.int64)
        for line, totals in zip((0, 2), self._totals, strict=True):
            for (kind, name), total in totals.items():
                table[line : line + 2, KINDS.index(kind), order[name]] = signed(unsigned(total)), 1
        for line, flawed in ((4, self._infinite), (5, self._negative)):
            for kind, name in flawed:
                table[line, KINDS.index(kind), order[name]] = 1
        for name, count in self.differing.items():
            table[6, 0, order[name]] = count
        summed = torch.from_numpy(table)
        if dist.is_initialized():
            summed = summed.to(collectives_device())
            dist.all_reduce(summed)  # of integers, modulo 2^64
        flaws = []
        first, held, others, copied, infinite, negative, differing = summed.tolist()
        tensors: dict[str, dict[str, Saved]] = {}
        copies: dict[str, dict[str, int]] = {}
        for at, kind in enumerate(KINDS):
            for place, (name, (shape, dtype)) in enumerate(known.items()):
                if held[at][place]:
                    tensors.setdefault(kind, {})[name] = Saved(
                        without_averaged_axis(kind, shape) if kind in FACTORS else shape,
                        dtype if kind == WEIGHTS else "float32",
                        unsigned(first[at][place]),
                    )
                if copied[at][place]:
                    copies.setdefault(kind, {})[name] = unsigned(others[at][place])
                if infinite[at][place]:
                    flaws.append((kind, name, "a number that is not finite"))
                elif negative[at][place]:
                    flaws.append((kind, name, "a negative number"))
        return Totals(
            tensors,
            copies,
            flaws,
            {name: differing[0][at] for name, at in order.items() if differing[0][at]},
        )


def _least(tensors: list[Tensor]) -> float:
    """Return the least number of flat tensors; NaN if there is one."""
    device = tensors[0].device  # others, of what is offloaded, may be elsewhere
    return torch.cat([each.to(device) for each in tensors]).amin().item()


def _of_groups(leaves: Iterable[Leaf]) -> list[Leaf]:
    """The boxes of which this rank stands for its data-parallel group."""
    return [leaf for leaf in leaves if leaf.is_dp_first]


def _dtype_of(entry: Entry, leaf: Leaf, *, is_loaded: bool) -> str:
    """Name the dtype of a box of weights.

    A file holds the values of fp8 weights. These are quantised once more when they are loaded, by
    which they may change: they are told apart from what is in the file.
    """
    if is_loaded and is_quantized(entry.tensor):
        return FP8
    values = entry.tensor if leaf.copy is None else leaf.copy
    return str(values.dtype).removeprefix("torch.")


def distinct[T](value: T) -> list[T]:
    """Return the values that ranks have, each once, in the order of the first ranks with them.

    ``repr`` must say all of a value.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little", signed=True)
    mine = torch.tensor([number], device=collectives_device())
    marks = mine.new_empty(dist.get_world_size())
    dist.all_gather_into_tensor(marks, mine)
    owners = {mark: owner for owner, mark in reversed(list(enumerate(marks.tolist())))}
    values = []
    for owner in sorted(owners.values()) if len(owners) > 1 else ():
        found = [value]
        dist.broadcast_object_list(found, owner)
        values += found
    return values or [value]


def in_one_range(values: Tensor) -> Ranges:
    """Values as they are, as one range."""
    yield 0, values.detach().reshape(-1)
