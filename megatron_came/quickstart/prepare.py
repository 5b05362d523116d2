"""Corpus, tokenizer and dataset of the quick start."""

import os
import shutil

from megatron_came.data.corpus import Corpus, write_json_lines
from megatron_came.data.encoding import Encoder
from megatron_came.data.files import whole_files
from megatron_came.data.quiet import quiet
from megatron_came.data.tokenizer import SentencePiece
from megatron_came.data.tokenizer_training import train_tokenizer
from megatron_came.quickstart.settings import QuickstartError, Settings
from megatron_came.quickstart.steps import Steps
from megatron_came.terminal.progress import Progress


def prepare(settings: Settings, steps: Steps) -> str:
    """Makes what is missing of corpus, tokenizer and dataset.

    Returns:
        A digest of what the dataset was made from.

    Raises:
        DataError: If the text cannot be used.
        QuickstartError: If it is too little.
    """
    source = Corpus.from_paths(settings.text) if settings.text else Corpus.python_library()
    corpus = steps.run(
        "Corpus",
        {"files": [_identity(path) for path in source.files]},
        [settings.corpus],
        lambda: _write_corpus(settings, source),
    )
    tokenizer = steps.run(
        "Tokenizer",
        {"corpus": corpus, "vocabulary": settings.vocabulary},
        [settings.tokenizer],
        lambda: _train_tokenizer(settings),
    )
    return steps.run(
        "Dataset",
        {"tokenizer": tokenizer},
        [settings.dataset.with_suffix(".bin"), settings.dataset.with_suffix(".idx")],
        lambda: _write_dataset(settings),
    )


def _identity(path: os.PathLike[str]) -> list[object]:
    """What changes when a file does."""
    try:
        status = os.stat(path)
    except OSError:  # reading it will say what is wrong
        return [os.path.abspath(path)]
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def _write_corpus(settings: Settings, source: Corpus) -> None:
    where = "your text" if settings.text else "the Python library's sources"
    print(f"Corpus: collecting {where}.")
    documents = write_json_lines(source, settings.corpus)
    size = settings.corpus.stat().st_size
    print(f"  {documents} documents, {size / 1e6:.1f} MB.")
    for line in source.skipped.lines():
        print(f"  {line}")
    if size < settings.smallest_text:
        raise QuickstartError(
            f"There are {size / 1000:.0f} kB of text, and the quick start needs"
            f" {settings.smallest_text / 1000:.0f} kB: name more or larger files."
        )


def _train_tokenizer(settings: Settings) -> None:
    print(f"Tokenizer: training SentencePiece with {settings.vocabulary} tokens (10 to 30 s).")
    texts = (document.text for document in Corpus.from_paths([settings.corpus]))
    train_tokenizer(texts, settings.tokenizer, vocab_size=settings.vocabulary)


def _write_dataset(settings: Settings) -> None:
    with quiet():
        from megatron_came.data.indexed import dataset_files, write_datasets

    # Its index of samples is found by the dataset's name: an old one would be taken for this one's.
    shutil.rmtree(settings.dataset_cache, ignore_errors=True)
    corpus = Corpus.from_paths([settings.corpus])
    encoder = Encoder(SentencePiece(settings.tokenizer), append_eod=True)
    with (
        whole_files(*dataset_files([settings.dataset])) as files,
        Progress("Dataset", corpus.size) as progress,
    ):
        (written,) = write_datasets(corpus, encoder, files, progress=progress)
    print(f"  {written.documents} documents, {written.tokens:,} tokens.")
