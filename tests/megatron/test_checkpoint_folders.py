"""Folders that a run cannot resume from, told by names and sizes of files alone."""

import pathlib
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch

from megatron_came.checkpoint_files.folder import TRACKER
from megatron_came.megatron.checkpoints.folders import (
    folder_problem,
    folder_to_load,
    legacy_problem,
)


def args(**changes):
    return SimpleNamespace(**{"ckpt_step": None, "non_persistent_ckpt_type": None, **changes})


def distributed(place):
    place.mkdir(parents=True)
    (place / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (place / ".metadata").write_bytes(pickle.dumps({}))


def legacy(place):
    (place / "mp_rank_00").mkdir(parents=True)
    torch.save({}, place / "mp_rank_00" / "model_optim_rng.pt")


@pytest.fixture(params=[distributed, legacy])
def folder(request, tmp_path):
    """Two checkpoints, the second the latest."""
    for step in (10, 20):
        request.param(tmp_path / f"iter_{step:07d}")
    (tmp_path / TRACKER).write_text("20\n")
    return tmp_path


def test_a_whole_folder_is_no_problem(folder):
    assert folder_problem(folder, args()) is None
    assert folder_problem(str(folder), args(ckpt_step=10)) is None


@pytest.mark.parametrize(
    "named", ["", "  \n", "hello", "-20", "20.0", "2o", "\uff11\uff10", "None", "\0" * 4]
)
def test_a_tracker_that_names_no_iteration_is_refused(folder, named):
    (folder / TRACKER).write_text(named)
    problem = folder_problem(folder, args())
    assert TRACKER in problem
    assert "complete there: 10, 20" in problem
    assert folder_problem(folder, args(ckpt_step=10)) == problem  # Megatron reads it all the same


def test_a_checkpoint_saved_in_between_is_the_one_that_megatron_takes(tmp_path):
    between = tmp_path / "non_persistent"
    for place, step in ((tmp_path, 10), (tmp_path, 20), (between, 25)):
        distributed(place / f"iter_{step:07d}")
        (place / TRACKER).write_text(f"{step}")
    of_both = {"non_persistent_ckpt_type": "global"}
    assert folder_problem(tmp_path, args(**of_both)) is None
    assert folder_to_load(tmp_path, args(**of_both)) == str(between)
    # Megatron takes the newer one of both, whatever is asked for.
    problem = folder_problem(tmp_path, args(ckpt_step=10, **of_both))
    assert problem.startswith("--ckpt-step 10 with --non-persistent-ckpt-type global: ")
    assert f"{between} holds a newer checkpoint, of iteration 25" in problem
    assert folder_problem(tmp_path, args(ckpt_step=10)) is None
    assert folder_problem(tmp_path, args(ckpt_step=25, **of_both)) is None
    (tmp_path / TRACKER).write_text("30")  # newer, and not there
    assert folder_to_load(tmp_path, args(**of_both)) == str(tmp_path)
    assert "iter_0000030, which is not there" in folder_problem(tmp_path, args(**of_both))
    (tmp_path / TRACKER).write_text("20")
    for spoil, said in (
        (lambda: (between / "iter_0000025" / ".metadata").unlink(), ".metadata is missing"),
        (lambda: (between / TRACKER).write_text("x"), f"{TRACKER} holds 'x', and no iteration"),
    ):
        spoil()
        problem = folder_problem(tmp_path, args(**of_both))
        assert problem.startswith(f"{between}: ")
        assert said in problem
        assert problem.endswith(f"; or move that folder away, to go on from --load {tmp_path}.")
    shutil.rmtree(between)
    (tmp_path / TRACKER).unlink()
    assert "holds checkpoints but no" in folder_problem(tmp_path, args(**of_both))


def test_weights_of_a_step_that_no_tracker_names_are_loaded(folder):
    (folder / TRACKER).unlink()
    given = args(ckpt_step=10, load=folder, perform_initialization=False)
    assert folder_problem(folder, given) is None


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("latest", "between", "step", "is_newer"),
    [
        ("25", "25", None, True),
        ("25", "24", None, False),
        ("release", "0", None, True),
        ("30", "25", 25, True),
        ("20", "25", 26, False),
    ],
)
def test_the_newer_one_of_both(tmp_path, latest, between, step, is_newer, own):
    folder = tmp_path / ("own" if own else "non_persistent")
    folder.mkdir()
    (tmp_path / TRACKER).write_text(latest)
    (folder / TRACKER).write_text(between)
    given = args(ckpt_step=step, non_persistent_ckpt_type="global")
    given.non_persistent_global_ckpt_dir = str(folder) if own else None
    assert folder_to_load(tmp_path, given) == str(folder if is_newer else tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"), [({}, "iter_0000030"), ({"ckpt_step": 5}, "iter_0000005")]
)
def test_an_iteration_that_is_not_there_is_refused(folder, changes, named):
    (folder / TRACKER).write_text("30")
    problem = folder_problem(folder, args(**changes))
    assert f"the checkpoint {named}, which is not there" in problem
    assert "--ckpt-step" in problem
    assert "10, 20" in problem


