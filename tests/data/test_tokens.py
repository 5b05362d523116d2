"""Which tokens a text becomes: with each kind of tokenizer, as Megatron's own script has them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.tokenizers import MegatronTokenizer
from sentencepiece import SentencePieceProcessor

from megatron_came.data import tokenizer
from megatron_came.data.tokenizer import (
    GPT2_END,
    Gpt2Bpe,
    HuggingFace,
    SentencePiece,
    train_tokenizer,
)
from megatron_came.terminal.sentences import CommandError
from tests.support.datasets import (
    AWKWARD,
    SOURCES,
    TEXTS,
    documents,
    flags,
    needs_tokenizers,
    needs_transformers,
    run,
    words,
    write_json,
)


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
        assert megatrons.vocab_size == tokenizer.vocab_size == 700

    def test_a_sample_is_the_same_each_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer, "_SAMPLED_LINES", 10)
        models = tmp_path / "one", tmp_path / "two"
        for model in models:
            train_tokenizer((words(200, seed) for seed in range(99)), model, vocab_size=300)
        assert models[0].read_bytes() == models[1].read_bytes()

    def test_too_little_text(self, tmp_path: Path) -> None:
        with pytest.raises(CommandError, match=r"too uniform for 4096 tokens: .* at most \d+\.$"):
            train_tokenizer([words(300)], tmp_path / "model", vocab_size=4096)
        with pytest.raises(CommandError, match="There is no text to train a tokenizer on: "):
            train_tokenizer([], tmp_path / "model", vocab_size=4096)
        assert not list(tmp_path.iterdir())

    def test_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "model").write_text("no model")
        with pytest.raises(CommandError, match="not a SentencePiece model"):
            SentencePiece(tmp_path / "model").load()


@pytest.fixture(scope="module")
def megatron() -> Path:
    checkout = os.environ.get("MEGATRON_LM")
    if not checkout:
        pytest.skip("MEGATRON_LM does not name a checkout of Megatron-LM, core_v0.19.0")
    return Path(checkout).absolute()


class TestMegatronsScript:
    """By hand: MEGATRON_LM=path/to/Megatron-LM python -m pytest tests/data/test_tokens.py."""

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
