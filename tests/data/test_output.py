"""The files that appear, all or none, whatever happens."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_came.data.files import LateInterrupt, locked, whole_files
from megatron_came.data.indexed import DatasetWriter, dataset_files
from megatron_came.terminal.interrupts import in_one_line
from tests.support.datasets import (
    ROOT,
    SOURCES,
    TEXTS,
    documents,
    fails,
    files,
    run,
)


class TestOutput:
    @pytest.fixture
    def arguments(self, tmp_path: Path, model: Path) -> list[object]:
        out = tmp_path / "out" / "set"
        return [*SOURCES, "--output-prefix", out, "--tokenizer-model", model]

    def test_what_is_there_is_left_alone(
        self, tmp_path: Path, arguments: list[object], capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "set.idx").write_text("precious")
        assert "set.idx is there already" in fails(capsys, *arguments)
        assert files(tmp_path / "out") == {"set.idx": b"precious"}
        assert run(*arguments, "--overwrite") == 0
        assert len(documents(tmp_path / "out" / "set")) == len(TEXTS)

    def test_megatrons_index_of_an_old_dataset_is_removed(
        self, tmp_path: Path, arguments: list[object]
    ) -> None:
        cache = tmp_path / "out" / "set" / "cache" / "GPTDataset_indices"
        cache.mkdir(parents=True)
        assert run(*arguments) == 0
        assert not cache.exists()

    def test_a_folder_that_takes_no_files(
        self, arguments: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "out").write_text("a file")
        assert "cannot be written (file exists)" in fails(capsys, *arguments)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_disk_that_gets_full(
        self,
        tmp_path: Path,
        arguments: list[object],
        capsys: pytest.CaptureFixture[str],
        workers: int,
    ) -> None:
        assert run(*arguments) == 0
        before = files(tmp_path / "out")
        size = len(before["set.bin"])
        capsys.readouterr()
        for limit in (size // 2, size - 1):
            with files_no_larger_than(limit):
                error = fails(capsys, *arguments, "--overwrite", "--workers", workers)
            assert "set.bin cannot be written (file too large): make room" in error
            assert files(tmp_path / "out") == before

    @pytest.mark.parametrize("method", ["add_document", "finalize"])
    def test_no_space(
        self,
        tmp_path: Path,
        arguments: list[object],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        method: str,
    ) -> None:
        def full(*args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(IndexedDatasetBuilder, method, full)
        assert "cannot be written (no space left on device)" in fails(capsys, *arguments)
        assert files(tmp_path / "out") == {}

    def test_an_interruption_leaves_what_was_there(
        self,
        tmp_path: Path,
        arguments: list[object],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        assert run(*arguments) == 0
        before = files(tmp_path / "out")
        capsys.readouterr()

        def interrupt(*args: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(IndexedDatasetBuilder, "finalize", interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"data: Interrupted: nothing was written\.$"):
            run(*arguments, "--overwrite")
        assert files(tmp_path / "out") == before

    @pytest.mark.parametrize("renamed", range(4))
    def test_interrupted_while_files_get_their_names(
        self,
        tmp_path: Path,
        arguments: list[object],
        monkeypatch: pytest.MonkeyPatch,
        renamed: int,
    ) -> None:
        assert run(*arguments, "--validation", 0.3) == 0
        replace, left = os.replace, renamed

        def replace_some(*paths: Path) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            replace(*paths)

        monkeypatch.setattr(os, "replace", replace_some)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments, "--validation", 0.4, "--overwrite")
        # No index, new or old, is there before both files of tokens are.
        order = ["set_train.bin", "set_valid.bin", "set_train.idx", "set_valid.idx"]
        assert set(files(tmp_path / "out")) == {"set_train.bin", *order[:renamed]}

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=str)
    def test_a_batch_system_that_ends_it(
        self,
        tmp_path: Path,
        arguments: list[object],
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        number: signal.Signals,
    ) -> None:
        def end(*args: object) -> None:
            os.kill(os.getpid(), number)

        monkeypatch.setattr(IndexedDatasetBuilder, "finalize", end)
        # In a process of its own: all children of an interrupted one end with it.
        if not (child := os.fork()):
            status = in_one_line(lambda: run(*arguments, "--workers", 2), "", grace=None)
            os._exit(status if signal.getsignal(number) == signal.SIG_DFL else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
        assert capfd.readouterr().err.endswith("Interrupted: nothing was written.\n")
        assert files(tmp_path / "out") == {}


class files_no_larger_than:  # noqa: N801
    """Makes every write fail beyond so many bytes of a file, as on a full disk."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *args: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


class TestWholeFiles:
    def test_an_interruption_leaves_what_was_there(self, tmp_path: Path) -> None:
        first, last = tmp_path / "first", tmp_path / "last"
        first.write_text("old")
        last.write_text("old")

        def write() -> None:
            with whole_files(first, last) as (partial, _):
                partial.write_text("new")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write()
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
            "first": "old",
            "last": "old",
        }

    def test_files_appear_together(self, tmp_path: Path) -> None:
        first, last = tmp_path / "new" / "first", tmp_path / "new" / "last"
        with whole_files(first, last) as (partial_first, partial_last):
            partial_first.write_text("1")
            partial_last.write_text("2")
            assert not first.exists()
        assert (first.read_text(), last.read_text()) == ("1", "2")


