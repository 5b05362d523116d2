"""Whether a checkpoint is what was saved, as far as its files can tell."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from megatron_came.checkpoint_files.claims import contradictions, is_half_momentum
from megatron_came.checkpoint_files.errors import CheckpointError, printable, shown
from megatron_came.checkpoint_files.folder import SUMMARY, Checkpoint, summary_problem
from megatron_came.checkpoint_files.stored import CheckpointTensor
from megatron_came.core import records
from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, WEIGHTS, split_name
from megatron_came.core.records import Record, RecordError
from megatron_came.core.state import FACTORS, without_averaged_axis
from megatron_came.tools.checkpoints.listing import Values, progress
from megatron_came.tools.checkpoints.proofs import Proofs, compared, legacy_digests


@dataclass
class Verdict:
    """What was found."""

    # Sentences, each of which names a tensor or a file.
    damages: list[str] = field(default_factory=list)
    # What could not be looked at, and what was proved.
    remarks: list[str] = field(default_factory=list)
    is_proved: bool = False  # whether all is what was saved
    is_of_main_weights: bool = True  # whether nothing but main weights and momentum is damaged

    def add(self, kind: str | None, sentence: str) -> None:
        """Note a damage of a kind of tensor, or of something else."""
        self.damages.append(printable(sentence))
        self.is_of_main_weights &= kind in (MAIN_WEIGHTS, MOMENTUM)  # all that repair makes anew


def verify(checkpoint: Checkpoint) -> Verdict:
    """Read all of a checkpoint, and compare it with itself."""
    verdict = Verdict()
    record = _record(checkpoint, verdict)
    for sentence in (*_contradictions(checkpoint, record), *checkpoint.gaps):
        verdict.add(None, sentence)
    is_distributed = checkpoint.folder.is_distributed
    for name, item in checkpoint.objects.items():
        try:
            item.load()
            if item.is_wrong(whole=is_distributed):
                where = "" if name == item.name else f" in {item.name}"
                verdict.add(None, f"{name}{where} has bytes that its checksum does not fit")
        except CheckpointError as error:
            verdict.add(None, f"{name}: {error}")
    proofs = Proofs(record, checkpoint.tensors) if record and is_distributed else None
    is_readable = _read_tensors(checkpoint, proofs, verdict)
    if proofs is not None:
        _judge(proofs, verdict)
    elif record is not None:
        _judge_legacy(checkpoint, record, verdict)
    if is_readable:
        _compare_main_weights(checkpoint, record, verdict)
    verdict.is_proved &= not verdict.damages
    return verdict


def _record(checkpoint: Checkpoint, verdict: Verdict) -> Record | None:
    text = checkpoint.common.get(records.KEY)
    if text is None:
        verdict.remarks.append(
            "It holds no digests, as checkpoints of older versions and of other optimizers: what "
            "is not damaged below cannot be proved."
        )
        return None
    try:
        return records.unpack(text)
    except RecordError as error:
        verdict.add(None, f"the common state: {error}")
        return None


def _contradictions(checkpoint: Checkpoint, record: Record | None) -> Iterator[str]:
    iteration, named = checkpoint.common.get("iteration"), checkpoint.folder.iteration
    if type(iteration) is not int or iteration < 0:  # a bool is an int, too
        has = "no iteration" if iteration is None else f"{shown(iteration)} as its iteration"
        yield f"the common state has {has}"
        named = None  # one sentence about it is enough
    yield from contradictions(record, iteration, checkpoint.args.get("optimizer"), named)
    if not checkpoint.args.fields:
        yield "the common state has no arguments"
    if checkpoint.has_summary and (flaw := summary_problem(checkpoint.folder.path)):
        yield f"{SUMMARY} {flaw}, so that Megatron does not load the checkpoint"


def _read_tensors(checkpoint: Checkpoint, proofs: Proofs | None, verdict: Verdict) -> bool:
    """Read every tensor once; returns whether all could be read."""
    is_readable = True
    weights = {each.key: each for each in checkpoint.tensors if each.kind == WEIGHTS}
    untrained = _untrained(checkpoint, weights)
    with progress("Verifying", sum(each.stored_bytes for each in checkpoint.tensors)) as advance:
        for tensor in checkpoint.tensors:
            try:
                for flaw in (
                    *_metadata_flaws(tensor, weights.get(tensor.key), checkpoint),
                    *_flaws(tensor, proofs, may_be_infinite=tensor.name in untrained),
                ):
                    verdict.add(tensor.kind, f"{tensor.name}{_in(tensor.files)} {flaw}")
            except CheckpointError as error:
                is_readable = False
                verdict.add(tensor.kind, f"{tensor.name}: {error}")
            advance(tensor.stored_bytes)
    return is_readable


def _metadata_flaws(
    tensor: CheckpointTensor, weight: CheckpointTensor | None, checkpoint: Checkpoint
) -> Iterator[str]:
    """Say what a tensor's shape and dtype should be by the model's weight, if they are others."""
    numel, is_factor = math.prod(tensor.shape), tensor.kind in FACTORS
    if tensor.stored_numel != numel and not tensor.is_bucket:
        yield f"has {tensor.stored_numel} elements in files, and should have {numel}"
    if checkpoint.args.get("optimizer") != "came" or tensor.kind in (None, WEIGHTS):
        return
    dtypes = ["float32"]
    if not checkpoint.folder.is_distributed:
        dtypes.append("float64")
        if not is_factor:
            return
    elif weight is None:
        return
    else:
        shape = without_averaged_axis(tensor.kind, weight.shape) if is_factor else weight.shape
        alone = len(split_name(tensor.name)[1])  # of a layer by itself, since others are frozen
        shape = (*(1 for _ in range(alone)), *shape[alone:])
        if tensor.shape != shape:
            yield f"has shape {tensor.shape}, and should have {shape}"
        if weight.dtype_name == "float64":
            dtypes = ["float64"]
    if tensor.dtype_name not in dtypes and not is_half_momentum(tensor):
        yield f"is {tensor.dtype_name}, and should be {dtypes[0]}"


def _untrained(checkpoint: Checkpoint, weights: Mapping[str, CheckpointTensor]) -> set[str]:
    """Name the weights and buffers that CAME does not train, such as masks of -inf.

    They have no state of the optimizer's, where others do.
    """
    state = {each.key for each in checkpoint.tensors if each.kind not in (None, WEIGHTS)}
    if checkpoint.args.get("optimizer") != "came" or state.isdisjoint(weights):
        return set()
    return {tensor.name for key, tensor in weights.items() if key not in state}


def _flaws(
    tensor: CheckpointTensor, proofs: Proofs | None, *, may_be_infinite: bool
) -> Iterator[str]:
    """Say what is wrong with a tensor's elements, while they are read."""
    if wrong := tensor.wrong_files():
        yield f"has bytes that were not written so, as the checksum in {', '.join(wrong)} shows"
    values = Values()
    for box in tensor.boxes():
        values.add(box.values)
        if proofs is not None:
            proofs.add(tensor, box)
    if tensor.is_bucket:
        return  # its padding may be anything
    if (values.nans or values.infinities) and not may_be_infinite:
        yield f"has {values.nans} NaN and {values.infinities} infinite elements"
    if values.negatives and tensor.kind in FACTORS:
        yield f"has {values.negatives} negative elements, where means of squares should be"


