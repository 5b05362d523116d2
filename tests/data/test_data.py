"""From text to indexed datasets."""

import io
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers import MegatronTokenizer
from sentencepiece import SentencePieceProcessor

from megatron_came.data import tokenizer_training
from megatron_came.data.corpus import Corpus, write_json_lines
from megatron_came.data.errors import DataError
from megatron_came.data.files import whole_files
from megatron_came.data.indexed import DatasetWriter, dataset_files
from megatron_came.data.records import Document
from megatron_came.data.tokenizer import SentencePiece
from megatron_came.data.tokenizer_training import train_tokenizer
from megatron_came.terminal.progress import Progress

VOCABULARY = 300  # 256 bytes, four special tokens and 40 pieces


def words(count: int, seed: int = 0) -> str:
    generator = random.Random(seed)
    syllables = ["ca", "me", "ro", "ti", "lu", "no", "ki", "sa"]
    return " ".join(
        "".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(count)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer((words(200, seed) for seed in range(20)), path, vocab_size=VOCABULARY)
    return path


class TestCorpus:
    def test_folders_are_walked_and_what_is_no_text_is_counted(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "text.txt").write_text("zwei", encoding="utf-8-sig")
        (tmp_path / "a.txt").write_text("eins")
        (tmp_path / "blank.txt").write_text(" \n")
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "picture.bin").write_bytes(b"\x89PNG\0\0")
        (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
        (tmp_path / ".hidden").write_text("never")
        os.mkfifo(tmp_path / "pipe")
        corpus = Corpus.from_paths([tmp_path])
        assert [document.text for document in corpus] == ["eins", "zwei"]
        faults = {"is empty": 2, "is not text": 1, "is not UTF-8 text": 1, "is a pipe": 1}
        assert corpus.skipped.counts == faults

    def test_a_file_that_cannot_be_read_is_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        locked, fine = tmp_path / "locked.txt", tmp_path / "open.txt"
        locked.write_text("secret")
        fine.write_text("text")
        lock(locked, monkeypatch)
        corpus = Corpus.from_paths([tmp_path])
        assert [document.source for document in corpus] == [str(fine)]
        assert corpus.skipped.counts == {"cannot be read (permission denied)": 1}

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"", "is empty: "), (b"a\0b", "is not text: "), (b"\xff\xfe", "is not UTF-8 text: ")],
    )
    def test_a_file_named_by_itself_must_be_usable(
        self, tmp_path: Path, content: bytes, message: str
    ) -> None:
        file = tmp_path / "notes.txt"
        file.write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            list(Corpus.from_paths([file]))
        assert str(error.value).startswith(str(file))

    def test_a_locked_file_named_by_itself(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "notes.txt"
        file.write_text("secret")
        lock(file, monkeypatch)
        with pytest.raises(DataError, match=r"cannot be read \(permission denied\): "):
            list(Corpus.from_paths([file]))

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not exist"):
            Corpus.from_paths([tmp_path / "none"])

    def test_no_file_in_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no file"):
            Corpus.from_paths([tmp_path])

    def test_the_python_library_is_a_corpus_of_megabytes(self) -> None:
        corpus = Corpus.python_library()
        assert corpus.size > 4_000_000
        assert not any("site-packages" in path.parts for path in corpus.files)

    def test_json_lines_come_back_as_they_were(self, tmp_path: Path) -> None:
        documents = [Document("a", "one\ntwo\u2028three"), Document("b", "größer\r\n\t")]
        assert write_json_lines(documents, tmp_path / "corpus.jsonl") == 2
        assert list(Corpus.from_paths([tmp_path / "corpus.jsonl"])) == documents

    @pytest.mark.parametrize(
        "line", ["{", "[]", '{"body": 1}', "3", '{"text": 1}', '{"text": "\\ud800"}']
    )
    def test_a_line_without_text_is_named(self, tmp_path: Path, line: str) -> None:
        file = tmp_path / "corpus.jsonl"
        file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
        with pytest.raises(DataError, match='line 3, has no JSON object with a text under "text"'):
            list(Corpus.from_paths([file.parent]))

    def test_no_documents_make_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds text"):
            write_json_lines([], tmp_path / "corpus.jsonl")
        assert not list(tmp_path.iterdir())


def lock(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a file unreadable, for root too."""
    really = Path.open

    def open_unless_locked(self: Path, *args: str, **kwargs: str) -> object:
        if self == file:
            raise PermissionError(13, "Permission denied", str(self))
        return really(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_unless_locked)


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


class TestTokenizer:
    def test_every_text_comes_back_exactly(self, model: Path) -> None:
        tokenizer = SentencePiece(model).load()
        text = "  Tabs\tand\n\n    spaces  , größer, 漢字, came\r\n"
        decoder = SentencePieceProcessor(model_file=str(model))
        assert decoder.decode(tokenizer.tokenize(text)) == text

    def test_it_is_megatrons(self, model: Path) -> None:
        tokenizer = SentencePiece(model).load()
        megatrons = MegatronTokenizer.from_pretrained(
            tokenizer_path=str(model), metadata_path={"library": "sentencepiece"}
        )
        text = "came  rotilu\n  noki"
        assert megatrons.tokenize(text) == tokenizer.tokenize(text)
        assert megatrons.eod == tokenizer.eod
        assert megatrons.vocab_size == tokenizer.vocab_size == VOCABULARY

    def test_a_sample_is_the_same_each_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer_training, "_SAMPLED_LINES", 10)
        models = tmp_path / "one", tmp_path / "two"
        for model in models:
            train_tokenizer((words(200, seed) for seed in range(99)), model, vocab_size=VOCABULARY)
        assert models[0].read_bytes() == models[1].read_bytes()

    def test_too_little_text(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"too uniform for 4096 tokens: .* at most \d+\.$"):
            train_tokenizer([words(300)], tmp_path / "model", vocab_size=4096)
        with pytest.raises(DataError, match="There is no text to train a tokenizer on: "):
            train_tokenizer([], tmp_path / "model", vocab_size=4096)
        assert not list(tmp_path.iterdir())

    def test_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "model").write_text("no model")
        with pytest.raises(DataError, match="not a SentencePiece model"):
            SentencePiece(tmp_path / "model").load()


class TestIndexedDataset:
    @pytest.mark.parametrize(
        ("vocabulary", "dtype"), [(VOCABULARY, np.uint16), (100_000, np.int32)]
    )
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


class TestProgress:
    def test_plain_lines_where_there_is_no_terminal(self) -> None:
        stream = io.StringIO()
        with Progress("Reading", 100, stream) as progress:
            for step in range(100):
                progress.advance(1, f" ({step + 1})")
        assert stream.getvalue().splitlines() == [
            "Reading:  25% (25)",
            "Reading:  50% (50)",
            "Reading:  75% (75)",
            "Reading: 100% (100)",
        ]

    @pytest.mark.parametrize("columns", [60, 80, 120])
    def test_one_line_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("NO_COLOR", "1")
        with Progress("Reading", 4, stream) as progress:
            progress.advance(3, ", 2 MB/s")
        drawn = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", stream.getvalue())
        assert drawn.count("\n") == 1
        last = drawn.replace("\n", "").split("\r")[-1]
        assert re.fullmatch(r"Reading +\S+ +75%, 2 MB/s", last.strip())
        assert columns - 2 <= len(last) <= columns  # all of them are used

    def test_long_work_says_how_long_the_rest_takes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [100.0]
        monkeypatch.setattr("megatron_came.terminal.progress.time.monotonic", lambda: now[0])
        stream = io.StringIO()
        with Progress("Reading", 4, stream) as progress:
            for seconds in (1, 60, 60, 60):
                now[0] += seconds
                progress.advance(1)
        assert stream.getvalue().splitlines() == [
            "Reading:  25%",
            "Reading:  50%, 1 min 1 s left",
            "Reading:  75%, 40 s left",
            "Reading: 100%",
        ]

    def test_nothing_to_do_is_done(self) -> None:
        stream = io.StringIO()
        with Progress("Reading", 0, stream) as progress:
            progress.advance(0)
        assert stream.getvalue() == "Reading: 100%\n"
