"""Megatron's indexed datasets: a ``.bin`` file of tokens and an ``.idx`` file of documents."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from numpy.typing import NDArray


def dataset_files(prefixes: Sequence[Path]) -> tuple[Path, ...]:
    """The files of datasets in the order in which they must appear.

    Megatron takes a dataset for complete when both its files are there: the indices come last.

    Args:
        prefixes: What Megatron's ``--data-path`` is to name.
    """
    return tuple(Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx") for prefix in prefixes)


class DatasetWriter:
    """Writes one dataset, byte for byte as Megatron's ``tools/preprocess_data.py`` does.

    Args:
        bin_path: The file of tokens; it is opened at once.
        idx_path: The file of documents.
        vocab_size: Number of tokens there are; it decides how many bytes each takes.

    Attributes:
        documents: How many were added.
        empty: How many of these have no token.
        tokens: How many tokens they have.
    """

    def __init__(self, bin_path: Path, idx_path: Path, *, vocab_size: int) -> None:
        self.documents = 0
        self.empty = 0
        self.tokens = 0
        self._idx_path = idx_path
        self._builder = IndexedDatasetBuilder(str(bin_path), dtype=DType.optimal_dtype(vocab_size))

    def add(self, document: NDArray[np.int32]) -> None:
        """Adds a document, which may have no token."""
        length = len(document)
        self._builder.add_document(document, [length] if length else [])
        self.documents += 1
        self.empty += not length
        self.tokens += length

    def finish(self) -> None:
        """Writes the index."""
        self._builder.finalize(str(self._idx_path))

    def close(self) -> None:
        """Lets go of the file of tokens, finished or not."""
        self._builder.data_file.close()
