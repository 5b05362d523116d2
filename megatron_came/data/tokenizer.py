"""Tokenizers, named by their files: what each makes of a text is what Megatron's own makes of it.

Megatron 0.19's SentencePiece class is ``SentencePieceProcessor.encode`` unless one of its special
flags is given. Its GPT2BPETokenizer takes a GPT-2 from Hugging Face's hub and puts the user's files
into it; ``tokenizers`` alone does the same without the hub. Its HuggingFaceTokenizer is used as is.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_came.terminal.quiet import quiet
from megatron_came.terminal.sentences import CommandError, reason_of, require

GPT2_END = "<|endoftext|>"


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
