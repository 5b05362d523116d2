"""Digests of files of format ``torch``, whose tensors have other names than the record's.

A digest is all but unique, so a tensor of the record is found where some tensor of the same shape
in the files has its digest, whatever it is called there.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from megatron_came.checkpoint_files.folder import Checkpoint
from megatron_came.checkpoint_files.legacy import LegacyTensor
from megatron_came.core import digests
from megatron_came.core.digests import MOMENTUM, WEIGHTS, Record
from megatron_came.core.state import FACTORS
from megatron_came.tools.checkpoints import flat_buffers

if TYPE_CHECKING:
    from megatron_came.tools.checkpoints.verifying import Verdict

Key = tuple[tuple[int, ...], int]


def prove(checkpoint: Checkpoint, record: Record, verdict: Verdict) -> None:
    """Find every tensor of the record in the files of the only model-parallel rank."""
    tensors = [each for each in checkpoint.tensors if isinstance(each, LegacyTensor)]
    ranks = {tensor.path.parent.name for tensor in tensors}
    if len(ranks) > 1:
        verdict.remarks.append(
            f"Its digests are of whole tensors, and its files hold those of {len(ranks)} ranks: "
            "they are compared when it is loaded, not here."
        )
        return
    left: list[str] = []
    proved = 0
    flat = _found_in_buffers(tensors, record)
    for kind, named in record.tensors.items():
        candidates = [tensor for tensor in tensors if _kind(tensor) == kind]
        if kind in flat:
            found, files = flat[kind]
        elif candidates:
            found = Counter(_key(kind, tensor) for tensor in candidates)
            files = sorted({tensor.files[0] for tensor in candidates})
        else:
            left.append(kind)
            continue
        for name, saved in named.items():
            if found[saved.shape, saved.digest] > 0:
                proved += 1
                continue
            verdict.add(
                kind,
                f"{kind} of {name}, in {', '.join(files)}, is not what was saved: no tensor "
                "there has its digest",
            )
    if left:
        verdict.remarks.append(
            f"{' and '.join(left).capitalize()} lie in flat buffers, whose order the files do not "
            "say: their digests are compared when the checkpoint is loaded, not here."
        )
    if not verdict.damages:
        verdict.is_proved = not left
        verdict.remarks.append(f"{proved} tensors are what was saved, as their digests show.")


def _found_in_buffers(
    tensors: list[LegacyTensor], record: Record
) -> dict[str, tuple[Counter[Key], list[str]]]:
    """By kind, the digests of what lies in flat buffers, and the files of these."""
    flat = flat_buffers.buffers(tensors)
    known = {
        kind: {(saved.shape, saved.digest) for saved in record.tensors.get(kind, {}).values()}
        for kind in flat
    }
    if not all(known.values()):
        return {}
    shapes = [tensor.shape for tensor in tensors if _kind(tensor) == WEIGHTS]
    found: dict[str, tuple[Counter[Key], list[str]]] = {
        kind: (Counter(), tensor.files) for kind, tensor in flat.items()
    }
    for kind, key in flat_buffers.digests_in(flat, shapes, known):
        found[kind][0][key] += 1
    # An order that fits nowhere is another one, as of a model that freezes parameters.
    fits = any(key in known[kind] for kind in found for key in found[kind][0])
    return found if fits else {}


def _kind(tensor: LegacyTensor) -> str | None:
    words = [str(key) for key in tensor.keys]
    if words and words[0].startswith("model") and words[0][5:].isdigit() | (words[0] == "model"):
        return WEIGHTS
    if words and words[-1] in FACTORS:
        return words[-1]
    if words and words[-1] == MOMENTUM_KEY and "state" in words:
        return MOMENTUM
    if "fp32_from_fp16_params" in words:
        return digests.MAIN_WEIGHTS
    return None


MOMENTUM_KEY = "exp_avg"


def _key(kind: str, tensor: LegacyTensor) -> Key:
    values = tensor.stored.read()
    as_fp32 = kind != WEIGHTS
    if as_fp32 and values.dtype not in (torch.float32, torch.bfloat16):
        return tensor.shape, -1
    return tensor.shape, digests.digest_whole(values, as_fp32=as_fp32)
