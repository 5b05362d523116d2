"""Megatron's indexed datasets: a ``.bin`` file of tokens and an ``.idx`` file of documents."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from numpy.typing import NDArray

from megatron_came.data.corpus import Corpus
from megatron_came.data.encoding import Encoder, encode
from megatron_came.terminal.console import counted
from megatron_came.terminal.progress import Progress
from megatron_came.terminal.sentences import CommandError


def dataset_files(prefixes: Sequence[Path]) -> tuple[Path, ...]:
    """Name the files of datasets, by ``--data-path``, in the order in which they must appear.

    Megatron takes a dataset for complete when both its files are there: the indices come last.
    """
    return tuple(Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx") for prefix in prefixes)


class DatasetWriter:
    """Write one dataset, byte for byte as Megatron's ``tools/preprocess_data.py`` does.

    The number of tokens that there are, ``vocab_size``, decides how many bytes each takes.
    """

    def __init__(self, bin_path: Path, idx_path: Path, *, vocab_size: int) -> None:
        self.documents = self.tokens = 0
        self.empty = 0  # documents without a token
        self._idx_path = idx_path
        self._builder = IndexedDatasetBuilder(str(bin_path), dtype=DType.optimal_dtype(vocab_size))

    def __str__(self) -> str:
        empty = f" ({self.empty:,} without text)" if self.empty else ""
        return f"{counted(self.documents, 'document')}{empty}, {counted(self.tokens, 'token')}"

    def add(self, document: NDArray[np.int32]) -> None:
        """Add a document, which may have no token."""
        length = len(document)
        self._builder.add_document(document, [length] if length else [])
        self.documents += 1
        self.empty += not length
        self.tokens += length

    def finish(self) -> None:
        """Write the index."""
        self._builder.finalize(str(self._idx_path))

    def close(self) -> None:
        """Let go of the file of tokens, finished or not."""
        self._builder.data_file.close()


def write_datasets(
    corpus: Corpus, encoder: Encoder, files: Sequence[Path], *, progress: Progress, workers: int
) -> list[DatasetWriter]:
    """Write a dataset of all documents, or one for training and one for validation.

    The files are what :func:`dataset_files` gives of one prefix, or of two with a validation share;
    returned is what was written, in the order of the prefixes. The ``skipped`` of the corpus is
    complete afterwards.

    Raises:
        CommandError: If a dataset would be empty, or a document that must be usable is not.
        OSError: If the files cannot be written.
    """
    half = len(files) // 2
    size = encoder.tokenizer.vocab_size
    with ExitStack() as stack:
        writers = [
            stack.enter_context(closing(DatasetWriter(*pair, vocab_size=size)))
            for pair in zip(files[:half], files[half:], strict=True)
        ]
        # Closed, whatever happens: its processes end.
        for encoded in stack.enter_context(closing(encode(corpus, encoder, workers=workers))):
            for for_validation, document in encoded.documents:
                writers[for_validation].add(document)
            corpus.skipped.update(encoded.skipped)
            progress.reach(encoded.position)
        _check_filled(writers, encoder.validation)
        for writer in writers:
            writer.finish()
    return writers


def _check_filled(writers: Sequence[DatasetWriter], share: float) -> None:
    if not any(writer.tokens for writer in writers):
        raise CommandError("There is no text in what was named: name files that hold some.")
    documents = counted(sum(writer.documents for writer in writers), "document")
    for writer, name in zip(writers, ("training", "validation"), strict=False):
        if not writer.tokens:
            raise CommandError(
                f"Of {documents}, a share of {share:g} for validation leaves none for {name}:"
                f" choose another --validation, or smaller documents with --separator."
            )