class TestKilled:
    """Files of a run that nobody could clean up after."""

    def test_the_next_one_takes_them_away(self, tmp_path: Path, model: Path) -> None:
        (tmp_path / "in.txt").write_text(TEXTS[0])
        out = tmp_path / "out"
        out.mkdir()
        killed = subprocess.Popen(["true"])
        killed.wait()
        for name in ("set.model", "set.bin", "set_train.idx", "other.bin"):
            (out / f"{name}.partial").touch()
            (out / f".{name}.lock").write_text(f"{killed.pid} {socket.gethostname()} \n")
        arguments = (tmp_path / "in.txt", "--output-prefix", out / "set")
        with locked(out / "set_valid.bin"):  # of one that is at work
            (out / "set_valid.bin.partial").touch()
            assert run(*arguments, "--tokenizer-model", model) == 0
            assert set(files(out)) == {
                *("set.bin", "set.idx", "other.bin.partial", ".other.bin.lock"),
                *("set_valid.bin.partial", ".set_valid.bin.lock"),
            }

    def test_a_tokenizer_has_one_partial_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Which the next run knows by its name."""
        (tmp_path / "in.txt").write_text("".join(TEXTS))
        seen: list[set[str]] = []
        write = Path.write_bytes

        def note(path: Path, content: bytes) -> int:
            written = write(path, content)
            seen.append(set(files(tmp_path / "out")))
            return written

        monkeypatch.setattr(Path, "write_bytes", note)
        arguments = ("--output-prefix", tmp_path / "out" / "set", "--train-tokenizer", "400")
        assert run(tmp_path / "in.txt", *arguments) == 0
        names = [f"set.{end}" for end in ("model", "bin", "idx")]
        known = {f"{name}.partial" for name in names} | {f".{name}.lock" for name in names}
        assert seen
        assert set.union(*seen) == known


class TestInterruptions:
    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_while_files_get_their_names(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
    ) -> None:
        """They all get them: half of them would be none."""
        before = signal.signal(signum, signal.default_int_handler)
        replace = os.replace
        ended = threading.Event()
        threading.Thread(target=ended.wait, daemon=True).start()  # the signal may reach it
        arrived, arrives = socket.socketpair()
        arrived.settimeout(60)
        arrives.setblocking(False)
        wakeup = signal.set_wakeup_fd(arrives.fileno())

        def interrupted(*paths: Path) -> None:
            os.kill(os.getpid(), signum)
            assert arrived.recv(1)  # else that thread might see it when the test has ended
            replace(*paths)

        monkeypatch.setattr(os, "replace", interrupted)

        def write() -> None:
            with whole_files(tmp_path / "a", tmp_path / "b") as partial:
                for path in partial:
                    path.write_text("new")

        try:
            with pytest.raises(LateInterrupt):
                write()
        finally:
            signal.set_wakeup_fd(wakeup)
            signal.signal(signum, before)
            ended.set()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]

    @pytest.mark.parametrize("late", ["unlink", "close"])
    def test_when_files_have_their_names(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str
    ) -> None:
        """Nobody is told that nothing was written."""
        path = tmp_path / "a"
        owner, really = (Path, Path.unlink) if late == "unlink" else (os, os.close)

        def interrupted(*args: object, **kwargs: object) -> None:
            really(*args, **kwargs)  # type: ignore[arg-type]
            if path.exists():
                raise KeyboardInterrupt

        def write() -> None:
            with whole_files(path) as (partial,):
                partial.write_text("new")
                monkeypatch.setattr(owner, late, interrupted)

        with pytest.raises(KeyboardInterrupt) as raised:
            write()
        monkeypatch.undo()
        assert raised.type is LateInterrupt
        assert path.read_text() == "new"

    @pytest.mark.alone
    @pytest.mark.parametrize(
        "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.matrix)]
    )
    def test_while_a_tokenizer_is_trained(self, tmp_path: Path, signum: signal.Signals) -> None:
        """SentencePiece, in C++, hears no signal for as long as it works: minutes, here."""
        (tmp_path / "in.txt").write_text(
            "".join(f"{i * i * 7919 % 1000003:x} " for i in range(900_000))
        )
        start = [sys.executable, "-c", "from megatron_came.tools import cli; exit(cli.main())"]
        out = tmp_path / "out" / "set"
        command = ["data", tmp_path / "in.txt", "--output-prefix", out, "--train-tokenizer", "8000"]
        process = subprocess.Popen(
            [*start, *map(str, command)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stderr is not None
        while "Training a tokenizer" not in (line := process.stderr.readline()):
            assert line
        time.sleep(1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        started = time.monotonic()
        os.killpg(process.pid, signum)  # as a terminal does
        said = process.stderr.readline()
        assert time.monotonic() - started < 2
        assert said == "megatron-came data: Interrupted: nothing was written.\n"
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 128 + signum
        assert list((tmp_path / "out").iterdir()) == []
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() - started < 60
            time.sleep(0.1)


class TestIndexedDataset:
    @pytest.mark.parametrize(("vocabulary", "dtype"), [(300, np.uint16), (100_000, np.int32)])
    def test_megatron_reads_the_tokens(
        self, tmp_path: Path, vocabulary: int, dtype: type[np.number]
    ) -> None:
        with whole_files(*dataset_files([tmp_path / "text"])) as (bin_path, idx_path):
            writer = DatasetWriter(bin_path, idx_path, vocab_size=vocabulary)
            for document in ([5, 6, 7, 2], [], [vocabulary - 1, 2]):
                writer.add(np.array(document, dtype=np.int32))
            writer.finish()
        dataset = IndexedDataset(str(tmp_path / "text"))
        assert [list(tokens) for tokens in dataset] == [[5, 6, 7, 2], [vocabulary - 1, 2]]
        assert dataset[0].dtype == dtype
        assert dataset.document_indices.tolist() == [0, 1, 1, 2]
        assert (writer.documents, writer.empty, writer.tokens) == (3, 1, 6)
