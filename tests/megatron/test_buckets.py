"""What is gathered of a buffer, at offsets that depend on its cut into buckets."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_came.megatron.checkpoints.buckets import (
    arrange,
    arrangement_problem,
    gathered_index,
    mended,
    offsets_as_gathered,
    spans_of,
)
from megatron_came.megatron.checkpoints.refusals import bucket_changes


def _buffer(sizes, ends):
    """A buffer of parameters of these sizes; buckets end behind those whose positions are given."""
    index, buckets, start, first = {}, [], 0, 0
    for position, size in enumerate(sizes):
        start = -(-start // 64) * 64
        index[torch.empty(size)] = (start, start + size, len(buckets))
        start += size
        if position in ends or position == len(sizes) - 1:
            padded = -(-start // 384) * 384
            whole = torch.empty(padded - first)
            buckets.append(SimpleNamespace(grad_data=whole, numel_unpadded=start - first))
            start = first = padded
    unpadded = sum(bucket.numel_unpadded for bucket in buckets)
    return SimpleNamespace(param_index_map=index, buckets=buckets, numel_unpadded=unpadded)


def _gathered(buffer, *, says=True):
    """As a legacy file has it: each parameter holds its position."""
    values = torch.zeros(buffer.numel_unpadded)
    for position, (start, end, _) in enumerate(gathered_index(buffer).values()):
        values[start:end] = position + 1
    tensors = {"param": values, "exp_avg": -values, "numel_unpadded": buffer.numel_unpadded}
    return {0: {"dtype": tensors}, "came": {"spans": spans_of([buffer])} if says else {}}


# The first two have as many elements.
CUTS = [((100, 100, 100), {1}), ((100, 100, 100), {0}), ((100, 100, 100), set())]


@pytest.mark.parametrize("saved", CUTS, ids=str)
@pytest.mark.parametrize("loaded", CUTS, ids=str)
def test_a_legacy_file_is_arranged_for_other_buckets(saved, loaded):
    buffer, file = _buffer(*loaded), _gathered(_buffer(*saved))
    assert arrangement_problem(file, [buffer]) is None
    arrange(file, [buffer])
    tensors = file[0]["dtype"]
    assert tensors["numel_unpadded"] == buffer.numel_unpadded == len(tensors["param"])
    for position, (start, end, _) in enumerate(gathered_index(buffer).values()):
        assert (tensors["param"][start:end] == position + 1).all()
        assert (tensors["exp_avg"][start:end] == -position - 1).all()


def test_a_file_that_does_not_say_how_it_was_cut(capsys):
    one, other, whole = (_buffer(*cut) for cut in CUTS)
    assert "--ddp-bucket-size" in arrangement_problem(_gathered(one, says=False), [whole])
    assert arrangement_problem(_gathered(whole, says=False), [whole]) is None
    assert not capsys.readouterr().out
    assert arrangement_problem(_gathered(one, says=False), [other]) is None
    assert "does not say how it was cut" in capsys.readouterr().out


def test_a_file_of_other_parameters():
    file = _gathered(_buffer((100, 90), {0}))
    assert "other sizes" in arrangement_problem(file, [_buffer((90, 100), {0})])


def test_what_differs_of_the_flags():
    plain = {"overlap_grad_reduce": True, "ddp_bucket_size": None, "ddp_num_buckets": None}

    def changed(saved, now):
        before = SimpleNamespace(**{**plain, "data_parallel_size": 2, **saved})
        return bucket_changes(before, SimpleNamespace(**{**plain, "data_parallel_size": 2, **now}))

    assert changed({}, {}) == ""
    assert changed({}, {"data_parallel_size": 40}) == ""
    assert "--ddp-bucket-size is 64000000" in changed({"data_parallel_size": 64}, {})
    assert changed({}, {"overlap_grad_reduce": False}) == "with --overlap-grad-reduce"
    assert changed({}, {"ddp_bucket_size": 7}) == "without --ddp-bucket-size"
    assert changed({"ddp_num_buckets": 3}, {}) == "with --ddp-num-buckets 3"


def _mended_method(self, *args):
    return [bucket.grad_data for buffer in self.buffers for bucket in buffer.buckets]


@pytest.mark.parametrize("is_mended", [False, True])
def test_offsets_are_megatrons_own_where_it_takes_padding_into_account(monkeypatch, is_mended):
    assert not mended()  # of the release that is installed
    if is_mended:
        name = "sharded_param_state_fully_reshardable"
        monkeypatch.setattr(DistributedOptimizer, name, _mended_method)
    assert mended() == is_mended
    buffer = _buffer([100, 100], {0})
    own = buffer.param_index_map
    with offsets_as_gathered([buffer]):
        assert (buffer.param_index_map is own) == is_mended
        assert list(buffer.param_index_map.values()) != list(own.values()) or is_mended
    assert buffer.param_index_map is own
