"""Two at once into one file."""

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_came.data import files as data_files
from megatron_came.data.files import locked
from megatron_came.terminal.sentences import CommandError
from tests.support.datasets import TEXTS, run


class TestLocks:
    def test_two_into_one_prefix(self, tmp_path: Path, model: Path, capsys) -> None:
        (tmp_path / "in.txt").write_text(TEXTS[0])
        arguments = (tmp_path / "in.txt", "--output-prefix", tmp_path / "set", "--overwrite")
        holder = hold(tmp_path / "set_valid.idx")
        assert run(*arguments, "--tokenizer-model", model) == 0  # other files
        before = {path: path.read_bytes() for path in tmp_path.glob("set.*")}
        for name, more in {
            "set_valid.idx": ("--tokenizer-model", model, "--validation", "0.5"),
            "set.idx": ("--tokenizer-model", model),
            "set.bin": ("--tokenizer-model", model),
            "set.model": ("--train-tokenizer", "340"),
        }.items():
            if name != "set_valid.idx":
                holder = hold(tmp_path / name)
            capsys.readouterr()
            assert run(*arguments, *more) == 1
            assert capsys.readouterr().err == (
                f"megatron-came data: {tmp_path / name} is being written by process {holder}"
                f" on {socket.gethostname()}: wait until it ends, or give another name; if there"
                f" is no such process, remove {tmp_path}/.{name}.lock.\n"
            )
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)
        assert {path: path.read_bytes() for path in tmp_path.glob("set.*")} == before
        assert (tmp_path / ".set.model.lock").exists()  # of one that was killed: taken over
        assert run(*arguments, "--train-tokenizer", "340") == 0
        assert not (tmp_path / ".set.model.lock").exists()

    def test_what_appears_meanwhile_is_left_alone(
        self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        """Another process ends while this one, without --overwrite, gets to its lock."""
        (tmp_path / "in.txt").write_text(TEXTS[0])

        def late(path: Path):
            (tmp_path / "set.bin").write_text("theirs")
            return locked(path)

        monkeypatch.setattr(data_files, "locked", late)
        arguments = ("--output-prefix", tmp_path / "set", "--tokenizer-model", model)
        assert run(tmp_path / "in.txt", *arguments) == 1
        assert "set.bin is there already" in capsys.readouterr().err
        assert (tmp_path / "set.bin").read_text() == "theirs"

    def test_only_one_of_many_gets_it(self, tmp_path: Path) -> None:
        """While others come, go and take over."""
        children = [os.fork() for _ in range(2)]
        got, until = 0, time.monotonic() + 1
        while time.monotonic() < until:
            with suppress(CommandError), locked(tmp_path / "file"):
                (tmp_path / "mark").touch(exist_ok=False)  # fails if another one is in here
                (tmp_path / "mark").unlink()
                got += 1
        if 0 in children:
            os._exit(0 if got else 1)
        assert got
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]

    @pytest.mark.parametrize(
        ("holder", "works", "free"),
        [
            ("", True, True),
            ("{dead} {here}", True, True),
            ("1 {here}", True, True),  # its number was given away again
            ("1 elsewhere", True, False),
            ("1 elsewhere {boot}", True, True),  # of a container on this machine
            ("1 elsewhere {boot}", False, False),
            ("1 elsewhere another", True, False),
            ("{dead} {here}", False, True),  # a file system without locks
            ("1 {here}", False, False),
            ("nonsense", False, True),
        ],
    )
    def test_whose_lock_is_taken_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: str, works: bool, free: bool
    ) -> None:
        ended = subprocess.Popen(["true"])
        ended.wait()
        names = {"dead": ended.pid, "here": socket.gethostname(), "boot": data_files._boot()}
        assert names["boot"]
        (tmp_path / ".file.lock").write_text(holder.format(**names))
        if not works:
            monkeypatch.setattr(data_files, "_try", lambda file: None)
        if free:
            with locked(tmp_path / "file"):
                said = (tmp_path / ".file.lock").read_text()
                assert said == f"{os.getpid()} {socket.gethostname()} {data_files._boot()}\n"
            assert not (tmp_path / ".file.lock").exists()
        else:
            with pytest.raises(CommandError, match="is being written by process 1 on"):
                locked(tmp_path / "file").__enter__()
            assert (tmp_path / ".file.lock").exists()

    def test_input_is_not_replaced(self, tmp_path: Path, model: Path, capsys) -> None:
        for name in ("set.bin", "other"):
            (tmp_path / name).write_text(TEXTS[0])
        arguments = ("--output-prefix", tmp_path / "set", "--tokenizer-model", model)
        assert run(tmp_path / "set.bin", *arguments, "--overwrite") == 1
        assert "set.bin is among the input and would be replaced" in capsys.readouterr().err
        assert (tmp_path / "set.bin").read_text() == TEXTS[0]


def hold(path: Path) -> int:
    """Starts a process that holds the lock of a file, and gives its number."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with locked(path):
            os.write(writing, b".")
            time.sleep(100)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    return child
