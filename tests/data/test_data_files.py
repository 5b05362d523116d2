"""``megatron-came data`` on folders, links, pipes, other's files, and two at once."""

import bz2
import gzip
import json
import lzma
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_came.data import command, files, locks
from megatron_came.data.corpus import Corpus
from megatron_came.data.errors import DataError
from megatron_came.data.files import LateInterrupt, whole_files
from megatron_came.data.locks import locked
from megatron_came.data.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))]
NOBODY = 65534


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    train_tokenizer(TEXTS, path, vocab_size=400)
    return path


def run(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


def texts_and_lines(folder: Path, **options: bool) -> tuple[list[str], list[str]]:
    corpus = Corpus.from_paths([folder], **options)
    return [document.text for document in corpus], corpus.skipped.lines()


class TestFolders:
    def test_links_are_followed_and_each_folder_is_read_once(self, tmp_path: Path) -> None:
        corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
        (corpus / "z").mkdir(parents=True)
        (elsewhere / "deeper").mkdir(parents=True)
        (corpus / "a.txt").write_text("a")
        (corpus / "z" / "z.txt").write_text("z")
        (elsewhere / "e.txt").write_text("e")
        (elsewhere / "deeper" / "d.txt").write_text("d")
        (corpus / "b").symlink_to(elsewhere)
        (corpus / "c").symlink_to(elsewhere)  # the same once more
        (elsewhere / "up").symlink_to(corpus)  # in a circle
        (corpus / "z" / "self").symlink_to(".")
        (corpus / "linked.txt").symlink_to(elsewhere / "e.txt")
        (corpus / "lost").symlink_to(tmp_path / "nothing")
        (corpus / "knot").symlink_to("knot")
        texts, lines = texts_and_lines(corpus)
        assert texts == ["a", "e", "e", "d", "z"]
        assert "3, each of which is a folder read under another name" in " ".join(lines)
        assert f"Left out {corpus}/lost, which is a link to nothing." in lines
        assert any(f"{corpus}/knot, which cannot be read (too many levels" in x for x in lines)
        # Named twice, it is read twice: that is how one gives a text more weight.
        assert len(list(Corpus.from_paths([corpus, corpus]))) == 2 * len(texts)

    def test_what_is_no_file_is_counted_and_waits_for_nobody(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a")
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "device").symlink_to("/dev/zero")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "socket"))
            texts, lines = texts_and_lines(tmp_path)
        assert texts == ["a"]
        assert sorted(line.rpartition("/")[2] for line in lines) == [
            "device, which is a device.",
            "pipe, which is a pipe.",
            "socket, which is a socket.",
        ]
        for name in ("device", "socket"):
            with pytest.raises(DataError, match=f"{name} is a {name}: name a text file"):
                Corpus.from_paths([tmp_path / name])

    def test_a_folder_with_nothing_to_read_says_why(self, tmp_path: Path) -> None:
        (tmp_path / "lost").symlink_to(tmp_path / "nothing")
        with pytest.raises(DataError, match=r"no file in what was named: .* is a link to nothing"):
            Corpus.from_paths([tmp_path])

    def test_permissions(self, tmp_path: Path, model: Path) -> None:
        """Of somebody who is not root, in a process of its own."""
        corpus = tmp_path / "corpus"
        for name in ("open", "closed", "listed"):
            (corpus / name).mkdir(parents=True)
            (corpus / name / "text.txt").write_text(name)
        (corpus / "secret.txt").write_text("secret")
        (tmp_path / "link").symlink_to(corpus / "closed")
        (corpus / "linked").symlink_to(corpus / "closed")
        (corpus / "secret.txt").chmod(0)
        (corpus / "closed").chmod(0)  # can be neither listed nor entered
        (corpus / "listed").chmod(0o444)  # can be listed
        for path in (tmp_path, *tmp_path.parents):
            if path.stat().st_uid == os.getuid() and path != Path("/tmp"):
                path.chmod(path.stat().st_mode | 0o755)
        code = f"""
import os, pathlib
if os.getuid() == 0:
    import encodings.utf_8_sig, megatron_came.data.corpus
    os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
from megatron_came.data.corpus import Corpus
from megatron_came.data.errors import DataError
corpus = Corpus.from_paths([pathlib.Path({str(corpus)!r})])
print([document.text for document in corpus], corpus.size, *corpus.skipped.lines(), sep="\\n")
for name in ("corpus/closed", "corpus/closed/text.txt", "link", "corpus/secret.txt"):
    try:
        list(Corpus.from_paths([pathlib.Path({str(tmp_path)!r}) / name]))
    except DataError as error:
        print(str(error).replace({str(tmp_path)!r}, ""))
"""
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
            )
        finally:
            (corpus / "closed").chmod(0o755)
            (corpus / "listed").chmod(0o755)
        assert done.returncode == 0, done.stderr
        texts, _, *lines = done.stdout.splitlines()
        assert texts == "['open']"
        said = lines[0]
        assert said.startswith("Left out 4, each of which cannot be read (permission denied); ")
        assert [line.split(":")[0] for line in lines[1:]] == [
            f"/{name} cannot be read (permission denied)"
            for name in ("corpus/closed", "corpus/closed/text.txt", "link", "corpus/secret.txt")
        ]


