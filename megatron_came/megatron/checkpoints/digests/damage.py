"""What is wrong with a checkpoint, in sentences that name tensor, file and remedy."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.core.digests import (
    KEY,
    MAIN_WEIGHTS,
    WEIGHTS,
    Record,
    RecordError,
    unpack,
)
from megatron_came.megatron.checkpoints.digests import files
from megatron_came.megatron.checkpoints.digests.sums import KINDS, Totals


@dataclass(frozen=True, slots=True)
class Source:
    """What a checkpoint says of itself, as one rank has read it.

    Attributes:
        file: its folder (``torch_dist``), or this rank's model file (``torch``).
        folder: what ``--load`` names.
        is_legacy: whether it is of format ``torch``.
        record: None where it has none.
        identity: of the record: the same in all files of a checkpoint.
        error: why its record cannot be read.
        iteration: in its common state.
        optimizer: of the run that saved it.
        rounded: dtype of that run's weights, if known.
    """

    file: str
    folder: str
    is_legacy: bool
    record: Record | None
    identity: str | None
    error: str | None
    iteration: Any
    optimizer: str | None
    rounded: torch.dtype | None

    @classmethod
    def of(cls, loaded: Sequence[Any], folder: str) -> Source:
        """Read it from what Megatron's ``_load_base_checkpoint`` returns."""
        state, file, _, kind = loaded
        record, error = None, None
        if state.get(KEY) is not None:
            try:
                record = unpack(state[KEY])
            except RecordError as found:
                error = str(found)
        args = state.get("args")
        rounded = None
        if args is not None:
            rounded = torch.bfloat16 if getattr(args, "bf16", False) else torch.float32
            rounded = torch.float16 if getattr(args, "fp16", False) else rounded
        return cls(
            file=str(file),
            folder=folder,
            is_legacy=getattr(kind, "name", None) == "LEGACY",
            record=record,
            identity=None if record is None else hashlib.sha256(state[KEY].encode()).hexdigest(),
            error=error,
            iteration=state.get("iteration"),
            optimizer=getattr(args, "optimizer", None),
            rounded=rounded,
        )

    @property
    def place(self) -> str:
        """The folder of the iteration."""
        return str(Path(self.file).parents[1]) if self.is_legacy else self.file

    @property
    def remedy(self) -> str:
        """What to do with a damaged checkpoint."""
        return (
            "resume from an earlier one with --ckpt-step ITERATION, see all of the damage with "
            f"megatron-came inspect --verify {self.folder}, or load it all the same with "
            "--came-no-verify."
        )

    def problem(self, *, finetune: bool, reads_metadata: bool, with_optimizer: bool) -> str | None:
        """Say what contradicts itself, if anything does, or None.

        Args:
            finetune: the iteration does not matter.
            reads_metadata: look at the tensors' shapes and dtypes, too.
            with_optimizer: at those of the optimizer's state as well.
        """
        what = self.error or self._iterations(finetune) or self._optimizers()
        if what is None and reads_metadata and not self.is_legacy:
            try:
                tensors = files.tensors_of(self.file)
            except (CheckpointError, OSError) as error:  # of one rank: all are to hear of it
                return f"{error}"
            what = files.unlike(tensors, self.record, with_optimizer=with_optimizer)
        return what and f"the checkpoint in {self.place} is damaged: {what}: {self.remedy}"

    def _iterations(self, finetune: bool) -> str | None:
        named = re.findall(r"iter_(\d{7,})", self.file)
        if finetune and self.record is None:
            return None
        if not isinstance(self.iteration, int) or isinstance(self.iteration, bool):
            has = (
                "has no iteration"
                if self.iteration is None
                else f"has iteration {self.iteration!r}"
            )
            return f"its common state {has}"
        if self.record is not None and self.record.iteration != self.iteration:
            return (
                f"its common state says iteration {self.iteration}, "
                f"its digests {self.record.iteration}"
            )
        if named and not finetune and int(named[-1]) != self.iteration:
            return f"the folder's iteration is {int(named[-1])}, its content's {self.iteration}"
        return None

    def _optimizers(self) -> str | None:
        if self.record is None or self.record.optimizer == self.optimizer:
            return None
        return (
            f"its arguments say --optimizer {self.optimizer}, its digests {self.record.optimizer}"
        )


@dataclass(frozen=True, slots=True)
class Found:
    """What this run has loaded.

    Attributes:
        totals: of all ranks.
        has_optimizer: whether the optimizer's state was loaded.
        steps: of its parameter groups.
        cast: factors that were saved in another dtype than fp32.
        holders: collective; files that ranks have read, each with kind and name of what came of it.
    """

    totals: Totals
    has_optimizer: bool
    steps: set[int]
    cast: Sequence[str]
    holders: Callable[[], list[tuple[str, list[tuple[str, str]]]]]


