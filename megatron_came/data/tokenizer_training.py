"""SentencePiece tokenizers, trained on a corpus."""

import io
import random
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import sentencepiece

from megatron_came.data.workers import ordered_map
from megatron_came.terminal.sentences import CommandError

_SAMPLED_LINES = 100_000
_THREADS = 2  # fixed, as the result depends on it
_LONGEST_LINE = 1000  # characters; SentencePiece leaves out lines of more than 4192 bytes


def train_tokenizer(texts: Iterable[str], model: Path, *, vocab_size: int) -> None:
    """Train a tokenizer that gives back every text exactly, white space included.

    (But for the character U+2581, with which SentencePiece writes spaces.) The same texts give the
    same tokenizer.

    Args:
        texts: What to learn from; a random sample of the lines of large corpora is taken.
        model: The file to write.
        vocab_size: Number of tokens, the 256 bytes and the special ones (unknown 0, beginning 1,
            end of document 2, padding 3) included.

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
