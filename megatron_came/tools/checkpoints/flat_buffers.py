"""Parameters in the flat buffer of ``distrib_optim.pt``, which says nothing of their places.

Megatron lays parameters out in the reverse of the model's order, each from a multiple of 64
elements of its bucket on; where buckets end is not said. So each is looked for behind the one
before, where a digest of the record fits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

from megatron_came.checkpoint_files.legacy import LegacyTensor
from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, digest_whole

_ALIGNMENT = 64
_KINDS = {"param": MAIN_WEIGHTS, "exp_avg": MOMENTUM}

Shape = tuple[int, ...]
Key = tuple[Shape, int]


def buffers(tensors: Collection[LegacyTensor]) -> dict[str, LegacyTensor]:
    """The only buffer of main weights and of momentum, by kind; none if there are several."""
    found = [
        tensor
        for tensor in tensors
        if tensor.path.name == "distrib_optim.pt"
        and len(tensor.keys) == 4
        and tensor.keys[-1] in _KINDS
    ]
    by_kind = {_KINDS[tensor.keys[-1]]: tensor for tensor in found}
    return by_kind if len(found) == len(by_kind) == len(_KINDS) else {}


def digests_in(
    flat: Mapping[str, LegacyTensor], shapes: list[Shape], known: Mapping[str, Collection[Key]]
) -> Iterator[tuple[str, Key]]:
    """Compute the digests of all parameters in the buffers.

    Args:
        flat: as :func:`buffers` returns.
        shapes: of the parameters, in the model's order.
        known: by kind, what the record has.

    Yields:
        Kind, and shape and digest of a parameter.
    """
    cursor = base = 0
    for shape in reversed(shapes):
        aligned = base + math.ceil((cursor - base) / _ALIGNMENT) * _ALIGNMENT
        best: dict[str, Key] = {}
        for start in dict.fromkeys((aligned, cursor)):
            here = {kind: _key(tensor, start, shape) for kind, tensor in flat.items()}
            fits = any(key in known[kind] for kind, key in here.items())
            if fits or not best:
                best, place = here, start
            if fits:
                break
        if place != aligned:  # a bucket begins
            base = place
        cursor = place + math.prod(shape)
        yield from best.items()


def _key(tensor: LegacyTensor, start: int, shape: Shape) -> Key:
    count = math.prod(shape)
    if start + count > tensor.stored.numel:
        return shape, -1
    values: Tensor = tensor.stored.rows(start, count).view(shape)
    return shape, digest_whole(values, as_fp32=True)
