"""Documents into tokens, in one process or several."""

import hashlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_came.data.corpus import Corpus
from megatron_came.data.folders import Skipped, UnusableError
from megatron_came.data.records import Record
from megatron_came.data.tokenizer import TokenizerFiles
from megatron_came.data.workers import ordered_map
from megatron_came.terminal.sentences import CommandError

_BATCH_BYTES = 1 << 20  # of text, worth sending to another process
_SMALL = 1 << 22  # bytes of text that are encoded in a moment


@dataclass
class Encoded:
    """Documents, each with whether it is for validation, and the corpus's position behind them."""

    position: int
    documents: list[tuple[bool, NDArray[np.int32]]] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)


def is_for_validation(text: str, share: float) -> bool:
    """Draw by the text itself.

    So the outcome depends neither on the order of documents nor on which others there are, and
    copies of one text never lie on both sides.
    """
    if not share:
        return False
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


class Encoder:
    """What is done to each document.

    With ``append_eod`` an end-of-document token follows those of a document that has any;
    ``validation`` is the share of the documents that goes into the validation set, from 0 to 1.

    Raises:
        CommandError: If the tokenizer cannot be loaded or cannot end a document.
    """

    def __init__(self, files: TokenizerFiles, append_eod: bool, validation: float) -> None:
        self._files, self._append_eod, self.validation = files, append_eod, validation
        self.tokenizer = files.load()
        if append_eod and self.tokenizer.eod is None:
            raise CommandError(
                f"The tokenizer ({' '.join(path for _, path in files.flags())}) has no"
                " end-of-document token: leave out --append-eod, or take one that has."
            )

    def __reduce__(self) -> tuple[type[Self], tuple[TokenizerFiles, bool, float]]:
        # Where there is no fork, each worker loads the tokenizer.
        return type(self), (self._files, self._append_eod, self.validation)

    def encode(self, batch: tuple[list[Record], int]) -> Encoded:
        """Encode documents, given with the position behind; a CommandError if one is faulty."""
        records, position = batch
        encoded = Encoded(position)
        for record in records:
            try:
                text = record.text()
            except UnusableError as error:
                encoded.skipped.add(record.where, error, required=record.required)
            else:
                drawn = is_for_validation(text, self.validation)
                encoded.documents.append((drawn, self._tokens(record, text)))
        return encoded

    def _tokens(self, record: Record, text: str) -> NDArray[np.int32]:
        tokens = self.tokenizer.tokenize(text)
        if tokens and self._append_eod and self.tokenizer.eod is not None:
            tokens.append(self.tokenizer.eod)
        document = np.array(tokens, dtype=np.int32)
        if tokens and document.max() >= self.tokenizer.vocab_size:
            # The embedding has no such row, and two bytes may not hold the number.
            raise CommandError(
                f"The tokenizer made token {document.max()} of {record.where} and says that it has"
                f" {self.tokenizer.vocab_size} tokens: mend its files."
            )
        return document


def encode(corpus: Corpus, encoder: Encoder, *, workers: int) -> Generator[Encoded, None, None]:
    """Encode a corpus, in its order however many processes there are; see :func:`ordered_map`."""
    if workers == 1 and corpus.size <= _SMALL and not corpus.pipes:
        workers = 0
    return ordered_map(encoder.encode, _batches(corpus), workers=workers)


def _batches(corpus: Corpus) -> Iterator[tuple[list[Record], int]]:
    records: list[Record] = []
    size = 0
    for record in corpus.records():
        records.append(record)
        size += len(record.raw)
        if size >= _BATCH_BYTES:
            yield records, corpus.position
            records, size = [], 0
    yield records, corpus.size
