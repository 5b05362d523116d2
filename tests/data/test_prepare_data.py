"""``megatron-came data``: from files to datasets, by the command line."""

import errno
import gzip
import importlib.util
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_came.data import command, encoding
from megatron_came.data.encoding import is_for_validation
from megatron_came.data.tokenizer import GPT2_END, Gpt2Bpe, HuggingFace, SentencePiece
from megatron_came.data.tokenizer_training import train_tokenizer
from megatron_came.tools import cli, launch_flags

ROOT = Path(__file__).parents[2]
LIBRARY = Path(json.__file__).parent  # a dozen documents of Python
SOURCES = sorted([*LIBRARY.glob("*.py"), *(LIBRARY.parent / "email").glob("*.py")])
TEXTS = [path.read_text(encoding="utf-8") for path in SOURCES]
AWKWARD = [
    "",
    " ",
    "  two  spaces\t\n\n",
    "\r\n",
    "ünïcode 漢字 \u2028 \u0000 ﬁ e\u0301 ☯ ▁",
    f"a{GPT2_END}b </s> <s> <unk>",
    "x" * 20_000,
]

needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="the package tokenizers is missing"
)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the package transformers is missing"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    train_tokenizer(TEXTS, path, vocab_size=700)
    return path


@pytest.fixture(scope="module")
def usual_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with SentencePiece's own defaults: text normalised, white space run together."""
    prefix = tmp_path_factory.mktemp("usual") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in TEXTS for line in text.splitlines()),
        model_prefix=str(prefix),
        vocab_size=700,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Gpt2Bpe:
    """A small vocabulary of GPT-2's kind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.model.save(str(folder))
    files = Gpt2Bpe(folder / "vocab.json", folder / "merges.txt")
    vocabulary = json.loads(files.vocab_file.read_text())
    files.vocab_file.write_text(json.dumps({**vocabulary, GPT2_END: len(vocabulary)}))
    return files


@pytest.fixture(scope="module")
def hugging_face(gpt2: Gpt2Bpe, tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    """The same as a folder, with a token before each document, as Llama's tokenizer has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE.from_file(str(gpt2.vocab_file), str(gpt2.merge_file)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([GPT2_END, "<s>"])
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[start]
    )
    folder = tmp_path_factory.mktemp("hugging_face")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": GPT2_END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return HuggingFace(folder)


def flags(tokenizer: SentencePiece | Gpt2Bpe | HuggingFace) -> list[str]:
    return [word for flag in tokenizer.flags() for word in flag]