class TestNames:
    @pytest.mark.parametrize(
        ("name", "pack"),
        [
            ("a.JSONL.GZ", gzip.compress),
            ("a.Jsonl.gz", gzip.compress),
            ("a.jsonl.bz2", bz2.compress),
            ("a.NDJSON.XZ", lzma.compress),
            ("a.JSON", bytes),
            ("a.Json.Bz2", bz2.compress),
        ],
    )
    def test_json_lines_whatever_the_capitals(self, tmp_path: Path, name: str, pack) -> None:
        (tmp_path / name).write_bytes(pack(b'{"text": "one"}\n{"text": "two"}\n'))
        assert texts_and_lines(tmp_path) == (["one", "two"], [])
        (tmp_path / name).write_bytes(pack(b'{"text": "one"}\n{"text": "two"}\n')[:-9] + b"x")
        with pytest.raises(DataError, match=r"is no whole \w+ file|has no JSON object"):
            list(Corpus.from_paths([tmp_path / name]))

    @pytest.mark.parametrize("name", ["a.Txt", "a.TXT.XZ", "A", "a.txt.GZ"])
    def test_texts(self, tmp_path: Path, name: str) -> None:
        pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix.lower(), bytes)
        (tmp_path / name).write_bytes(pack(b"one\ntwo\n"))
        assert texts_and_lines(tmp_path) == (["one\ntwo\n"], [])

    @pytest.mark.parametrize("name", ["a.jsonl.zst", "a.ZIP", "a.tar.gz", "a.txt.lz4", "a.tgz"])
    def test_what_is_packed_otherwise_is_said(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "b.txt").write_text("b")
        (tmp_path / name).write_bytes(b"packed")
        texts, (line,) = texts_and_lines(tmp_path)
        assert texts == ["b"]
        assert (
            line == f"Left out {tmp_path / name}, which is packed in a way that is not read here."
        )
        with pytest.raises(DataError, match=": unpack it first"):
            list(Corpus.from_paths([tmp_path / name]))


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

        monkeypatch.setattr(files, "locked", late)
        arguments = ("--output-prefix", tmp_path / "set", "--tokenizer-model", model)
        assert run(tmp_path / "in.txt", *arguments) == 1
        assert "set.bin is there already" in capsys.readouterr().err
        assert (tmp_path / "set.bin").read_text() == "theirs"

    def test_only_one_of_many_gets_it(self, tmp_path: Path) -> None:
        """While others come, go and take over."""
        children = [os.fork() for _ in range(2)]
        got, until = 0, time.monotonic() + 1
        while time.monotonic() < until:
            with suppress(DataError), locked(tmp_path / "file"):
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
        names = {"dead": ended.pid, "here": socket.gethostname()}
        (tmp_path / ".file.lock").write_text(holder.format(**names))
        if not works:
            monkeypatch.setattr(locks, "_try", lambda file: None)
        if free:
            with locked(tmp_path / "file"):
                said = (tmp_path / ".file.lock").read_text()
                assert said == f"{os.getpid()} {socket.gethostname()}\n"
            assert not (tmp_path / ".file.lock").exists()
        else:
            with pytest.raises(DataError, match="is being written by process 1 on"):
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

        def interrupted(*paths: Path) -> None:
            os.kill(os.getpid(), signum)
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
            signal.signal(signum, before)
            ended.set()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]

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
        assert process.returncode == 130
        assert list((tmp_path / "out").iterdir()) == []
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() - started < 60
            time.sleep(0.1)
