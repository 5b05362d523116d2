"""Sums of digests over ranks of which none holds all, nor knows all names."""

import gc
import pickle
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_came.core.digests import MOMENTUM, WEIGHTS, PlacedBox, digest_whole
from megatron_came.megatron.checkpoints.digests import leaves
from megatron_came.megatron.checkpoints.digests.leaves import Entry, Leaf
from megatron_came.megatron.checkpoints.digests.saving import record_of
from megatron_came.megatron.checkpoints.digests.sums import Sums, distinct
from tests.training.groups import connect, meet
from tests.training.harness import fork

RANKS = 3


def _entry(name, tensor):
    box = PlacedBox.whole(tuple(tensor.shape))
    return Entry(tensor, (Leaf(name, box, is_first=True, is_dp_first=True),))


def _tensors():
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(7, 5, generator=generator) for name in ("a", "b", "c")}


def main():
    """Ranks 0 and 1 hold unlike slices of a and b, rank 2 all of c, as the last stage would."""
    connect("sums", meet())
    rank, whole = dist.get_rank(), _tensors()
    mine = {name: whole[name].clone() for name in (("c",) if rank == 2 else ("a", "b"))}
    entries = {id(tensor): _entry(name, tensor) for name, tensor in mine.items()}
    by_name = {entry.leaves[0].name: entry for entry in entries.values()}
    added = Sums(entries, is_loaded=True)
    for name, start, stop in [[("a", 0, 33)], [("a", 33, 35), ("b", 0, 35)], [("c", 0, 35)]][rank]:
        values = whole[name].view(-1)[start:stop]
        added.add_slice((MOMENTUM,), by_name[name], iter([(0, values)]), start)
    if rank == 2:
        added.add_weights(by_name["c"])
        added.add_factors(by_name["c"], {"exp_avg_sq_row": torch.tensor([1.0] * 6 + [-1.0])})
    if rank == 1:
        added.add_slice((MOMENTUM,), by_name["b"], iter([(0, torch.tensor([torch.nan]))]), 34)
    added.differing["c" if rank == 2 else "a"] += 2
    values = distinct(added.names)
    names = tuple(name for each in values for name in each)
    seen = (len(values), distinct(rank == 1), added.over_all_ranks(names))
    Path(sys.argv[1], f"{rank}").write_bytes(pickle.dumps(seen))
    dist.destroy_process_group()


def test_sums_over_ranks_that_hold_unlike_parts_are_those_of_the_whole(tmp_path):
    assert not fork(__name__, RANKS, [str(tmp_path)], tmp_path / "log")
    first, *others = (pickle.loads((tmp_path / f"{rank}").read_bytes()) for rank in range(RANKS))
    assert all(other == first for other in others)
    lists, flags, totals = first
    assert (lists, flags) == (2, [False, True])
    whole = _tensors()
    momenta = {name: saved.digest for name, saved in totals.tensors[MOMENTUM].items()}
    assert momenta.keys() == whole.keys()
    assert momenta["a"] == digest_whole(whole["a"])
    assert momenta["c"] == digest_whole(whole["c"])
    assert totals.tensors[WEIGHTS].keys() == {"c"}
    assert totals.tensors["exp_avg_sq_row"]["c"].shape == (7,)
    assert totals.flaws == [
        (MOMENTUM, "b", "a number that is not finite"),
        ("exp_avg_sq_row", "c", "a negative number"),
    ]
    assert totals.differing == {"a": 4, "c": 2}


class _Chunk(torch.nn.Linear):
    """Counts how often its tensors are asked for."""

    asked = 0

    def sharded_state_dict(self):
        from megatron.core.dist_checkpointing import ShardedTensor

        self.asked += 1
        items = self.state_dict(keep_vars=True).items()
        return {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in items}


def test_geometry_is_kept_until_a_tensor_is_another():
    chunk = _Chunk(3, 4)
    first = leaves.entries_of([chunk])
    again = leaves.entries_of([chunk])
    assert chunk.asked == 1
    assert again.keys() == first.keys()
    for key, entry in again.items():
        assert entry.tensor is first[key].tensor
        assert entry.leaves == first[key].leaves
    old = chunk.weight
    chunk.weight = torch.nn.Parameter(torch.zeros(4, 3))
    changed = leaves.entries_of([chunk])
    assert chunk.asked == 2
    assert changed[id(chunk.weight)].tensor is chunk.weight
    assert id(old) not in changed


def test_a_model_that_is_gone_is_not_kept():
    chunk = _Chunk(3, 4)
    leaves.entries_of([chunk])
    gone = weakref.ref(chunk), weakref.ref(chunk.weight)
    del chunk
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_only_what_is_trained_has_to_be_finite():
    """A causal mask among the buffers, or a frozen bias, may hold -inf in a sound checkpoint."""
    chunk = _Chunk(3, 4)
    chunk.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    chunk.bias.requires_grad_(False).fill_(float("nan"))
    record, flaw = record_of(1, [chunk], None)
    assert flaw is None
    assert record.tensors[WEIGHTS].keys() == {"weight", "bias", "mask"}
    chunk.weight.detach()[1, 2] = float("inf")
    _, flaw = record_of(2, [chunk], None)
    assert flaw == "rank 0: weights of weight holds a number that is not finite"
