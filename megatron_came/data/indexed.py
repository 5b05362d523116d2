"""Megatron's indexed datasets: a ``.bin`` file of tokens and an ``.idx`` file of documents."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_came.data.errors import DataError
from megatron_came.data.files import whole_files


@dataclass(frozen=True)
class DatasetSize:
    """What a dataset holds."""

    documents: int
    tokens: int


def write_indexed_dataset(
    prefix: Path, documents: Iterable[Sequence[int]], *, eod: int, vocab_size: int
) -> DatasetSize:
    """Writes ``prefix.bin`` and ``prefix.idx``, whole or not at all.

    Args:
        prefix: What Megatron's ``--data-path`` is to name.
        documents: The tokens of each document, without an end-of-document token.
        eod: The end-of-document token, added to each document.
        vocab_size: Number of tokens there are; it decides how many bytes each takes.

    Raises:
        DataError: If there is no document.
    """
    count = tokens = 0
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    # Megatron takes a dataset for complete when both files are there: the index comes last.
    with whole_files(bin_path, idx_path) as (partial_bin, partial_idx):
        builder = IndexedDatasetBuilder(str(partial_bin), dtype=DType.optimal_dtype(vocab_size))
        try:
            for document in documents:
                ended = np.append(np.asarray(document, dtype=np.int64), eod)
                builder.add_document(ended, [len(ended)])
                count += 1
                tokens += len(ended)
            if not count:
                raise DataError("There is no document to make a dataset of: give some text.")
            builder.finalize(str(partial_idx))
        finally:
            builder.data_file.close()
    return DatasetSize(count, tokens)