def judge(source: Source, found: Found) -> tuple[str | None, list[str]]:
    """Compare what was loaded with what was saved.

    Returns:
        A sentence that refuses it, or None; and sentences that are worth saying in any case.
    """
    record, remarks = source.record, []
    start = f"the checkpoint in {source.place} is damaged"
    if found.cast:
        return f"{start}: {_some(found.cast)}, not in fp32: {source.remedy}", []
    damaged: list[tuple[str, str]] = []
    if record is None:
        remarks.append(
            f"the checkpoint in {source.folder} was saved without digests, so that it cannot be "
            "verified; this run saves them."
        )
    else:
        damaged, unlike = _compared(record, found)
        if unlike:
            remarks.append(f"not verified: {_some(unlike)}.")
    if damaged:
        return f"{start}: {_described(damaged, source, found)}: {_remedy(damaged, source)}", remarks
    step = record.step if record is not None and found.has_optimizer else None
    if step is not None and found.steps - {step}:
        steps = ", ".join(map(str, sorted(found.steps)))
        return (
            f"{start}: its parameter groups have taken {steps} steps, its digests say {step}: "
            f"{source.remedy}"
        ), remarks
    flaws = found.totals.flaws
    if flaws:
        kind, name, flaw = flaws[0]
        where = _where([(kind, name)], source, found)
        more = f" (and {len(flaws) - 1} more)" if len(flaws) > 1 else ""
        return (
            f"the checkpoint in {source.place} cannot be trained on: {kind} of {name}{more}"
            f"{where} holds {flaw}: {source.remedy}"
        ), remarks
    if found.totals.differing:
        return _differing(source, found), remarks
    return None, remarks


def _compared(record: Record, found: Found) -> tuple[list[tuple[str, str]], list[str]]:
    """Return kind and name of what differs, and in words what could not be compared."""
    damaged: list[tuple[str, str]] = []
    unlike: list[str] = []
    kinds = KINDS if found.has_optimizer else (WEIGHTS,)
    for kind in kinds:
        saved, loaded = record.tensors.get(kind, {}), found.totals.tensors.get(kind, {})
        for name in sorted(saved.keys() | loaded.keys()):
            one, other = saved.get(name), loaded.get(name)
            if one is None or other is None:
                lacks = "checkpoint" if one is None else "model"
                unlike.append(f"{kind} of {name}, which the {lacks} has not")
            elif one.shape != other.shape:
                unlike.append(f"{kind} of {name}, of shape {one.shape} there, {other.shape} here")
            elif one.dtype != other.dtype:
                unlike.append(f"{kind} of {name}, in {one.dtype} there, in {other.dtype} here")
            elif one != other:
                damaged.append((kind, name))
    return damaged, unlike


def _described(damaged: Sequence[tuple[str, str]], source: Source, found: Found) -> str:
    kind, name = damaged[0]
    more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
    return f"{kind} of {name}{more}{_where(damaged, source, found)} is not what was saved"


def _where(damaged: Sequence[tuple[str, str]], source: Source, found: Found) -> str:
    """Name the files that hold all of some tensors, or else those that hold the first."""
    if source.is_legacy:
        holders = found.holders()
        held = [
            files.legacy(kind, [file for file, named in holders if (kind, name) in named])
            for kind, name in damaged
        ]
    else:
        tensors = files.tensors_of(source.file)
        held = [files.holding(tensors, source.record, kind, name) for kind, name in damaged]
    common = set.intersection(*held) or held[0]
    return f" in {_some(sorted(common), 4)}" if common else ""


def _remedy(damaged: Sequence[tuple[str, str]], source: Source) -> str:
    if {kind for kind, _ in damaged} == {MAIN_WEIGHTS} and source.rounded != torch.float32:
        return (
            f"rebuild them from the model's weights with megatron-came repair {source.folder} OUT, "
            f"or {source.remedy}"
        )
    return source.remedy


def _differing(source: Source, found: Found) -> str:
    differing = found.totals.differing
    name = next(iter(differing))
    return (
        f"in the checkpoint in {source.place} the main weights of {_some(list(differing))} "
        f"are not the model's weights ({differing[name]} elements of {name} differ): either "
        "is damaged, or it was saved with --dist-ckpt-optim-fully-reshardable and several buckets, "
        "where Megatron 0.16 to 0.19 shifts the optimizer's state (Megatron-LM#5077): rebuild it "
        f"with megatron-came repair {source.folder} OUT, start the optimizer afresh with "
        "--no-load-optim, or load it all the same with --came-no-verify."
    )


def _some(items: Sequence[str], count: int = 1) -> str:
    """Name the first ones, and say how many there are beside."""
    more = len(items) - count
    return ", ".join(items[:count]) + (f" and {more} more" if more > 0 else "")
