"""Whether a checkpoint is what was saved, as far as its files can tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.checkpoint_files.folder import Checkpoint
from megatron_came.checkpoint_files.stored import Stored
from megatron_came.core import digests
from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, Record, RecordError
from megatron_came.core.state import FACTORS
from megatron_came.tools.checkpoints import legacy_proofs, main_weights, names, shapes
from megatron_came.tools.checkpoints.kinds import has_padding, kind_of
from megatron_came.tools.checkpoints.listing import bytes_of, printable, progress
from megatron_came.tools.checkpoints.proofs import Proofs
from megatron_came.tools.checkpoints.values import Values


@dataclass
class Verdict:
    """What was found.

    Attributes:
        damages: sentences, each of which names a tensor or a file.
        remarks: what could not be looked at, and what was proved.
        is_proved: whether all is what was saved.
        is_of_main_weights: whether nothing but main weights and momentum is damaged.
    """

    damages: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    is_proved: bool = False
    is_of_main_weights: bool = True

    def add(self, kind: str, sentence: str) -> None:
        """Note a damage of a kind of tensor, or of something else."""
        self.damages.append(printable(sentence))
        self.is_of_main_weights &= kind in (MAIN_WEIGHTS, MOMENTUM)


def verify(checkpoint: Checkpoint) -> Verdict:
    """Read all of a checkpoint, and compare it with itself."""
    verdict = Verdict()
    record = _record(checkpoint, verdict)
    _say_contradictions(checkpoint, record, verdict)
    _read_objects(checkpoint, verdict)
    proofs = Proofs(record) if record is not None and checkpoint.folder.is_distributed else None
    readable = _read_tensors(checkpoint, proofs, verdict)
    if proofs is not None:
        for kind, name, flaw, files in proofs.damaged():
            verdict.add(kind, f"{_of(kind, name)}{_in(files)} {flaw}")
        _say_proved(proofs.count, len(proofs.unnamed), verdict)
    elif record is not None:
        legacy_proofs.prove(checkpoint, record, verdict)
    if readable:
        _compare_main_weights(checkpoint, record, verdict)
    verdict.is_proved &= not verdict.damages
    return verdict


def _record(checkpoint: Checkpoint, verdict: Verdict) -> Record | None:
    text = checkpoint.common.get(digests.KEY)
    if text is None:
        verdict.remarks.append(
            "It holds no digests, as checkpoints of older versions and of other optimizers: what "
            "is not damaged below cannot be proved."
        )
        return None
    try:
        return digests.unpack(text)
    except RecordError as error:
        verdict.add("", f"the common state: {error}")
        return None


def _say_contradictions(checkpoint: Checkpoint, record: Record | None, verdict: Verdict) -> None:
    iteration, named = checkpoint.common.get("iteration"), checkpoint.folder.iteration
    if not isinstance(iteration, int) or isinstance(iteration, bool) or iteration < 0:
        has = "no iteration" if iteration is None else f"{iteration!r:.40} as its iteration"
        verdict.add("", f"the common state has {has}")
    elif named is not None and named != iteration:
        verdict.add("", f"the common state is of iteration {iteration}, the folder of {named}")
    if not checkpoint.args.fields:
        verdict.add("", "the common state has no arguments")
    if record is None:
        return
    if record.iteration != iteration:
        verdict.add("", f"the digests are of iteration {record.iteration}, not {iteration!r:.40}")
    optimizer = checkpoint.args.get("optimizer")
    if record.optimizer != optimizer:
        verdict.add("", f"the digests are of --optimizer {record.optimizer}, not {optimizer!r:.40}")


def _read_objects(checkpoint: Checkpoint, verdict: Verdict) -> None:
    for name, item in checkpoint.objects.items():
        try:
            item.load()
        except CheckpointError as error:
            verdict.add("", f"{name}: {error}")


def _read_tensors(checkpoint: Checkpoint, proofs: Proofs | None, verdict: Verdict) -> bool:
    """Read every tensor once; returns whether all could be read."""
    readable = True
    expected = shapes.Expected(checkpoint)
    with progress("Verifying", sum(map(bytes_of, checkpoint.tensors))) as bar:
        for tensor in checkpoint.tensors:
            kind = kind_of(tensor.name)
            try:
                for flaw in (*expected.flaws(tensor), *_flaws(tensor, kind, proofs)):
                    verdict.add(kind, f"{tensor.name}{_in(tensor.files)} {flaw}")
            except CheckpointError as error:
                readable = False
                verdict.add(kind, f"{tensor.name}: {error}")
            bar.advance(bytes_of(tensor))
    return readable


def _flaws(tensor: Stored, kind: str, proofs: Proofs | None) -> Iterator[str]:
    values = Values()
    wrong = tensor.wrong_files()
    if wrong:
        yield f"has bytes that were not written so, as the checksum in {', '.join(wrong)} shows"
    if proofs is not None:
        proofs.begin(tensor)
    for box in tensor.boxes():
        values.add(box.values)
        if proofs is not None:
            proofs.add(tensor, box)
    if has_padding(tensor.name):
        return
    if values.nans or values.infinities:
        yield f"has {values.nans} NaN and {values.infinities} infinite elements"
    words = tensor.name.split(".")
    if values.negatives and (kind == "factors" or any(word in FACTORS for word in words)):
        yield f"has {values.negatives} negative elements, where means of squares should be"


def _compare_main_weights(checkpoint: Checkpoint, record: Record | None, verdict: Verdict) -> None:
    compared = 0
    try:
        for name, file, numel, unlike in main_weights.compare(checkpoint, record):
            compared += 1
            if unlike:
                verdict.add(
                    MAIN_WEIGHTS,
                    f"{name} in {file}: {unlike} of {numel} elements are not those that the "
                    "model's weights were made of",
                )
    except (CheckpointError, ValueError) as error:
        verdict.add(MAIN_WEIGHTS, f"main weights cannot be compared with the model's: {error}")
    if compared:
        return
    buckets = any(names.bucket(tensor.name) for tensor in checkpoint.tensors)
    if buckets or not checkpoint.folder.is_distributed:
        verdict.remarks.append(
            "Main weights were not compared with the model's: the files do not say which belong "
            "to which."
        )


def _say_proved(count: int, unnamed: int, verdict: Verdict) -> None:
    others = f" {unnamed} more tensors have no digest." if unnamed else ""
    wrong = len(verdict.damages)
    verdict.is_proved = not wrong
    if not wrong:
        verdict.remarks.append(
            f"All {count} tensors that it has digests of are what was saved.{others}"
        )


def _of(kind: str, name: str) -> str:
    return f"{kind} of {name}"


def _in(files: list[str]) -> str:
    more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
    return f" in {', '.join(files[:3])}{more}" if files else ""
