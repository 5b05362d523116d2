"""Checkpoints that cannot be written: what is said of which error."""

import errno
import os
from argparse import Namespace
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_came.megatron.checkpoints.unwritten import failures_said, folder_problem

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.pt")
RESET = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
OF_A_WORKER = RuntimeError("Worker failure: <class 'OSError'>")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, r"\(No space left on device: x.pt; \d+ MiB are free there\): make room"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "a file cann"),
        (RuntimeError("basic_ios::clear: iostream error"), "a file cannot be written"),
        (CheckpointException("write", {1: (FULL, [])}), "No space left on device: x.pt"),
        (CheckpointException("write", {1: (OF_A_WORKER, [])}), "see the lines above"),
        (CheckpointException("write", {}), "see the lines above"),
        (CheckpointException("plan", {1: (KeyError("x"), [])}), r"\(KeyError: 'x'; "),
        (RuntimeError("Connection closed by peer [127.0.0.1]"), "another rank ended while iter"),
        (RuntimeError("[127.0.0.1]: Connection reset by peer"), "another rank ended while iter"),
    ],
)
def test_a_file_that_cannot_be_written(tmp_path, error, said):
    with (
        pytest.raises(SystemExit, match=said) as ended,
        failures_said("iteration 4", tmp_path),
    ):
        raise error
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize("error", [KeyError("x"), RESET])
def test_other_errors_are_left_alone(tmp_path, error):
    with pytest.raises(type(error)), failures_said("iteration 4", tmp_path):
        raise error


@pytest.mark.parametrize("name", ["", "new/newer", "msc://profile/x"])
def test_folders_that_can_be_written(tmp_path, name):
    assert folder_problem(Namespace(save=name if ":" in name else str(tmp_path / name))) is None
    assert folder_problem(Namespace(save=None)) is None


def test_nothing_is_written_without_training(tmp_path):
    (tmp_path / "file").touch()
    assert folder_problem(Namespace(save=str(tmp_path / "file"), skip_train=True)) is None


def test_a_folder_that_this_user_may_not_enter(tmp_path, monkeypatch):
    closed, stat, access = tmp_path / "closed", os.stat, os.access
    closed.mkdir()

    def refusing(path, *args, **kwargs):
        if closed in Path(path).parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refusing)  # root may enter all
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    problem = folder_problem(Namespace(save=str(closed / "new")))
    assert problem.startswith(f"--save {closed / 'new'}, since {closed} cannot be written")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_place_of_a_folder(tmp_path, name):
    (tmp_path / "file").touch()
    problem = folder_problem(Namespace(save=str(tmp_path / name)))
    assert "file is no folder: name another" in problem


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    problem = folder_problem(Namespace(save=str(tmp_path / "new")))
    assert problem.startswith(f"--save {tmp_path / 'new'}, since {tmp_path} cannot be written")
