"""Several processes: the same bytes, and one that dies."""

import os
import signal
import struct
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_came.data import encoding, workers
from megatron_came.terminal.children import ENDS
from megatron_came.terminal.sentences import CommandError
from tests.support.datasets import AWKWARD, SOURCES, TEXTS, fails, files, run, write_json
from tests.support.running import run_python


class TestWorkers:
    def test_their_number_changes_nothing(
        self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(encoding, "_BATCH_BYTES", 3000)
        corpus = write_json(tmp_path / "c.jsonl", TEXTS + AWKWARD)
        made = []
        for number in (1, 2, 5):
            out = tmp_path / str(number) / "out"
            arguments = ("--tokenizer-model", model, "--append-eod", "--validation", 0.3)
            assert run(corpus, "--output-prefix", out, "--workers", number, *arguments) == 0
            made.append(files(out.parent))
        assert len(made[0]) == 4
        assert made[0] == made[1] == made[2]

    def test_more_than_there_is_room_for_are_not_started(
        self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        started = []
        start = workers._start
        monkeypatch.setattr(
            workers, "_start", lambda f, n, *rest: [started.append(n), start(f, 1, *rest)][1]
        )
        corpus = write_json(tmp_path / "c.jsonl", TEXTS)
        out = tmp_path / "out" / "set"
        arguments = ("--output-prefix", out, "--tokenizer-model", model, "--workers", 4096)
        assert run(corpus, *arguments) == 0
        (number,) = started
        assert number == 8 * len(os.sched_getaffinity(0))
        assert f"--workers 4096: {number} are started" in capsys.readouterr().err

    def test_an_error_comes_through(
        self, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_json(tmp_path / "c.jsonl", TEXTS)
        with (tmp_path / "c.jsonl").open("a") as file:
            file.write("{\n")
        out = tmp_path / "out" / "set"
        arguments = ("--output-prefix", out, "--tokenizer-model", model, "--workers", 2)
        error = fails(capsys, tmp_path / "c.jsonl", *arguments)
        assert f"{tmp_path}/c.jsonl, line {len(TEXTS) + 1}, has no JSON object with a text" in error
        assert files(tmp_path / "out") == {}

    def test_one_that_is_killed(
        self,
        tmp_path: Path,
        model: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        parent = os.getpid()
        encode = encoding.Encoder.encode

        def die(self: encoding.Encoder, batch: object) -> encoding.Encoded:
            if os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(self, batch)

        monkeypatch.setattr(encoding.Encoder, "encode", die)
        out = tmp_path / "out" / "set"
        arguments = ("--output-prefix", out, "--tokenizer-model", model, "--workers", 2)
        assert fails(capsys, *SOURCES, *arguments).startswith("A worker was killed, most likely")
        assert files(tmp_path / "out") == {}

    def test_one_that_is_killed_while_it_sends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        parent, send = os.getpid(), workers._send

        def send_some(connection: Connection, thing: object) -> None:
            if os.getpid() != parent:
                os.write(connection.fileno(), struct.pack("!i", 1000) + b"not a thousand")
                os.kill(os.getpid(), signal.SIGKILL)
            send(connection, thing)

        monkeypatch.setattr(workers, "_send", send_some)
        with pytest.raises(CommandError, match="most likely because memory ran out: buy more"):
            list(workers.ordered_map(abs, range(9), workers=2, remedy="buy more"))

    def test_one_that_starts_afresh_takes_no_signal(self) -> None:
        mask = "partial(signal.pthread_sigmask, signal.SIG_BLOCK)"
        result = run_python(
            "-c",
            "import signal; from functools import partial; from megatron_came.data import workers; "
            f"print(*workers.ordered_map({mask}, [[]], workers=1, afresh=True))",
        )
        for number in ENDS:
            assert number.name in result.stdout, result.stderr

    def test_no_more_is_read_than_they_can_use(self) -> None:
        read = 0

        def items() -> Iterator[int]:
            nonlocal read
            for read in range(1, 100):
                yield -read

        results = workers.ordered_map(abs, items(), workers=2)
        for yielded in range(1, 100):
            assert next(results) == yielded
            assert read <= yielded + 2 * 2
        assert next(results, None) is None
