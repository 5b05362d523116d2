"""Archives that ``torch.save`` does not write, and such as PyTorch would read otherwise."""

import contextlib
import io
import os
import pickle
import re
import shutil
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.checkpoint_files.folder import complete, find
from megatron_came.checkpoint_files.stored import Item
from megatron_came.tools import inspect
from tests.support.stored_checkpoints import common, saved, write_distributed, write_legacy
from tests.support.strangers import Call, refused


def rewritten(data: bytes, change) -> bytes:
    """An archive of torch.save with other records or another compression."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            change(new, entry.filename, old.read(entry))
    return out.getvalue()


def compressed(archive, name, data):
    bomb = data + bytes(50 << 20) if name.endswith("data.pkl") else data
    archive.writestr(name, bomb, zipfile.ZIP_DEFLATED)


def big_endian(archive, name, data):
    archive.writestr(name, b"big" if name.endswith("byteorder") else data)


def without_pickle(archive, name, data):
    if not name.endswith("data.pkl"):
        archive.writestr(name, data)


def without_data(archive, name, data):
    if "/data/" not in name:
        archive.writestr(name, data)


@pytest.mark.parametrize("change", [compressed, big_endian, without_pickle, without_data])
def test_archives_that_torch_does_not_write(tmp_path, capsys, change):
    rank = write_legacy(tmp_path)
    file = rank / "model_optim_rng.pt"
    file.write_bytes(rewritten(file.read_bytes(), change))
    assert str(file) in refused(tmp_path, capsys, tmp_path / "marker")


def test_no_rows_of_a_tensor_are_read_as_none(tmp_path):
    """A parameter without elements has such a place in a flat buffer."""
    torch.save(torch.ones(4), tmp_path / "file")
    with Item(tmp_path / "file").open() as archive:
        assert archive.load().rows(2, 0).shape == (0,)


def test_a_tensor_whose_header_is_gone_is_noticed_when_the_pickle_is_read(tmp_path):
    """A run looks that far alone before it says what it could not read."""
    file = write_legacy(tmp_path) / "model_optim_rng.pt"
    data = file.read_bytes()
    headers = [found.start() for found in re.finditer(rb"PK\x03\x04", data)]
    place = next(each for each in headers if b"/data/" in data[each : each + 60])
    file.write_bytes(data[:place] + bytes(4) + data[place + 4 :])
    with pytest.raises(CheckpointError, match="data/0 in it has no header"):
        Item(file).load()


def sound() -> bytes:
    """What is to be read here."""
    return saved({**common(), "model": {}})


def zipped(*members: tuple[str, bytes]) -> bytes:
    """An archive that may hold a name twice."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in (*members, ("a/version", b"3\n")):
            archive.writestr(name, data)
    return out.getvalue()


def with_two_directories(good: bytes, evil: bytes) -> bytes:
    """PyTorch goes by where the directory is said to begin, Python by where it should end."""
    parts = []
    for data in (evil, good):
        end = data.rindex(b"PK\x05\x06")
        size, start = struct.unpack("<2I", data[end + 12 : end + 20])
        parts.append((data[:start], bytearray(data[start : start + size])))
    (evil_members, evil_directory), (good_members, good_directory) = parts
    assert len(evil_directory) == len(good_directory)
    # Where Python looks for members: a directory's length before where they would be.
    position = 0
    while position < len(good_directory):
        lengths = struct.unpack("<3H", good_directory[position + 28 : position + 34])
        at = slice(position + 42, position + 46)
        (offset,) = struct.unpack("<I", good_directory[at])
        moved = offset + len(evil_members) - len(good_members)
        good_directory[at] = struct.pack("<I", moved)
        position += 46 + sum(lengths)
    count = len(zipfile.ZipFile(io.BytesIO(good)).namelist())
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(evil_directory), 0, 0)
    end = end[:16] + struct.pack("<I", len(evil_members)) + end[20:]
    return evil_members + evil_directory + good_members + good_directory + end


