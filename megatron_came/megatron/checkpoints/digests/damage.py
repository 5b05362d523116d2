"""What is wrong with a checkpoint, in sentences that name tensor, file and remedy."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_came.checkpoint_files.claims import (
    contradictions,
    files_of,
    is_half_momentum,
    metadata_flaws,
)
from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.checkpoint_files.legacy import OPTIMIZER_FILE
from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, WEIGHTS
from megatron_came.core.records import KEY, Record, RecordError, unpack
from megatron_came.core.state import FACTORS
from megatron_came.megatron.checkpoints.digests.sums import KINDS, Totals
from megatron_came.megatron.checkpoints.folders import rewritten, tensors_in
from megatron_came.voice import some

# Kind and name of a tensor in a record.
Named = tuple[str, str]


class Source:
    """What a checkpoint says of itself, as one rank has read it.

    Attributes:
        file: its folder (``torch_dist``), or this rank's model file (``torch``).
        is_legacy: whether it is of format ``torch``.
        record: None where it has none.
        identity: of the record: the same in all files of a checkpoint.
        rounded: dtype of the weights of the run that saved it, if known and not fp8.

    Args:
        loaded: what Megatron's ``_load_base_checkpoint`` returns.
        folder: what ``--load`` names.
    """

    def __init__(self, loaded: Sequence[Any], folder: str) -> None:
        state, file, _, format_ = loaded
        self.file, self.folder = str(file), folder
        # By name: the class is the training loop's, which cores of pip may lack.
        self.is_legacy = getattr(format_, "name", None) == "LEGACY"
        self.record: Record | None = None
        self.identity: str | None = None
        self._error: str | None = None
        if state.get(KEY) is not None:
            try:
                self.record = unpack(state[KEY])
                self.identity = hashlib.sha256(repr(state[KEY]).encode()).hexdigest()
            except RecordError as found:  # said with what else is wrong, by :meth:`problem`
                self._error = str(found)
        args = state.get("args")
        self._iteration, self._optimizer = state.get("iteration"), getattr(args, "optimizer", None)
        self.rounded: torch.dtype | None = None
        if args is not None and not getattr(args, "fp8_param_gather", False):
            self.rounded = torch.bfloat16 if getattr(args, "bf16", False) else torch.float32
            self.rounded = torch.float16 if getattr(args, "fp16", False) else self.rounded

    @property
    def path(self) -> str:
        """The folder of the iteration."""
        # Of ``torch`` a file is iter_N/mp_rank_M/model_optim_rng.pt.
        return str(Path(self.file).parents[1]) if self.is_legacy else self.file

    @property
    def remedy(self) -> str:
        """What to do with a damaged checkpoint."""
        return (
            "resume from an earlier one with --ckpt-step ITERATION, see all of the damage with "
            f"megatron-came inspect --verify {self.folder}, or load it all the same with "
            "--came-no-verify."
        )

    def damaged(self, what: str, first: str = "") -> str:
        """The sentence that refuses it; ``first`` is a remedy that goes before the others."""
        return f"the checkpoint in {self.path} is damaged: {what}: {first}{self.remedy}"

    def problem(self, *, finetune: bool, reads_metadata: bool, with_optimizer: bool) -> str | None:
        """Say what contradicts itself, if anything does, or None.

        With ``finetune`` the iteration does not matter; ``reads_metadata`` looks at the tensors'
        shapes and dtypes, too, and ``with_optimizer`` at those of the optimizer's state as well.
        """
        found = re.findall(r"iter_(\d{7,})", self.file)
        named = int(found[-1]) if found and not finetune else None  # the last is of the checkpoint
        said = contradictions(self.record, self._iteration, self._optimizer, named)
        what = self._error or next(said, None)
        if what is None and (reads_metadata or self.is_legacy):  # of which each rank has its own
            try:
                file = None if finetune else rewritten(self.file, is_legacy=self.is_legacy)
                if file is not None:
                    what = f"what {file} holds beside tensors does not fit its checksum"
                elif not self.is_legacy:
                    what = self._metadata(with_optimizer)
            except (CheckpointError, OSError) as error:  # of one rank: all are to hear of it
                return str(error)
        return what and self.damaged(what)

    def _metadata(self, with_optimizer: bool) -> str | None:
        """Say which tensor has another shape or dtype than it should."""
        tensors = tensors_in(self.file)
        for tensor in tensors if with_optimizer else ():
            is_state = tensor.kind in (MOMENTUM, *FACTORS) and not tensor.is_bucket
            if is_state and tensor.dtype_name != "float32" and not is_half_momentum(tensor):
                return f"{tensor.name} is in {tensor.dtype_name}, and CAME keeps it in float32"
        flaws = metadata_flaws(self.record, tensors) if self.record and tensors else ()
        for kind, name, flawed, flaw in flaws:
            if with_optimizer or kind == WEIGHTS:
                return f"{flawed.name if flawed else f'{kind} of {name}'} {flaw}"
        return None


@dataclass(frozen=True, slots=True)
class Found:
    """What this run has loaded."""

    totals: Totals  # of all ranks
    has_optimizer: bool  # whether the optimizer's state was loaded
    steps: set[int]  # of its parameter groups
    cast: Sequence[str]  # factors that were saved in another dtype than fp32
    # Collective; files that ranks have read, each with kind and name of what came of it.
    holders: Callable[[], list[tuple[str, list[Named]]]]


def judge(source: Source, found: Found) -> tuple[str | None, list[str]]:
    """Compare what was loaded with what was saved.

    Returns:
        A sentence that refuses it, or None; and sentences that are worth saying in any case.
    """
    record, remarks = source.record, []
    if found.cast:
        return source.damaged(f"{some(found.cast)}, not in fp32"), []
    if record is None:
        remarks.append(
            f"the checkpoint in {source.folder} was saved without digests, so that it cannot be "
            "verified; this run saves them."
        )
    else:
        damaged, unlike = _compared(record, found)
        if unlike:
            remarks.append(f"not verified: {some(unlike)}.")
        if damaged:
            return _refusal(damaged, source, found), remarks
        if found.has_optimizer and record.step is not None and found.steps - {record.step}:
            steps = ", ".join(map(str, sorted(found.steps)))
            what = f"its parameter groups have taken {steps} steps, its digests say {record.step}"
            return source.damaged(what), remarks
    if found.totals.flaws:
        (kind, name, flaw), *others = found.totals.flaws
        more = f" (and {len(others)} more)" if others else ""
        where = _where([(kind, name)], source, found)
        return (
            f"the checkpoint in {source.path} cannot be trained on: {kind} of {name}{more}{where} "
            f"holds {flaw}: {source.remedy}"
        ), remarks
    return _differing(source, found.totals.differing), remarks


def _compared(record: Record, found: Found) -> tuple[list[Named], list[str]]:
    """Return kind and name of what differs, and in words what could not be compared."""
    damaged: list[Named] = []
    unlike: list[str] = []
    for kind in KINDS if found.has_optimizer else (WEIGHTS,):
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
            elif one != other or _copies_differ(record, found.totals, kind, name):
                damaged.append((kind, name))
    return damaged, unlike


def _copies_differ(record: Record, loaded: Totals, kind: str, name: str) -> bool:
    """Say whether copies are not what was saved, where each rank has read its own."""
    saved, found = record.copies.get(kind, {}).get(name), loaded.copies.get(kind, {}).get(name)
    return saved is not None and found is not None and saved != found


def _refusal(damaged: Sequence[Named], source: Source, found: Found) -> str:
    (kind, name), *others = damaged
    more = f" (and {len(others)} more)" if others else ""
    where = _where(damaged, source, found)
    rebuild = ""
    # Fp32 weights are their own main weights: there is nothing to rebuild them from.
    in_16_bits = source.rounded in (torch.bfloat16, torch.float16)
    if in_16_bits and {kind for kind, _ in damaged} == {MAIN_WEIGHTS}:
        repair = f"rebuild them from the model's weights with megatron-came repair {source.folder}"
        rebuild = f"{repair} OUT, or "
        if source.record is not None and source.record.buckets:  # which repair does not write
            rebuild = "start the optimizer afresh from the weights with --no-load-optim, or "
    return source.damaged(f"{kind} of {name}{more}{where} is not what was saved", rebuild)


def _where(damaged: Sequence[Named], source: Source, found: Found) -> str:
    """Name the files that hold all of some tensors, or else those that hold the first."""
    if source.is_legacy:
        holders = found.holders()
        held = [
            {_legacy_file(kind, Path(file)) for file, named in holders if (kind, name) in named}
            for kind, name in damaged
        ]
    else:
        tensors = tensors_in(source.file)
        held = [files_of(source.record, tensors, kind, name) for kind, name in damaged]
    common = set.intersection(*held) or held[0]
    return f" in {some(sorted(common), 4)}" if common else ""


def _legacy_file(kind: str, model: Path) -> str:
    """The file of format ``torch`` that holds a tensor, given the rank's model file."""
    beside = model.with_name(OPTIMIZER_FILE)
    file = beside if kind != WEIGHTS and beside.exists() else model
    return f"{file.parent.name}/{file.name}"


def _differing(source: Source, differing: Mapping[str, int]) -> str | None:
    if not differing:
        return None
    name = next(iter(differing))
    return (
        f"in the checkpoint in {source.path} the main weights of {some(list(differing))} "
        f"are not the model's weights ({differing[name]} elements of {name} differ): either "
        "is damaged, or it was saved with --dist-ckpt-optim-fully-reshardable and several buckets, "
        "where Megatron 0.16 to 0.19 shifts the optimizer's state (Megatron-LM#5077): rebuild it "
        f"with megatron-came repair {source.folder} OUT, start the optimizer afresh with "
        "--no-load-optim, or load it all the same with --came-no-verify."
    )
