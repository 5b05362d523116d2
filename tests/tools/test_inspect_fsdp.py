"""``megatron-came inspect`` of ``--ckpt-format fsdp_dtensor``, without its training."""

import argparse

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_came.tools import inspect

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write(folder, **more):
    """Write a checkpoint of a weight, its momentum and a factor, and of no digests."""
    momentum, factor = {"w": torch.ones(3, 2)}, {"w": torch.ones(3)}
    state = {
        "args": argparse.Namespace(optimizer="came"),
        "iteration": 3,
        "model": {"module.w": torch.ones(3, 2)},
        "optimizer": {"state": {"exp_avg": momentum, "exp_avg_sq_row": factor}},
        "rng_state": torch.zeros(4),
        **more,
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return str(folder)


def test_it_says_what_is_weight_and_what_is_state(tmp_path, capsys):
    assert inspect.main([write(tmp_path / "iter_0000003")]) == 0
    shown = capsys.readouterr().out
    assert "iteration   3\noptimizer   came\n" in shown
    for kind in ("weights", "momentum", "factors", "other"):
        assert f"{kind:<13}     1 tensors" in shown


def test_without_digests_nothing_is_called_sound(tmp_path, capsys):
    assert inspect.main(["--verify", write(tmp_path / "iter_0000003")]) == 0
    shown = capsys.readouterr().out
    assert "It holds no digests" in shown
    assert "No damage was found." in shown


def test_a_repair_that_is_refused_is_not_advised(tmp_path, capsys):
    bad = {"state": {"exp_avg": {"w": torch.full((3, 2), torch.nan)}}}
    assert inspect.main(["--verify", write(tmp_path / "iter_0000003", optimizer=bad)]) == 1
    assert "afresh from its weights with --no-load-optim." in capsys.readouterr().out


@pytest.mark.parametrize("more", [{"a": 1, "a.b": 2}, {"optimizer.param_groups": {"x": 1}}])
def test_names_that_contradict_each_other_are_refused(tmp_path, capsys, more):
    assert inspect.main([write(tmp_path / "iter_0000003", **more)]) == 2
    assert "contradict" in capsys.readouterr().err
