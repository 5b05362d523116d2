"""Several processes: the same bytes, and one that dies."""

import os
import signal
from pathlib import Path

import pytest

from megatron_came.data import encoding
from tests.support.datasets import AWKWARD, SOURCES, TEXTS, fails, files, run, write_json


class TestWorkers:
    def test_their_number_changes_nothing(
        self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(encoding, "_BATCH_BYTES", 3000)
        corpus = write_json(tmp_path / "c.jsonl", TEXTS + AWKWARD)
        made = []
        for workers in (1, 2, 5):
            out = tmp_path / str(workers) / "out"
            arguments = ("--tokenizer-model", model, "--append-eod", "--validation", 0.3)
            assert run(corpus, "--output-prefix", out, "--workers", workers, *arguments) == 0
            made.append(files(out.parent))
        assert len(made[0]) == 4
        assert made[0] == made[1] == made[2]

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
