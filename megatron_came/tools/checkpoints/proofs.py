"""Digests of what lies in files, beside those that the checkpoint's record has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from megatron_came.checkpoint_files.stored import Box as StoredBox
from megatron_came.checkpoint_files.stored import Stored
from megatron_came.core import digests
from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, WEIGHTS, Record, Saved
from megatron_came.tools.checkpoints import names

Shape = tuple[int, ...]
# A box of a whole tensor: where it begins, and its size. Copies of it may stand in several buckets.
Part = tuple[Shape, Shape]


@dataclass(slots=True)
class Proof:
    """What was found of a tensor that the record names.

    Attributes:
        parts: by box of it, the sums of all its copies.
        files: that hold some of it.
        flaw: why it cannot be what was saved.
    """

    parts: dict[Part, dict[object, int]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    flaw: str | None = None

    def add(self, part: Part, copy: object, value: int) -> None:
        """Add to the sum of one copy of a part."""
        copies = self.parts.setdefault(part, {})
        copies[copy] = digests.unsigned(copies.get(copy, 0) + value)

    @property
    def total(self) -> int:
        """The sum over all parts, of one copy of each."""
        return digests.unsigned(sum(next(iter(each.values())) for each in self.parts.values()))


class Proofs:
    """Compares tensors with a record of digests, as they are read.

    Args:
        record: the checkpoint's.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._found: dict[tuple[str, str], Proof] = {}
        self.unnamed: list[str] = []
        # By kind and key, what there is along the axes that Megatron has put before it.
        self._axes: dict[tuple[str, str], dict[Shape, Saved]] = {}
        for kind, named in record.tensors.items():
            for name, saved in named.items():
                key, axes = digests.split_name(name)
                self._axes.setdefault((kind, key), {})[axes] = saved

    def begin(self, tensor: Stored) -> None:
        """Look at a tensor's shape and dtype, before its elements are added."""
        known = names.named(tensor.name)
        if names.bucket(tensor.name):
            return
        if known is None or known not in self._axes:
            self.unnamed.append(tensor.name)
            return
        for axes, saved in self._axes[known].items():
            proof = self._proof(known[0], digests.name_of(known[1], axes))
            shape = tensor.shape[len(axes) :]
            dtype = str(tensor.dtype).removeprefix("torch.")
            small = (
                known[0] == MOMENTUM and dtype == "bfloat16"
            )  # has the bits of fp32's first half
            if shape != saved.shape:
                proof.flaw = f"has shape {shape} where {saved.shape} was saved"
            elif dtype != saved.dtype and not small:
                proof.flaw = f"is {dtype} where {saved.dtype} was saved"

    def add(self, tensor: Stored, box: StoredBox) -> None:
        """Add elements of a tensor."""
        known, bucket = names.named(tensor.name), names.bucket(tensor.name)
        if bucket is not None:
            self._add_bucket(*bucket, box)
        elif known is not None and known in self._axes:
            self._add_named(*known, box)

    def _add_named(self, kind: str, key: str, box: StoredBox) -> None:
        every = self._axes[kind, key]
        depth = len(next(iter(every)))
        spans = [
            range(start, start + size)
            for start, size in zip(box.offsets[:depth], box.values.shape[:depth], strict=True)
        ]
        for axes in itertools.product(*spans):
            if axes not in every:
                continue
            proof = self._proof(kind, digests.name_of(key, axes))
            proof.files.add(box.file)
            if proof.flaw:
                continue
            place = tuple(axis - start for axis, start in zip(axes, box.offsets, strict=False))
            values = box.values[place]
            size = tuple(values.shape)
            offset = box.offsets[depth:]
            where = digests.Box.alone(size, offset, every[axes].shape)
            proof.add((offset, size), 0, _sum(kind, values, size, where))

    def _add_bucket(self, kind: str, key: str, box: StoredBox) -> None:
        first, last = box.offsets[0], box.offsets[0] + box.values.numel()
        for number, inside in enumerate(self._record.buckets.get(key, ())):
            start, stop = inside.start, inside.start + math.prod(inside.shape)
            low, high = max(start, first), min(stop, last)
            if low >= high:
                continue
            values = box.values[low - first : high - first]
            for name, where in inside.boxes:
                proof = self._proof(kind, name)
                proof.files.add(box.file)
                value = _sum(kind, values, inside.shape, where, low - start)
                proof.add((where.offset, where.size), (key, number), value)

    def _proof(self, kind: str, name: str) -> Proof:
        return self._found.setdefault((kind, name), Proof())

    def damaged(self) -> Iterator[tuple[str, str, str, list[str]]]:
        """Say what is not as it was saved.

        Yields:
            Kind, name, what is wrong, and the files.
        """
        for kind, named in self._record.tensors.items():
            for name, saved in named.items():
                proof = self._found.get((kind, name))
                flaw = "is in no file" if proof is None else _flaw(proof, saved)
                if flaw:
                    yield kind, name, flaw, sorted(proof.files) if proof else []

    def total(self, kind: str, name: str) -> int:
        """The digest of what lies in the files."""
        return self._proof(kind, name).total

    @property
    def count(self) -> int:
        """How many tensors the record names."""
        return sum(map(len, self._record.tensors.values()))


def _flaw(proof: Proof, saved: Saved) -> str | None:
    if proof.flaw:
        return proof.flaw
    if any(len(set(copies.values())) > 1 for copies in proof.parts.values()):
        return "has copies that differ from each other"
    same = proof.total == saved.digest
    return None if same else "is not what was saved, as its digest shows"


def _sum(kind: str, values: torch.Tensor, shape: Shape, box: digests.Box, start: int = 0) -> int:
    if kind not in (WEIGHTS, MOMENTUM, MAIN_WEIGHTS) and values.dtype != torch.float32:
        return 0  # a factor of another dtype: said by its dtype
    as_fp32 = kind != WEIGHTS
    return digests.digest(digests.terms(values, shape, box, start=start, as_fp32=as_fp32))