def _judge(proofs: Proofs, verdict: Verdict) -> None:
    for kind, name, flaw, files in proofs.damaged():
        verdict.add(kind, f"{kind} of {name}{_in(sorted(files))} {flaw}")
    verdict.is_proved = not verdict.damages
    if not verdict.damages:
        others = f" {proofs.unnamed} more tensors have no digest." if proofs.unnamed else ""
        verdict.remarks.append(
            f"All {proofs.count} tensors that it has digests of are what was saved.{others}"
        )


def _judge_legacy(checkpoint: Checkpoint, record: Record, verdict: Verdict) -> None:
    """Find every tensor of the record in the files of the only model-parallel rank."""
    ranks = {chunk.item.file.parent for each in checkpoint.tensors for chunk in each.chunks}
    if len(ranks) > 1:
        verdict.remarks.append(
            f"Its digests are of whole tensors, and its files hold those of {len(ranks)} ranks: "
            "they are compared when it is loaded, not here."
        )
        return
    found = legacy_digests(checkpoint, record)
    left, proved = [], 0
    for kind, named in record.tensors.items():
        if kind not in found:
            left.append(kind)
            continue
        counter, files = found[kind]
        for name, saved in named.items():
            proved += 1
            if not counter[saved.shape, saved.digest]:
                verdict.add(
                    kind,
                    f"{kind} of {name}, in {', '.join(sorted(files))}, is not what was saved: no "
                    "tensor there has its digest",
                )
    if left:
        verdict.remarks.append(
            f"{' and '.join(left).capitalize()} lie in flat buffers, whose order the files do not "
            "say: their digests are compared when the checkpoint is loaded, not here."
        )
    if not verdict.damages:
        verdict.is_proved = not left
        verdict.remarks.append(f"{proved} tensors are what was saved, as their digests show.")


def _compare_main_weights(checkpoint: Checkpoint, record: Record | None, verdict: Verdict) -> None:
    if checkpoint.args.get("fp8_param_gather"):
        verdict.remarks.append("Main weights were not compared with the model's, which are in fp8.")
        return
    count = 0
    try:
        for name, file, numel, unlike in compared(checkpoint, record):
            count += 1
            if unlike:
                verdict.add(
                    MAIN_WEIGHTS,
                    f"{name} in {file}: {unlike} of {numel} elements are not those that the "
                    "model's weights were made of",
                )
    except (CheckpointError, ValueError) as error:  # the latter of shapes that do not fit
        verdict.add(MAIN_WEIGHTS, f"main weights cannot be compared with the model's: {error}")
    buckets = any(tensor.is_bucket for tensor in checkpoint.tensors)
    if not count and (buckets or not checkpoint.folder.is_distributed):
        verdict.remarks.append(
            "Main weights were not compared with the model's: the files do not say which belong "
            "to which."
        )


def _in(files: Collection[str]) -> str:
    more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
    return f" in {', '.join(list(files)[:3])}{more}" if files else ""
