"""Tokenizers that are not named, not there, or no tokenizers."""

import importlib.util
from pathlib import Path

import pytest
import sentencepiece

from megatron_came.data.tokenizer import Gpt2Bpe
from tests.support.datasets import (
    TEXTS,
    fails,
    files,
    flags,
    needs_tokenizers,
    needs_transformers,
    run,
)


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
