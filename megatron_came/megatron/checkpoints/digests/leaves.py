"""The named boxes that a parameter consists of in a checkpoint."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_came.core.digests import PlacedBox, name_of
from megatron_came.core.state import AVERAGED_AXIS, without_averaged_axis
from megatron_came.dtensors import local_of
from megatron_came.megatron.checkpoints import megatron_fsdp
from megatron_came.megatron.checkpoints.factors import cuts_of, place_in
from megatron_came.megatron.checkpoints.fsdp2 import whole_leaves
from megatron_came.megatron.parameter_names import sharded_entries
from megatron_came.megatron.quantized import plain


@dataclass(frozen=True, slots=True)
class Leaf:
    """A box of a tensor of the model, as the checkpoint names it.

    Attributes:
        name: with its layer and expert.
        box: where it lies in the rank's own tensor and in the whole one.
        is_first: whether its data-parallel group stands for all ranks that hold the same.
        is_dp_first: whether this rank stands for its data-parallel group.
        copy: its values, where it does not lie in the rank's own tensor; otherwise None.
    """

    name: str
    box: PlacedBox
    is_first: bool
    is_dp_first: bool
    copy: Tensor | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank stands for all that hold the same."""
        return self.is_first and self.is_dp_first


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the model, and its boxes.

    Attributes:
        tensor: what this rank holds.
        of_factors: boxes of which factors are the sums, where they are more: FSDP2's.
        start: its first element in the tensor that the boxes are of, of which it is a slice;
            None where it is all of that.
        shape: of that tensor, then.
    """

    tensor: Tensor
    leaves: tuple[Leaf, ...]
    of_factors: tuple[Leaf, ...] = ()
    start: int | None = None
    shape: tuple[int, ...] = ()

    @property
    def views(self) -> Iterator[Leaf]:
        """The boxes that lie in the tensor."""
        return (leaf for leaf in self.leaves if leaf.copy is None)

    def factor(self, key: str) -> Iterator[Leaf]:
        """The boxes that a factor consists of, as :func:`.factors.boxes_of` has it."""
        axis = AVERAGED_AXIS[key]
        seen = set()
        for leaf in self.of_factors or self.views:
            box = leaf.box
            own = PlacedBox(
                *(
                    without_averaged_axis(key, s)
                    for s in (box.place, box.size, box.offset, box.shape)
                )
            )
            if (own.place, own.size) in seen:
                continue
            seen.add((own.place, own.size))
            # Ranks that hold other parts of the averaged dimension hold the same factor.
            is_first = leaf.is_first and (axis is None or box.offset[axis] < box.size[axis])
            yield Leaf(leaf.name, own, is_first, leaf.is_dp_first)


# By chunk of a model: its tensors as they were, and what :func:`_read` said of them. Making a
# sharded state takes longer than adding up a small model.
_Leaves = tuple[tuple[Leaf, ...], tuple[Leaf, ...], int | None, tuple[int, ...]]
_known: WeakKeyDictionary[Any, tuple[object, dict[int, _Leaves]]] = WeakKeyDictionary()


def unwrapped(model: Any) -> list[Any]:
    """Return the chunks of a model without what Megatron has wrapped around them."""
    chunks = []
    for chunk in model if isinstance(model, list) else [model]:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        chunks.append(chunk)
    return chunks


def untrained(model_chunks: Iterable[Any]) -> set[int]:
    """Return the ``id`` of buffers and frozen weights, which may hold any number: a mask -inf."""
    tensors = (each for chunk in model_chunks for each in (*chunk.parameters(), *chunk.buffers()))
    return {id(each) for each in tensors if not each.requires_grad}


def entries_of(model_chunks: Iterable[Any]) -> dict[int, Entry]:
    """Return the tensors of a model without wrappers, by ``id`` of the parameter or buffer."""
    found: dict[int, Entry] = {}
    for chunk in model_chunks:
        has_fsdp = megatron_fsdp.holds(chunk)  # if so, its DTensors are in place from here on
        tensors = {id(each): local_of(each) for each in (*chunk.parameters(), *chunk.buffers())}
        are = tuple((key, tuple(each.shape), each.stride()) for key, each in tensors.items())
        were, leaves = _known.get(chunk, (None, {}))
        if were == are:
            found |= {key: Entry(tensors[key], *known) for key, known in leaves.items()}
            continue
        entries = _read_fsdp(chunk) if has_fsdp else _read(chunk)
        found |= entries
        # What is kept must not keep a tensor.
        if all(tensors.get(key) is entry.tensor for key, entry in entries.items()) and all(
            leaf.copy is None for entry in entries.values() for leaf in entry.leaves
        ):
            _known[chunk] = (
                are,
                {
                    key: (entry.leaves, entry.of_factors, entry.start, entry.shape)
                    for key, entry in entries.items()
                },
            )
    return found


def _read(chunk: Any) -> dict[int, Entry]:
    entries = {}
    # Of FSDP2's parameters the sharded state has the local tensors.
    owners = {id(local_of(param)): param for param in chunk.parameters()}
    for entry in sharded_entries(chunk.sharded_state_dict()):
        single, owner = isinstance(entry, ShardedTensor), owners.get(id(entry.data), entry.data)
        values = plain(entry.data)
        leaves = cuts_of(entry, values)
        own = tuple(_leaf(leaf, values) for leaf in leaves if leaf.data is not None)
        of_factors: tuple[Leaf, ...] = ()
        if owner is not entry.data:
            whole, tensor = whole_leaves(leaves, owner, is_stacked=not single)
            of_factors = tuple(_leaf(leaf, tensor) for leaf in whole)
        entries[id(owner)] = Entry(entry.data, own, of_factors)
    return entries


def _read_fsdp(chunk: Any) -> dict[int, Entry]:
    """Say where what this rank holds of Megatron-FSDP's DTensors lies; a collective."""
    entries = {}
    params = megatron_fsdp.named_parameters(chunk)
    for name, parts in megatron_fsdp.parted(chunk, params).items():
        param, index = params[name], params[name].megatron_fsdp_dist_index
        cut = megatron_fsdp.cut_of(param)
        tp_rank = index.get_submesh([index.tp_dim]).get_local_rank()
        shape = tuple(param.orig_param.shape)
        size = (shape[0] // len(parts), *shape[1:])
        offset = [0] * len(shape)
        if cut is not None:
            offset[cut.dim] = tp_rank * size[cut.dim]
        is_first = cut is not None or tp_rank == 0
        is_dp_first = param.device_mesh.get_local_rank(0) == 0
        leaves = []
        for number, (part, tensor) in enumerate(parts.items()):
            place = (number * size[0], *(0 for _ in shape[1:]))
            box = PlacedBox(place, size, tuple(offset), tuple(tensor.shape))
            leaves.append(Leaf(part, box, is_first, is_dp_first))
        start = megatron_fsdp.start_of(param, cut, tp_rank)
        entries[id(param)] = Entry(local_of(param), tuple(leaves), start=start, shape=shape)
    return entries


def _leaf(leaf: ShardedTensor, whole: Tensor) -> Leaf:
    axes = leaf.prepend_axis_num
    size, offset = tuple(leaf.data.shape), tuple(leaf.global_offset[axes:])
    place, copy = (0,) * len(size), None
    try:
        place = tuple(each.start for each in place_in(leaf.data, whole))
    except ValueError:
        copy = leaf.data
    replica = leaf.replica_id if isinstance(leaf.replica_id, tuple) else (leaf.replica_id,)
    return Leaf(
        name=name_of(leaf.key, tuple(leaf.global_offset[:axes])),
        box=PlacedBox(place, size, offset, tuple(leaf.global_shape[axes:])),
        is_first=not any(replica[:-1]),
        is_dp_first=replica[-1] == 0,
        copy=copy,
    )
