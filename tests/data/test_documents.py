"""What is a document, in files of every format, and what is none."""

import bz2
import gzip
import lzma
import os
from pathlib import Path

import pytest
import sentencepiece

from megatron_came.data.corpus import Corpus
from megatron_came.data.encoding import is_for_validation
from megatron_came.data.tokenizer import SentencePiece
from megatron_came.terminal.sentences import CommandError
from tests.support.datasets import documents, fails, files, run, texts_and_lines, write_json

PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


class TestDocuments:
    """What is one document; the tokens are those of the text, whatever the file."""

    @pytest.fixture
    def texts(self, tmp_path: Path, model: Path):
        """Runs the command and gives the texts in the dataset."""
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))

        def run_and_read(*arguments: object) -> list[str]:
            out = tmp_path / "out" / "set"
            assert run(*arguments, "--output-prefix", out, "--tokenizer-model", model) == 0
            return [processor.decode(tokens) for tokens in documents(out)]

        return run_and_read

    def test_a_folder_of_everything(self, tmp_path: Path, texts) -> None:
        (tmp_path / "in" / "b").mkdir(parents=True)
        (tmp_path / "in" / "a.txt").write_text("plain\n")
        (tmp_path / "in" / "b" / "c.txt.gz").write_bytes(gzip.compress(b"packed\n"))
        write_json(tmp_path / "in" / "d.jsonl", ["one", "two"])
        lines = write_json(tmp_path / "lines", ["three", "four"]).read_bytes()
        (tmp_path / "in" / "e.jsonl.gz").write_bytes(gzip.compress(lines))
        assert texts(tmp_path / "in") == ["plain\n", "one", "two", "three", "four", "packed\n"]

    @pytest.mark.parametrize(("suffix", "pack"), PACKED.items())
    def test_damage_in_a_later_stream_is_not_the_end(self, tmp_path, suffix, pack) -> None:
        """Compressors on several threads write many; dumps are put together of them."""
        packed = pack(b'{"text": "one"}\n{"text": "two"}\n')
        file = tmp_path / f"in.jsonl{suffix}"
        for padding in (b"", b"\0" * 8, b"\0" * 70_000):
            file.write_bytes(packed + padding + packed + padding)
            assert list(Corpus.from_paths([file])) == ["one", "two"] * 2
        file.write_bytes(packed + b"else")
        with pytest.raises(CommandError, match=r"is no whole \w+ file: compress it again"):
            list(Corpus.from_paths([file]))
        for place in range(len(packed)):
            damaged = bytearray(packed + packed)
            damaged[place + len(packed)] ^= 8
            for content in (damaged, (packed + packed)[: -1 - place]):
                file.write_bytes(content)
                try:
                    found = list(Corpus.from_paths([file]))
                except CommandError:
                    continue
                # A gzip file's time, or nothing at all of the second one.
                assert found == ["one", "two"] * (1 if len(content) == len(packed) else 2)

    @pytest.mark.parametrize("size", [1, 7, 1 << 24])
    def test_a_separator(
        self, tmp_path: Path, texts, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("megatron_came.data.records._READ_BYTES", size)
        (tmp_path / "in.txt").write_text("one\ntwo\n\nthree\n\n\n\n größer \n\n")
        expected = ["one\ntwo", "three", " größer "]
        assert texts(tmp_path / "in.txt", "--separator", r"\n\n") == expected

    def test_a_separator_that_is_nowhere(
        self, tmp_path: Path, texts, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in.txt").write_text("one\r\n\r\ntwo")
        assert len(texts(tmp_path / "in.txt", "--separator", r"\n\n")) == 1
        assert r"'\n\n' is nowhere in the text" in capsys.readouterr().err

    def test_another_key(self, tmp_path: Path, texts) -> None:
        (tmp_path / "in.jsonl").write_text('{"text": "no", "body": "yes"}\n')
        assert texts(tmp_path / "in.jsonl", "--json-key", "body") == ["yes"]

    def test_json_that_is_not_json_lines(
        self, tmp_path: Path, texts, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "in"
        folder.mkdir()
        write_json(folder / "a.json", ["one", "two"])
        (folder / "b.json").write_text('{\n "text": "three"\n}\n')
        assert texts(folder) == ["one", "two"]
        assert f"Left out {folder}/b.json, which has no JSON object with" in capsys.readouterr().err
        assert len(texts(folder / "b.json", "--format", "text", "--overwrite")) == 1

    @pytest.mark.parametrize(
        ("form", "expected"), [("jsonl", ["one"]), ("text", ['{"text": "one", "id": 0}\n'])]
    )
    def test_the_format_is_said(
        self, tmp_path: Path, texts, form: str, expected: list[str]
    ) -> None:
        name = {"jsonl": "a.txt", "text": "a.jsonl"}[form]
        write_json(tmp_path / name, ["one"])
        assert texts(tmp_path / name, "--format", form) == expected

    def test_a_pipe(self, tmp_path: Path, texts, model: Path) -> None:
        reading, writing = os.pipe()
        os.write(writing, b"through a pipe")
        os.close(writing)
        assert texts(f"/dev/fd/{reading}") == ["through a pipe"]
        os.close(reading)


class TestSplit:
    def test_each_document_is_on_one_side(self, tmp_path: Path, model: Path) -> None:
        texts = [f"document {index % 40}" for index in range(80)]  # each twice
        corpus = write_json(tmp_path / "c.jsonl", texts)
        tokenizer = SentencePiece(model).load()
        arguments = ("--tokenizer-model", model, "--validation", 0.25)
        assert run(corpus, "--output-prefix", tmp_path / "out", *arguments) == 0
        train, valid = documents(tmp_path / "out_train"), documents(tmp_path / "out_valid")
        encoded = [tokenizer.tokenize(text) for text in texts]
        assert [tokens for tokens in encoded if tokens in train] == train
        assert [tokens for tokens in encoded if tokens not in train] == valid
        assert valid
        # The same in another order.
        write_json(tmp_path / "r.jsonl", texts[::-1])
        assert run(tmp_path / "r.jsonl", "--output-prefix", tmp_path / "again", *arguments) == 0
        assert documents(tmp_path / "again_valid") == valid[::-1]

    def test_the_share_is_what_was_asked_for(self) -> None:
        drawn = sum(is_for_validation(str(index), 0.1) for index in range(10_000))
        assert abs(drawn - 1000) < 120  # four standard deviations

    def test_a_side_without_documents(
        self, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in.txt").write_text("one document")
        out = tmp_path / "out" / "set"
        error = fails(
            capsys,
            *(tmp_path / "in.txt", "--output-prefix", out, "--tokenizer-model", model),
            *("--validation", 0.01),
        )
        assert error.startswith("Of 1 document, a share of 0.01 for validation leaves none for")
        assert files(tmp_path / "out") == {}


class TestFaultyInput:
    @pytest.fixture
    def refused(self, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]):
        def run_and_read(*arguments: object) -> str:
            out = tmp_path / "out" / "set"
            error = fails(capsys, *arguments, "--output-prefix", out, "--tokenizer-model", model)
            assert not (tmp_path / "out").exists() or files(tmp_path / "out") == {}
            return error

        return run_and_read

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("a.txt", "größer".encode("latin-1"), "is not UTF-8 text"),
            ("a.txt", b"\x89PNG\0\0", "is not text"),
            (
                "a.txt",
                gzip.compress(b"text", mtime=0),
                "is a gzip file: name it so, with a suffix of .gz",
            ),
            (
                "a.jsonl",
                gzip.compress(b'{"text": "a"}\n', mtime=0),
                "line 1, is a gzip file: name it so",
            ),
            ("a", bz2.compress(b"text"), "is a bzip2 file: name it so, with a suffix of .bz2, or"),
            ("a.xzip", lzma.compress(b"text"), "is an xz file: name it so, with a suffix of .xz,"),
            ("a.txt", b"\x28\xb5\x2f\xfd\0X\1\0", "is a Zstandard file: unpack it first"),
            ("a.txt", "text".encode("utf-16"), "is UTF-16 or UTF-32 text: convert it to UTF-8"),
            (
                "a.jsonl",
                '{"text": "a"}'.encode("utf-16"),
                "is UTF-16 or UTF-32 text: convert it to UTF-8",
            ),
            ("a.txt", b"", "is empty"),
            ("a.jsonl", b"\n\n", "is empty"),
            ("a.json", b'[{"text": "a"}]', "in its first line: give the right --json-key, or"),
            ("a.jsonl", b'{"text": "a"}\n\xff\n', "line 2, is not UTF-8 text"),
            ("a.jsonl", b'{"text": null}\n', 'line 1, has no JSON object with a text under "text"'),
            ("a.jsonl", b'{"text": "\\ud83d"}\n', "line 1, has no JSON object with a text"),
            ("a.txt.gz", b"not gzip", "is no whole gzip file"),
            ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-9], "is no whole gzip file"),
        ],
    )
    def test_a_file_is_named(
        self, tmp_path: Path, refused, name: str, content: bytes, reason: str
    ) -> None:
        (tmp_path / name).write_bytes(content)
        error = refused(tmp_path / name)
        assert error.startswith(f"{tmp_path / name}")
        assert reason in error

    def test_faulty_lines_are_left_out_if_asked(
        self, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\xff\n{}\n{"text": "b"}\n{}\n')
        arguments = ("--output-prefix", tmp_path / "out", "--tokenizer-model", model)
        for workers in (1, 2):
            assert (
                run(
                    tmp_path / "a.jsonl",
                    *arguments,
                    "--skip-faulty",
                    "--overwrite",
                    "--workers",
                    workers,
                )
                == 0
            )
            assert len(documents(tmp_path / "out")) == 2
            error = capsys.readouterr().err
            assert f"Left out {tmp_path}/a.jsonl, line 2, which is not UTF-8 text." in error
            assert "Left out 2, each of which has no JSON object" in error
            assert f"the first: {tmp_path}/a.jsonl, line 3." in error

    def test_a_folder_without_text(self, tmp_path: Path, refused) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.bin").write_bytes(b"\0")
        assert refused(tmp_path / "in").startswith("There is no text in what was named")

    def test_nothing_but_empty_documents(self, tmp_path: Path, refused) -> None:
        assert "no text" in refused(write_json(tmp_path / "a.jsonl", ["", ""]))

    def test_no_such_input(self, tmp_path: Path, refused) -> None:
        assert "does not exist" in refused(tmp_path / "none")

    def test_empty_documents_are_counted(
        self, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        corpus = write_json(tmp_path / "a.jsonl", ["a", "", "b"])
        assert run(corpus, "--output-prefix", tmp_path / "out", "--tokenizer-model", model) == 0
        assert "3 documents (1 without text)" in capsys.readouterr().out


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
        with pytest.raises(CommandError, match=r"is no whole \w+ file|has no JSON object"):
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
        with pytest.raises(CommandError, match=": unpack it first"):
            list(Corpus.from_paths([tmp_path / name]))
