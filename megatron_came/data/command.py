"""``megatron-came data INPUT ...``: text in, Megatron's indexed datasets out."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_came.data.arguments import named_tokenizer, read
from megatron_came.data.corpus import Corpus
from megatron_came.data.encoding import Encoder, Job
from megatron_came.data.errors import DataError
from megatron_came.data.files import LateInterrupt, whole_files
from megatron_came.data.quiet import quiet
from megatron_came.data.records import Layout
from megatron_came.data.tokenizer import SentencePiece, TokenizerFiles
from megatron_came.data.tokenizer_training import train_tokenizer
from megatron_came.terminal.progress import Progress
from megatron_came.tools.launch_flags import launch_flags

if TYPE_CHECKING:
    from megatron_came.data.indexed import DatasetWriter

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BYTES_PER_WORKER = 4_000_000  # of text, below which another process is not worth its start


def run(options: argparse.Namespace) -> str:
    """Make the datasets.

    Returns:
        What was made and how to train with it.

    Raises:
        DataError: The input cannot be used, or the output is there already.
        OSError: The output cannot be written.
    """
    given = named_tokenizer(options)
    encoder = _encoder(given, options) if given else None  # its faults are to be said first
    corpus = _corpus(options)
    with quiet():
        from megatron_came.data.build import write_datasets
        from megatron_came.data.indexed import dataset_files
    prefix = options.output_prefix
    parts = ("_train", "_valid") if options.validation else ("",)
    prefixes = [prefix.with_name(prefix.name + part) for part in parts]
    # A new model is one of the files that appear together, as an old one would not fit the tokens.
    models = [] if given else [Path(f"{prefix}.model")]
    outputs = [*models, *dataset_files(prefixes)]
    _refuse_inputs(outputs, corpus)

    with whole_files(*outputs) as partial:
        if not options.overwrite:
            _refuse_existing(outputs)  # now that nobody else can be writing them
        if not encoder:
            train_tokenizer(
                _texts(corpus, options.train_tokenizer),
                partial[0],
                vocab_size=options.train_tokenizer,
            )
            encoder = _encoder(SentencePiece(partial[0]), options)
        try:
            with Progress("Encoding", corpus.size, sys.stderr) as progress:
                written = write_datasets(
                    corpus,
                    encoder,
                    partial[len(models) :],
                    workers=options.workers or _worthwhile_workers(corpus.size),
                    advance=_with_speed(progress),
                )
        finally:
            _say(corpus.skipped.lines())
        if options.separator and not corpus.separated:
            _say([f"{options.separator!r} is nowhere in the text: each file is one document."])
        for each in prefixes:
            # Megatron finds its index of samples by the dataset's name, whatever is in it by now.
            shutil.rmtree(each / "cache" / "GPTDataset_indices", ignore_errors=True)

    files = given or SentencePiece(models[0])
    made = [_describe(path, part) for path, part in zip(prefixes, written, strict=True)]
    if not options.append_eod:
        made.append("No token ends a document: --append-eod adds one, as GPT training expects.")
    return "\n".join([*made, "", launch_flags(files, encoder.tokenizer, prefixes)])


def _corpus(options: argparse.Namespace) -> Corpus:
    layout = Layout(options.format, options.json_key, options.separator)
    corpus = Corpus.from_paths(options.inputs, layout, tolerant=options.skip_faulty)
    if corpus.pipes and options.train_tokenizer:
        raise DataError(
            f"{corpus.pipes[0]} is no regular file and can be read only once, which is not enough"
            " to train a tokenizer: write it to a file first, or give --tokenizer-model."
        )
    return corpus


def _encoder(tokenizer: TokenizerFiles, options: argparse.Namespace) -> Encoder:
    return Encoder(Job(tokenizer, options.append_eod, options.validation))


def _describe(prefix: Path, dataset: DatasetWriter) -> str:
    empty = f" ({dataset.empty:,} without text)" if dataset.empty else ""
    return f"{prefix}: {dataset.documents:,} documents{empty}, {dataset.tokens:,} tokens"


def _refuse_existing(outputs: Iterable[Path]) -> None:
    for path in outputs:
        if path.exists():
            raise DataError(
                f"{path} is there already: give another --output-prefix, or --overwrite to replace"
                " it."
            )


def _refuse_inputs(outputs: Iterable[Path], corpus: Corpus) -> None:
    inputs = {os.path.realpath(path) for path in corpus.files}
    for path in outputs:
        if os.path.realpath(path) in inputs:
            raise DataError(
                f"{path} is among the input and would be replaced: give another --output-prefix,"
                " or move it."
            )


def _texts(corpus: Corpus, size: int) -> Iterator[str]:
    done = 0
    with Progress("Reading for the tokenizer", corpus.size, sys.stderr) as progress:
        for document in corpus:
            yield document.text
            progress.advance(corpus.position - done)
            done = corpus.position
        progress.advance(corpus.size - done)
    _say([f"Training a tokenizer of {size} tokens, which may take a minute."])


def _with_speed(progress: Progress) -> Callable[[int], None]:
    start, done = time.monotonic(), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        speed = done / (time.monotonic() - start) / 1e6
        progress.advance(size, f", {speed:.1f} MB/s")

    return advance


def _worthwhile_workers(size: int) -> int:
    return min(len(os.sched_getaffinity(0)), 1 + size // _BYTES_PER_WORKER)


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    # A batch system's signal ends it as Ctrl-C does: without files left behind.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _main(argv)
    except KeyboardInterrupt as interrupt:
        late = isinstance(interrupt, LateInterrupt)
        return _fail(f"Interrupted: {'everything' if late else 'nothing'} was written.", 130)
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(argv: list[str]) -> int:
    options = read(argv)
    try:
        report = run(options)
    except DataError as error:
        return _fail(str(error), 1)
    except OSError as error:
        path = str(error.filename or f"{options.output_prefix}.bin").removesuffix(".partial")
        reason = (error.strerror or "unknown error").lower()
        remedy = "make room, or give" if error.errno in _FULL else "give"
        return _fail(
            f"{path} cannot be written ({reason}): {remedy} another --output-prefix; nothing was"
            " written.",
            1,
        )
    try:
        print(report, flush=True)
    except BrokenPipeError:  # nobody reads on, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(message: str, status: int) -> int:
    print(f"megatron-came data: {message}", file=sys.stderr)
    return status
