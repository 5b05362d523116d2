"""What the training launch is to be told about datasets and their tokenizer."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_came.data.tokenizer import Gpt2Bpe, Tokenizer, TokenizerFiles
from megatron_came.terminal.console import wrapped

_INDENT = "    "  # of what is to be copied, and so not to be broken
_DIVISOR = 128  # Megatron's default of --make-vocab-size-divisible-by
_SIZES = (1, 2, 4, 8)  # of tensor parallelism


def launch_flags(files: TokenizerFiles, tokenizer: Tokenizer, prefixes: Sequence[Path]) -> str:
    """Name the flags, ready to be pasted into a launch script, and say what they are for.

    Of one dataset, or of one for training and one for validation, and their tokenizer.
    """
    if len(prefixes) > 1:
        train, valid = map(str, prefixes)
        data = [("--train-data-path", train), ("--valid-data-path", valid)]
    else:
        # Megatron's own --split never returns if a set gets no document, and an evaluation without
        # a dataset fails.
        data = [("--data-path", str(prefixes[0])), ("--split", "100,0,0"), ("--eval-iters", "0")]
    kind = [("--tokenizer-type", files.megatron_type), *files.flags()]
    # Megatron 0.19 has no default of its own and divides by it.
    often = ("--eval-interval", "1000")
    paragraphs = ["Give the training launch:", _block([*data, often, *kind])]
    if isinstance(files, Gpt2Bpe):
        paragraphs += [
            "GPT2BPETokenizer needs the package transformers and, the first time, Hugging Face's"
            " hub. Instead of its flags these do, as training needs no more of a tokenizer:",
            _block(_null_tokenizer(tokenizer)),
        ]
    if len(prefixes) == 1:
        paragraphs.append(
            "Nothing is set aside for validation: --validation 0.01 would set aside a hundredth."
        )
    paragraphs.append(_padding(tokenizer.vocab_size))
    return "\n\n".join(
        each if each.startswith(_INDENT) else "\n".join(wrapped(each)) for each in paragraphs
    )


def _null_tokenizer(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Name the flags of a tokenizer that has the numbers and no text."""
    size = tokenizer.vocab_size
    flags = [("--tokenizer-type", "NullTokenizer"), ("--vocab-size", str(size))]
    if tokenizer.eod is not None and tokenizer.eod != size - 1:  # the last is the default
        flags.append(("--null-tokenizer-eod-id", str(tokenizer.eod)))
    return flags


def _block(flags: Sequence[tuple[str, str]]) -> str:
    return " \\\n".join(f"{_INDENT}{name} {shlex.quote(value)}" for name, value in flags)


def _padding(vocab_size: int) -> str:
    """Say how many rows the embedding gets, which depends on tensor parallelism."""
    multiples = [_DIVISOR * size for size in _SIZES]
    rows = [math.ceil(vocab_size / multiple) * multiple for multiple in multiples]
    text = f"Megatron pads the vocabulary of {vocab_size} tokens to {rows[0]} rows"
    others = [(row, size) for row, size in zip(rows, _SIZES, strict=True) if row != rows[0]]
    if not others:
        return f"{text}."
    at = ", ".join(f"{row} at size {size}" for row, size in others)
    divisors = ", ".join(str(_DIVISOR // size) for _, size in others)
    return (
        f"{text}; with tensor parallelism, {at}. "
        f"--make-vocab-size-divisible-by {divisors} gives {rows[0]} there as well."
    )
