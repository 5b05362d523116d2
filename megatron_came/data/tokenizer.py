"""Tokenizers, named by their files: what each makes of a text is what Megatron's own makes of it.

Megatron 0.19's SentencePiece class is ``SentencePieceProcessor.encode`` unless one of its special
flags is given. Its GPT2BPETokenizer takes a GPT-2 from Hugging Face's hub and puts the user's files
into it; ``tokenizers`` alone does the same without the hub. Its HuggingFaceTokenizer is used as is.
"""

import io
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_came.data.workers import ordered_map
from megatron_came.terminal.quiet import quiet
from megatron_came.terminal.sentences import CommandError, reason_of, require

GPT2_END = "<|endoftext|>"

# Of training SentencePiece.
_SAMPLED_LINES = 100_000
_THREADS = 2  # fixed, as the result depends on it
_LONGEST_LINE = 1000  # characters; SentencePiece leaves out lines of more than 4192 bytes


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer."""

    tokenize: Callable[[str], list[int]]
    vocab_size: int
    eod: int | None  # the end-of-document token


@dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece model, by its file."""

    model: Path
    megatron_type = "GPTSentencePieceTokenizer"

    def load(self) -> Tokenizer:
        """Load it; raise a CommandError if the file is no model."""
        try:
            if not self.model.read_bytes():
                raise RuntimeError("empty")  # which SentencePiece would take for a model
            processor = sentencepiece.SentencePieceProcessor(model_file=str(self.model))
        except OSError as error:
            raise _unreadable(self.model, error, "a SentencePiece model that can") from error
        except RuntimeError as error:
            raise CommandError(
                f"{self.model} is not a SentencePiece model: name one that is."
            ) from error
        eod = processor.eos_id()
        return Tokenizer(processor.encode, processor.get_piece_size(), eod if eod >= 0 else None)

    def flags(self) -> list[tuple[str, str]]:
        """Name Megatron's flags for it."""
        return [("--tokenizer-model", str(self.model))]


@dataclass(frozen=True)
class Gpt2Bpe:
    """GPT-2's byte-level BPE, by its ``vocab.json`` and ``merges.txt``."""

    vocab_file: Path
    merge_file: Path
    megatron_type = "GPT2BPETokenizer"

    def load(self) -> Tokenizer:
        """Load it; raise a CommandError if the files are no such vocabulary and merges."""
        require("tokenizers", "GPT-2's BPE")
        from tokenizers import Tokenizer as HuggingFaceFast
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel

        missing = set(ByteLevel.alphabet()) - _read_vocabulary(self.vocab_file).keys()
        if missing:
            # A text's bytes that have no token would vanish without a word.
            raise CommandError(
                f"{self.vocab_file} has no token for {len(missing)} of the 256 bytes, so it is no"
                " vocabulary of GPT-2: name its vocab.json, or use another kind of tokenizer."
            )
        try:
            bpe = BPE.from_file(str(self.vocab_file), str(self.merge_file))
        except Exception as error:  # of Rust, which has no types of its own
            raise CommandError(
                f"{self.merge_file} cannot be used with {self.vocab_file} ({error}): name the"
                " merges.txt that belongs to it."
            ) from error
        tokenizer = HuggingFaceFast(bpe)
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens([GPT2_END])
        return Tokenizer(
            lambda text: tokenizer.encode(text).ids,
            tokenizer.get_vocab_size(),
            tokenizer.token_to_id(GPT2_END),
        )

    def flags(self) -> list[tuple[str, str]]:
        """Name Megatron's flags for it."""
        return [("--vocab-file", str(self.vocab_file)), ("--merge-file", str(self.merge_file))]


