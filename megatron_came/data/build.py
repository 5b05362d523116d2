"""A corpus into indexed datasets, for the command and the quick start alike."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from megatron_came.data.corpus import Corpus
from megatron_came.data.encoding import Encoder, encode
from megatron_came.data.errors import DataError
from megatron_came.data.indexed import DatasetWriter


def write_datasets(
    corpus: Corpus,
    encoder: Encoder,
    files: Sequence[Path],
    *,
    workers: int = 1,
    advance: Callable[[int], None] = lambda size: None,
) -> list[DatasetWriter]:
    """Writes a dataset of all documents, or one for training and one for validation.

    Args:
        corpus: The documents; its ``skipped`` is complete afterwards.
        encoder: What is done to each.
        files: What ``dataset_files`` gives of one prefix, or of two with a validation share.
        workers: How many processes encode; see ``encode``.
        advance: Called with the bytes of the corpus that are done, again and again.

    Returns:
        What was written, in the order of the prefixes.

    Raises:
        DataError: If a dataset would be empty, or a document that must be usable is not.
        OSError: If the files cannot be written.
    """
    done = 0
    half = len(files) // 2
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                closing(DatasetWriter(*pair, vocab_size=encoder.tokenizer.vocab_size))
            )
            for pair in zip(files[:half], files[half:], strict=True)
        ]
        for encoded in encode(corpus, encoder, workers=workers):
            for for_validation, document in encoded.documents:
                writers[for_validation].add(document)
            corpus.skipped.update(encoded.skipped)
            advance(encoded.position - done)
            done = encoded.position
        _check_filled(writers, encoder.job.validation)
        for writer in writers:
            writer.finish()
    return writers


def _check_filled(writers: Sequence[DatasetWriter], share: float) -> None:
    documents = sum(writer.documents for writer in writers)
    if not any(writer.tokens for writer in writers):
        raise DataError("There is no text in what was named: name files that hold some.")
    for writer, name in zip(writers, ("training", "validation"), strict=False):
        if not writer.tokens:
            raise DataError(
                f"Of {documents} documents, a share of {share:g} for validation leaves none for"
                f" {name}: choose another --validation, or smaller documents with --separator."
            )