def ambiguous(marker: Path) -> dict[str, bytes]:
    """Archives of which PyTorch unpickles something else than stands where one would look."""
    call = Call(eval, f"open({str(marker)!r}, 'w')")
    good, evil = pickle.dumps(common(), 2), pickle.dumps(call, 2)
    longer = evil[:-1] + b"N0" * len(good) + b"."
    return {
        "pickle-before-it": pickle.dumps(call, 2) + sound(),
        "evil-twice": zipped(("a/data.pkl", evil), ("a/data.pkl", good)),
        "good-twice": zipped(("a/data.pkl", good), ("a/data.pkl", evil)),
        "other-letters": zipped(("a/DATA.PKL", evil), ("a/data.pkl", good)),
        "other-folder": zipped(("e/version", b"3\n"), ("a/data.pkl", good), ("e/data.pkl", evil)),
        "two-directories": with_two_directories(
            zipped(("a/data.pkl", good)), zipped(("a/data.pkl", longer))
        ),
        "comment": sound()[:-2] + b"\x04\0more",
        "torchscript": zipped(("a/data.pkl", good), ("a/constants.pkl", evil)),
    }


@pytest.mark.parametrize("name", ambiguous(Path("nothing")))
def test_archives_that_torch_would_read_otherwise(tmp_path, capsys, name):
    marker = tmp_path / "marker"
    file = write_legacy(tmp_path) / "model_optim_rng.pt"
    file.write_bytes(ambiguous(marker)[name])
    assert str(file) in refused(tmp_path, capsys, marker)


def test_torch_does_read_them_otherwise(tmp_path):
    """Otherwise the test above would prove little."""
    file, fooled = tmp_path / "file.pt", set()
    for name, data in ambiguous(tmp_path / "marker").items():
        file.write_bytes(data)
        with contextlib.suppress(Exception):
            torch.load(file, weights_only=False)
        if (tmp_path / "marker").exists():
            fooled.add(name)
            (tmp_path / "marker").unlink()
    assert {"pickle-before-it", "two-directories"} <= fooled


def test_two_formats_in_one_folder(tmp_path, capsys):
    """Megatron loads the other one where metadata.json is gone."""
    folder, marker = write_distributed(tmp_path), tmp_path / "marker"
    (folder / "mp_rank_00").mkdir()
    call = Call(eval, f"open({str(marker)!r}, 'w')")
    (folder / "mp_rank_00" / "model_optim_rng.pt").write_bytes(saved(call))
    assert "holds two checkpoints" in refused(tmp_path, capsys, marker)


def test_dataloader_state_is_no_second_checkpoint(tmp_path):
    """--dataloader-save to the folder of --save puts it there."""
    folder = write_distributed(tmp_path)
    (folder / "mp_rank_00").mkdir()
    (folder / "mp_rank_00" / "train_dataloader_dprank000.pt").write_bytes(saved({}))
    assert find(folder).path == folder


@pytest.mark.parametrize(
    "name",
    [
        "._model_optim_rng.pt",
        "._mp_rank_00",
        "train_dataloader_dprank000.pt",
        "model_optim_rng 2.pt",
    ],
)
def test_files_that_megatron_does_not_read_are_no_part_of_a_checkpoint(tmp_path, capsys, name):
    """As macOS, its data loader and people leave them there."""
    rank = write_legacy(tmp_path)
    (rank / name).write_bytes(b"Mac OS X")
    (rank.parent / "mp_rank_00.tar").write_bytes(b"x")
    assert inspect.main([str(tmp_path), "--verify"]) == 0, capsys.readouterr().err
    assert complete(tmp_path) == ["iter_0000004"]
    (rank / "model_optim_rng.pt").unlink()
    assert inspect.main([str(tmp_path), "--verify"]) == 1
    assert f"{rank} holds no model file" in capsys.readouterr().err
    assert complete(tmp_path) == []
    shutil.rmtree(rank)
    assert inspect.main([str(tmp_path)]) == 2
    assert "holds no checkpoint of Megatron" in capsys.readouterr().err


def test_archives_of_another_kind(tmp_path, capsys):
    rank = write_legacy(tmp_path)
    file = rank / "model_optim_rng.pt"
    marker = tmp_path / "marker"
    torch.save(
        Call(eval, f"open({str(marker)!r}, 'w')"), file, _use_new_zipfile_serialization=False
    )
    assert "from before PyTorch 1.6" in refused(tmp_path, capsys, marker)
    file.write_bytes(pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')")))
    assert "cannot be read" in refused(tmp_path, capsys, marker)
    file.unlink()
    os.mkfifo(file)  # would be waited for, for ever
    assert "is not a file" in refused(tmp_path, capsys, marker)
    file.unlink()
    file.symlink_to("/dev/zero")
    assert "is not a file" in refused(tmp_path, capsys, marker)