@dataclass(frozen=True)
class HuggingFace:
    """A folder with a tokenizer of Hugging Face's, ``tokenizer.json`` or its like."""

    folder: Path
    megatron_type = "HuggingFaceTokenizer"

    def load(self) -> Tokenizer:
        """Load it; raise a CommandError if the folder holds no tokenizer."""
        require("transformers", "a Hugging Face tokenizer")
        # It is a folder: nothing need be asked of the hub. And no advice on models not built here.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        with quiet():
            from megatron.core.tokenizers import MegatronTokenizer

            try:
                tokenizer: Any = MegatronTokenizer.from_pretrained(
                    tokenizer_path=str(self.folder), metadata_path={"library": "huggingface"}
                )
            except Exception as error:  # of any of the many kinds of tokenizer there are
                reason = str(error.__context__ or error).strip().splitlines()[0].rstrip(".")
                raise CommandError(
                    f"{self.folder} holds no tokenizer that transformers can load ({reason}): name"
                    " a folder with tokenizer.json and tokenizer_config.json."
                ) from error
        return Tokenizer(tokenizer.tokenize, tokenizer.vocab_size, tokenizer.eod)

    def flags(self) -> list[tuple[str, str]]:
        """Name Megatron's flags for it."""
        return [("--tokenizer-model", str(self.folder))]


TokenizerFiles = SentencePiece | Gpt2Bpe | HuggingFace


def _unreadable(path: Path, error: OSError, instead: str) -> CommandError:
    return CommandError(f"{path} cannot be read ({reason_of(error)}): name {instead}.")


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error, "GPT-2's vocab.json") from error
    except ValueError as error:
        raise CommandError(f"{path} is not JSON: name GPT-2's vocab.json.") from error
    if not isinstance(vocabulary, dict):
        raise CommandError(f"{path} is no table of tokens: name GPT-2's vocab.json.")
    return vocabulary


def train_tokenizer(texts: Iterable[str], model: Path, *, vocab_size: int) -> None:
    """Train a tokenizer that gives back every text exactly, white space included.

    (But for the character U+2581, with which SentencePiece writes spaces.) The same texts give the
    same tokenizer; of large corpora it learns from a random sample of the lines. The ``vocab_size``
    includes the 256 bytes and the special tokens (unknown 0, beginning 1, end of document 2,
    padding 3).

    Raises:
        CommandError: If so many tokens are too many for the texts, or too few.
    """
    # SentencePiece hears no signal while it trains; another process can be killed.
    train = partial(_train, _sample(_lines(texts)))
    (content,) = ordered_map(
        train, [vocab_size], workers=1, remedy="train on less text", afresh=True
    )
    model.write_bytes(content)


def _train(lines: list[str], vocab_size: int) -> bytes:
    """Return the model as it is to lie in its file."""
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=trained,
            vocab_size=vocab_size,
            num_threads=_THREADS,
            # Text comes back as it was: no normalisation, and bytes for characters never seen.
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=3,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise CommandError(_explain(str(error), vocab_size)) from error
    return trained.getvalue()


def _explain(error: str, vocab_size: int) -> str:
    """Say what SentencePiece means."""
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"The text has too many different characters for {vocab_size} tokens: choose at least"
            f" {needed[1]}."
        )
    if "insert_id" in error:
        return f"{vocab_size} tokens are fewer than the special ones: choose at least 300."
    if "sentences_" in error:
        return "There is no text to train a tokenizer on: name files that hold some."
    if possible := re.search(r"a value <= (\d+)", error):
        return (
            f"The text is too small or too uniform for {vocab_size} tokens: give more text or"
            f" choose at most {possible[1]}."
        )
    reason = " ".join(error.split()).removesuffix(".")
    return f"SentencePiece cannot train {vocab_size} tokens ({reason}): choose another number."


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts into lines, none of which is longer than SentencePiece takes."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]


def _sample(lines: Iterable[str]) -> list[str]:
    """Draw lines with equal chances; SentencePiece's own sample is another one each time."""
    generator = random.Random(1)
    sample: list[str] = []
    for index, line in enumerate(lines):
        if index < _SAMPLED_LINES:
            sample.append(line)
        elif (drawn := generator.randrange(index + 1)) < _SAMPLED_LINES:
            sample[drawn] = line
    return sample