def test_checkpoints_without_a_tracker_are_refused(folder):
    (folder / TRACKER).unlink()
    assert f"no {TRACKER}" in folder_problem(folder, args())
    assert "write 20 to it" in folder_problem(folder, args())


def test_a_release_is_no_iteration(folder):
    (folder / "iter_0000020").rename(folder / "release")
    (folder / TRACKER).write_text("release")
    assert folder_problem(folder, args()) is None


def test_a_first_start_is_no_problem(tmp_path):
    assert folder_problem(tmp_path / "nothing", args()) is None
    assert folder_problem(tmp_path, args()) is None
    # A run that was killed in its first save.
    (tmp_path / "iter_0000010").mkdir()
    (tmp_path / "iter_0000010" / "__0_0.distcp").write_bytes(b"x")
    assert folder_problem(tmp_path, args()) is None
    assert folder_problem(None, args()) is None
    assert folder_problem("msc://somewhere/run", args()) is None


@pytest.mark.parametrize("lost", [".metadata", "metadata.json"])
def test_a_distributed_checkpoint_without_its_lists_is_refused(tmp_path, lost):
    distributed(tmp_path / "iter_0000010")
    (tmp_path / TRACKER).write_text("10")
    (tmp_path / "iter_0000010" / lost).unlink()
    assert f"iter_0000010/{lost} is missing" in folder_problem(tmp_path, args())


SUMMARIES = {
    "": "is no JSON",
    '{"sharded_backend": "torch_dis': "is no JSON",
    "[" * 20_000: "is no JSON",
    "[1]": "has no sharded_backend",
    '{"sharded_bacjend": "torch_dist"}': "has no sharded_backend",
    '{"sharded_backend": "uorch_dist"}': "has sharded_backend 'uorch_dist', and not 'torch_dist'",
    '{"sharded_backend": "torch_dist", "sharded_backend_version": 3}': "version 3, and not 1",
}


@pytest.mark.parametrize("text", SUMMARIES)
def test_a_damaged_summary_is_refused(tmp_path, text):
    distributed(tmp_path / "iter_0000010")
    (tmp_path / TRACKER).write_text("10")
    (tmp_path / "iter_0000010" / "metadata.json").write_text(text)
    problem = folder_problem(tmp_path, args())
    assert "iter_0000010/metadata.json" in problem
    assert SUMMARIES[text] in problem


def test_iteration_0_is_refused(folder):
    problem = folder_problem(folder, args(ckpt_step=0))
    assert "--ckpt-step 0 is no checkpoint" in problem
    assert "complete there: 10, 20" in problem


@pytest.mark.parametrize("left", [0, 1, -1])
def test_a_truncated_list_is_refused(tmp_path, left):
    distributed(tmp_path / "iter_0000010")
    (tmp_path / TRACKER).write_text("10")
    metadata = tmp_path / "iter_0000010" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:left])
    problem = folder_problem(tmp_path, args())
    assert "iter_0000010/.metadata is truncated" in problem
    assert "complete there: none" in problem


def test_an_empty_iteration_is_refused(tmp_path):
    (tmp_path / "iter_0000010").mkdir()
    (tmp_path / TRACKER).write_text("10")
    assert "holds no complete checkpoint" in folder_problem(tmp_path, args())


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    assert "is a file" in folder_problem(tmp_path / "run", args())


def test_a_folder_that_this_user_cannot_read_is_refused(folder, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "read_text", denied)
    problem = folder_problem(folder, args())
    assert f"{folder / TRACKER} cannot be read (Permission denied)" in problem


def test_files_of_a_legacy_checkpoint(tmp_path):
    legacy(tmp_path / "iter_0000010")
    whole = tmp_path / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    assert legacy_problem(tmp_path, str(whole)) is None
    gone = whole.with_name("distrib_optim.pt")
    assert "distrib_optim.pt is missing" in legacy_problem(tmp_path, str(gone))
    (tmp_path / TRACKER).write_text("20")
    assert "complete there: 10" in folder_problem(tmp_path, args())
    whole.write_bytes(whole.read_bytes()[:-30])
    assert "complete there: none" in folder_problem(tmp_path, args())
    assert "truncated" in legacy_problem(tmp_path, str(whole))


def test_formats_that_megatron_fsdp_does_not_share_are_named(folder):
    problem = folder_problem(folder, args(use_megatron_fsdp=True))
    assert "iter_0000020 is of --ckpt-format torch" in problem
    assert "--use-megatron-fsdp loads fsdp_dtensor alone" in problem


def test_a_checkpoint_of_megatron_fsdp_needs_no_summary(tmp_path):
    place = tmp_path / "iter_0000020"
    place.mkdir()
    (tmp_path / TRACKER).write_text("20\n")
    fsdp = args(use_megatron_fsdp=True)
    assert "holds no complete checkpoint" in folder_problem(tmp_path, fsdp)
    (place / ".metadata").write_bytes(pickle.dumps({}))
    assert folder_problem(tmp_path, fsdp) is None
    (place / ".metadata").write_bytes(pickle.dumps({})[:-1])
    assert ".metadata is truncated" in folder_problem(tmp_path, fsdp)