def write_json(path: Path, texts: list[str]) -> Path:
    """Writes JSON Lines, half of them with everything escaped."""
    lines = [
        json.dumps({"text": text, "id": index}, ensure_ascii=index % 2 == 0)
        for index, text in enumerate(texts)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs the command, which must fail with one sentence, and returns that."""
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("megatron-came data: ")
    assert last.endswith(".")
    assert "Traceback" not in captured.err
    return last.removeprefix("megatron-came data: ")


def documents(prefix: Path) -> list[list[int]]:
    """The tokens of each document, empty ones included."""
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices
    return [
        [int(token) for item in range(start, end) for token in dataset[item]]
        for start, end in pairwise(bounds)
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class TestTokens:
    def test_a_document_is_its_tokens_and_an_end(self, tmp_path: Path, model: Path) -> None:
        corpus = write_json(tmp_path / "c.jsonl", TEXTS + AWKWARD)
        assert run(corpus, "--output-prefix", tmp_path / "out", "--tokenizer-model", model) == 0
        tokenizer = SentencePiece(model).load()
        expected = [tokenizer.tokenize(text) for text in TEXTS + AWKWARD]
        assert documents(tmp_path / "out") == expected
        ended = ("--output-prefix", tmp_path / "end", "--tokenizer-model", model, "--append-eod")
        assert run(corpus, *ended) == 0
        expected = [[*tokens, tokenizer.eod] if tokens else [] for tokens in expected]
        assert documents(tmp_path / "end") == expected

    @needs_tokenizers
    def test_gpt2(self, tmp_path: Path, gpt2: Gpt2Bpe) -> None:
        corpus = write_json(tmp_path / "c.jsonl", TEXTS + AWKWARD)
        assert run(corpus, "--output-prefix", tmp_path / "out", "--append-eod", *flags(gpt2)) == 0
        vocabulary = json.loads(gpt2.vocab_file.read_text())
        names = {number: name for name, number in vocabulary.items()}
        spelled = byte_of_letter()
        for text, tokens in zip(TEXTS + AWKWARD, documents(tmp_path / "out"), strict=True):
            if text:
                assert tokens.pop() == vocabulary[GPT2_END]
            pieces = [names[token] for token in tokens]
            plain = [piece.encode() if piece == GPT2_END else piece for piece in pieces]
            whole = b"".join(
                piece if isinstance(piece, bytes) else bytes(spelled[letter] for letter in piece)
                for piece in plain
            )
            assert whole.decode() == text

    @needs_tokenizers
    def test_gpt2_merges_within_words(self, tmp_path: Path) -> None:
        letters = sorted(byte_of_letter())
        merges = ["h e", "l l", "he ll", "Ġ o", "o Ġ"]  # the last one would cross a word's end
        merged = [merge.replace(" ", "") for merge in merges]
        names = [*letters, *merged, GPT2_END]
        files = Gpt2Bpe(tmp_path / "vocab.json", tmp_path / "merges.txt")
        files.vocab_file.write_text(json.dumps({name: i for i, name in enumerate(names)}))
        files.merge_file.write_text("\n".join(["#version: 0.2", *merges]))
        tokens = files.load().tokenize("hello ohé's")
        assert [names[token] for token in tokens] == [*("hell", "o", "Ġo", "h", "Ã", "©", "'", "s")]

    @needs_transformers
    def test_hugging_face(self, tmp_path: Path, hugging_face: HuggingFace) -> None:
        corpus = write_json(tmp_path / "c.jsonl", ["one", ""])
        arguments = ("--output-prefix", tmp_path / "out", "--append-eod", *flags(hugging_face))
        assert run(corpus, *arguments) == 0
        tokenizer = hugging_face.load()
        one, nothing = documents(tmp_path / "out")
        assert one == [*tokenizer.tokenize("one"), tokenizer.eod]
        assert nothing == [one[0], tokenizer.eod]  # the token before each document is there

    def test_a_tokenizer_is_trained_on_the_input(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "new" / "out"
        assert run(*SOURCES, "--output-prefix", out, "--train-tokenizer", 600) == 0
        printed = capsys.readouterr().out
        assert f"--tokenizer-model {out}.model" in printed
        tokenizer = SentencePiece(Path(f"{out}.model")).load()
        assert tokenizer.vocab_size == 600
        assert documents(out) == [tokenizer.tokenize(text) for text in TEXTS]


def byte_of_letter() -> dict[str, int]:
    """GPT-2's letter for each byte: itself if it can be seen, else the next from U+0100."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): b for i, b in enumerate(unseen)}


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

    @pytest.mark.parametrize("size", [1, 7, 1 << 24])
    def test_a_separator(
        self, tmp_path: Path, texts, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("megatron_came.data.records._CHUNK", size)
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
        assert error.startswith("Of 1 documents, a share of 0.01 for validation leaves none for")
        assert files(tmp_path / "out") == {}


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

        def die(self: encoding.Encoder, batch: encoding.Batch) -> encoding.Encoded:
            if os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(self, batch)

        monkeypatch.setattr(encoding.Encoder, "encode", die)
        out = tmp_path / "out" / "set"
        arguments = ("--output-prefix", out, "--tokenizer-model", model, "--workers", 2)
        assert fails(capsys, *SOURCES, *arguments).startswith("A worker was killed, most likely")
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
            ("a.txt", b"", "is empty"),
            ("a.jsonl", b"\n\n", "is empty"),
            ("a.json", b'[{"text": "a"}]', "in its first line: give the right --json-key, or"),
            ("a.jsonl", b'{"text": "a"}\n\xff\n', "line 2, is not UTF-8 text"),
            ("a.jsonl", b'{"text": null}\n', 'line 1, has no JSON object with a text under "text"'),
            ("a.jsonl", b'{"text": "\\ud83d"}\n', "line 1, has no JSON object with a text"),
            ("a.txt.gz", b"not gzip", "is no whole gzip file"),
            ("a.txt.gz", gzip.compress(b"text" * 1000)[:-9], "is no whole gzip file"),
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


class TestFaultyTokenizer:
    def refused(self, capsys, tmp_path: Path, *arguments: object) -> str:
        (tmp_path / "in.txt").write_text("text")
        out = tmp_path / "out" / "set"
        error = fails(capsys, tmp_path / "in.txt", "--output-prefix", out, *arguments)
        assert not (tmp_path / "out").exists() or files(tmp_path / "out") == {}
        return error

    def test_none_or_two(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.refused(capsys, tmp_path).startswith("Name one tokenizer: ")
        both = ("--train-tokenizer", 300, "--tokenizer-model", "x")
        assert self.refused(capsys, tmp_path, *both).startswith("Name one tokenizer: ")

    def test_half_of_gpt2(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "give both" in self.refused(capsys, tmp_path, "--vocab-file", "vocab.json")

    def test_a_type_that_does_not_fit(
        self, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        named = ("--tokenizer-model", model, "--tokenizer-type", "HuggingFaceTokenizer")
        assert "GPTSentencePieceTokenizer" in self.refused(capsys, tmp_path, *named)

    def test_no_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        error = self.refused(capsys, tmp_path, "--tokenizer-model", tmp_path / "none")
        assert "does not exist" in error
        (tmp_path / "model").write_text("no model")
        error = self.refused(capsys, tmp_path, "--tokenizer-model", tmp_path / "model")
        assert "is not a SentencePiece model" in error

    def test_too_little_text_to_train_on(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "too small" in self.refused(capsys, tmp_path, "--train-tokenizer", 5000)

    def test_a_model_that_cannot_end_documents(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS[0].splitlines()),
            model_prefix=str(tmp_path / "endless"),
            vocab_size=100,
            eos_id=-1,
            minloglevel=2,
        )
        named = ("--tokenizer-model", tmp_path / "endless.model")
        error = self.refused(capsys, tmp_path, *named, "--append-eod")
        assert "has no end-of-document token" in error
        assert run(tmp_path / "in.txt", "--output-prefix", tmp_path / "fine", *named) == 0

    @needs_tokenizers
    @pytest.mark.parametrize(
        ("vocabulary", "merges", "reason"),
        [
            ("{", "#version: 0.2\n", "is not JSON"),
            ('{"a": 0}', "#version: 0.2\n", "has no token for 255 of the 256 bytes"),
            (None, "#version: 0.2\nno such\n", "cannot be used with"),
        ],
    )
    def test_gpt2s_files(
        self,
        tmp_path: Path,
        gpt2: Gpt2Bpe,
        capsys: pytest.CaptureFixture[str],
        vocabulary: str | None,
        merges: str,
        reason: str,
    ) -> None:
        files = Gpt2Bpe(tmp_path / "vocab.json", tmp_path / "merges.txt")
        files.vocab_file.write_text(vocabulary or gpt2.vocab_file.read_text())
        files.merge_file.write_text(merges)
        assert reason in self.refused(capsys, tmp_path, *flags(files))

    @pytest.mark.parametrize("package", ["tokenizers", "transformers"])
    def test_a_package_is_missing(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        package: str,
    ) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
        )
        named: list[object] = ["--tokenizer-model", tmp_path]
        if package == "tokenizers":
            named = ["--vocab-file", "vocab.json", "--merge-file", "merges.txt"]
        assert f"run pip install {package}." in self.refused(capsys, tmp_path, *named)

    @needs_transformers
    def test_a_folder_without_a_tokenizer(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "folder").mkdir()
        error = self.refused(capsys, tmp_path, "--tokenizer-model", tmp_path / "folder")
        assert "holds no tokenizer that transformers can load" in error


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
        assert run(*arguments, "--overwrite") == 130
        assert capsys.readouterr().err.endswith("Interrupted: nothing was written.\n")
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
        assert run(*arguments, "--validation", 0.4, "--overwrite") == 130
        # No index, new or old, is there before both files of tokens are.
        order = ["set_train.bin", "set_valid.bin", "set_train.idx", "set_valid.idx"]
        assert set(files(tmp_path / "out")) == {"set_train.bin", *order[:renamed]}

    def test_a_batch_system_that_ends_it(
        self,
        tmp_path: Path,
        arguments: list[object],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def end(*args: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(IndexedDatasetBuilder, "finalize", end)
        assert run(*arguments, "--workers", 2) == 130
        assert capsys.readouterr().err.endswith("Interrupted: nothing was written.\n")
        assert files(tmp_path / "out") == {}
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class files_no_larger_than:  # noqa: N801
    """Makes every write fail beyond so many bytes of a file, as on a full disk."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *args: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


class TestAdvice:
    def test_what_to_tell_megatron(
        self, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "a folder" / "set"
        arguments = [*SOURCES, "--output-prefix", out, "--tokenizer-model", model]
        assert run(*arguments) == 0
        assert flags_in(capsys.readouterr().out) == [
            *("--data-path", str(out), "--split", "100,0,0", "--eval-iters", "0"),
            *("--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", str(model)),
        ]
        assert run(*arguments, "--validation", 0.3) == 0
        assert flags_in(capsys.readouterr().out)[:4] == [
            *("--train-data-path", f"{out}_train", "--valid-data-path", f"{out}_valid"),
        ]

    @needs_tokenizers
    def test_gpt2_without_the_hub(
        self, tmp_path: Path, gpt2: Gpt2Bpe, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(*SOURCES, "--output-prefix", tmp_path / "out", *flags(gpt2)) == 0
        words = flags_in(capsys.readouterr().out)
        assert words[6:12] == ["--tokenizer-type", "GPT2BPETokenizer", *flags(gpt2)]
        size = gpt2.load().vocab_size
        assert words[12:] == ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size)]

    @pytest.mark.parametrize(
        ("vocabulary", "expected"),
        [
            (50257, "to 50304 rows; with tensor parallelism, 50432 at size 2, 50688 at size 4"),
            (32768, "to 32768 rows."),
        ],
    )
    def test_padding(self, vocabulary: int, expected: str) -> None:
        assert expected in launch_flags._padding(vocabulary)


def flags_in(printed: str) -> list[str]:
    """The words of the blocks that one is to copy."""
    blocks = re.findall(r"(?:^    .*\n)+", printed, re.MULTILINE)
    return [word for block in blocks for word in shlex.split(block) if word != "\n"]


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--workers", "0"], "'0' is no number of processes: give 1 or more"),
            (["--validation", "1%"], "'1%' is no share: give one between 0 and 1"),
            (["--validation", "1"], "'1' is no share"),
            (["--separator", ""], "'' is no separator"),
            (["--train-tokenizer", "big"], "'big' is no number of tokens"),
            (["--output-prefix", "out/"], "'out/' has no file name"),
        ],
    )
    def test_a_wrong_value(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        with pytest.raises(SystemExit):
            run("in.txt", "--output-prefix", "out", *arguments)
        assert message in capsys.readouterr().err

    def test_the_command_knows_it(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["megatron-came", "data", "--help"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        assert "--append-eod" in capsys.readouterr().out


@pytest.fixture(scope="module")
def megatron() -> Path:
    checkout = os.environ.get("MEGATRON_LM")
    if not checkout:
        pytest.skip("MEGATRON_LM does not name a checkout of Megatron-LM, core_v0.19.0")
    return Path(checkout).absolute()


class TestMegatronsScript:
    """By hand: MEGATRON_LM=path/to/Megatron-LM python -m pytest tests/data/test_prepare_data.py."""

    @pytest.mark.parametrize("kind", ["model", "usual_model", "gpt2", "hugging_face"])
    @pytest.mark.parametrize("append_eod", [True, False])
    def test_the_same_bytes(
        self,
        tmp_path: Path,
        megatron: Path,
        request: pytest.FixtureRequest,
        kind: str,
        append_eod: bool,
    ) -> None:
        if not kind.endswith("model"):
            pytest.importorskip("transformers")
        tokenizer = request.getfixturevalue(kind)
        if kind.endswith("model"):
            tokenizer = SentencePiece(tokenizer)
        if kind == "gpt2":
            # Megatron asks for the hub's "gpt2", for which a folder of that name can stand in.
            (tmp_path / "gpt2").mkdir()
            (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
        corpus = write_json(tmp_path / "c.jsonl", TEXTS + AWKWARD)
        options = [*flags(tokenizer), *(["--append-eod"] if append_eod else [])]
        command = [
            *(sys.executable, "-W", "ignore", megatron / "tools" / "preprocess_data.py"),
            *("--input", corpus, "--output-prefix", tmp_path / "theirs", "--workers", "2"),
            *("--tokenizer-type", tokenizer.megatron_type, *options),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(megatron), *filter(None, sys.path)]),
            "HF_HUB_OFFLINE": "1",
        }
        subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, check=True)
        assert run(corpus, "--output-prefix", tmp_path / "ours", "--workers", 2, *options) == 0
        for suffix in (".bin", ".idx"):
            theirs = (tmp_path / f"theirs_text_document{suffix}").read_bytes()
            assert (tmp_path / f"ours{suffix}").read_bytes() == theirs
        assert np.frombuffer(theirs, dtype=np.uint8).any()
