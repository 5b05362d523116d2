"""``megatron-came data INPUT ...``: text in, Megatron's indexed datasets out."""

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_came.data.arguments import named_tokenizer, read
from megatron_came.data.corpus import Corpus
from megatron_came.data.encoding import Encoder
from megatron_came.data.files import LateInterrupt, clear_away, whole_files
from megatron_came.data.launch_flags import launch_flags
from megatron_came.data.records import Layout
from megatron_came.data.tokenizer import SentencePiece, train_tokenizer
from megatron_came.terminal.progress import Progress
from megatron_came.terminal.quiet import quiet
from megatron_came.terminal.sentences import CommandError, reason_of, status_of

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BYTES_PER_WORKER = 4_000_000  # of text, below which another process is not worth its start
_WORKERS_PER_CORE = 8  # more wait for each other, and may not find room


def run(options: argparse.Namespace, corpus: Corpus | None = None) -> str:
    """Make the datasets, of a corpus or of the files that the options name.

    Returns:
        What was made and how to train with it.

    Raises:
        CommandError: The input cannot be used, or the output is there already.
        OSError: The output cannot be written.
    """
    given = named_tokenizer(options)
    settings = options.append_eod, options.validation
    encoder = Encoder(given, *settings) if given else None  # its faults are to be said first
    corpus = corpus or _corpus(options)
    with quiet():
        from megatron_came.data.indexed import dataset_files, write_datasets
    prefix = options.output_prefix
    whole, *parts = (prefix.with_name(prefix.name + end) for end in ("", "_train", "_valid"))
    prefixes = parts if options.validation else [whole]
    # A new model is one of the files that appear together, as an old one would not fit the tokens.
    models = [] if given else [Path(f"{prefix}.model")]
    outputs = [*models, *dataset_files(prefixes)]
    _refuse_inputs(outputs, corpus)

    with whole_files(*outputs) as partial:
        if not options.overwrite:
            _refuse_existing(outputs)  # now that nobody else can be writing them
        if not encoder:
            size = options.train_tokenizer
            train_tokenizer(_texts(corpus, size), partial[0], vocab_size=size)
            encoder = Encoder(SentencePiece(partial[0]), *settings)
        try:
            with Progress("Encoding", corpus.size, sys.stderr, speed=True) as progress:
                written = write_datasets(
                    corpus,
                    encoder,
                    partial[len(models) :],
                    workers=_workers(options.workers, corpus.size),
                    progress=progress,
                )
        finally:
            _say(*corpus.skipped.lines())
        if options.separator and not corpus.separated:
            _say(f"{options.separator!r} is nowhere in the text: each file is one document.")
        for each in prefixes:
            # Megatron finds its index of samples by the dataset's name, whatever is in it by now.
            shutil.rmtree(each / "cache" / "GPTDataset_indices", ignore_errors=True)

    # What an earlier run with other flags, which was killed, may have left.
    clear_away({Path(f"{prefix}.model"), *dataset_files([whole, *parts])}.difference(outputs))
    files = given or SentencePiece(models[0])
    made = [f"{path}: {dataset}" for path, dataset in zip(prefixes, written, strict=True)]
    if not options.append_eod:
        made.append("No token ends a document: --append-eod adds one, as GPT training expects.")
    return "\n".join([*made, "", launch_flags(files, encoder.tokenizer, prefixes)])


def _corpus(options: argparse.Namespace) -> Corpus:
    layout = Layout(options.format, options.json_key, options.separator)
    corpus = Corpus.from_paths(options.inputs, layout, tolerant=options.skip_faulty)
    if corpus.pipes and options.train_tokenizer:
        raise CommandError(
            f"{corpus.pipes[0]} is no regular file and can be read only once, which is not enough"
            " to train a tokenizer: write it to a file first, or give --tokenizer-model."
        )
    return corpus


def _refuse_existing(outputs: Sequence[Path]) -> None:
    for path in outputs:
        if path.exists():
            raise CommandError(
                f"{path} is there already: give another --output-prefix, or --overwrite to replace"
                " it."
            )


def _refuse_inputs(outputs: Sequence[Path], corpus: Corpus) -> None:
    inputs = {os.path.realpath(path) for path in corpus.files}
    for path in outputs:
        if os.path.realpath(path) in inputs:
            raise CommandError(
                f"{path} is among the input and would be replaced: give another --output-prefix,"
                " or move it."
            )


def _texts(corpus: Corpus, size: int) -> Iterator[str]:
    with Progress("Reading for the tokenizer", corpus.size, sys.stderr) as progress:
        for text in corpus:
            yield text
            progress.reach(corpus.position)
        progress.reach(corpus.size)
    _say(f"Training a tokenizer of {size} tokens, which may take a minute.")


def _workers(asked: int | None, size: int) -> int:
    cores = len(os.sched_getaffinity(0))
    if asked is None:
        return min(cores, 1 + size // _BYTES_PER_WORKER)
    most = _WORKERS_PER_CORE * cores
    if asked > most:
        _say(f"--workers {asked}: {most} are started, since there are {cores} cores.")
    return min(asked, most)


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    try:
        return status_of(lambda: _main(argv), "megatron-came data: ", status=1)
    except KeyboardInterrupt as interrupt:
        written = "everything" if isinstance(interrupt, LateInterrupt) else "nothing"
        said = f"megatron-came data: Interrupted: {written} was written."
        raise KeyboardInterrupt(said) from None  # the command line ends in it


def _main(argv: list[str]) -> None:
    options = read(argv)
    try:
        report = run(options)
    except BrokenPipeError:  # of who reads what is said
        raise
    except OSError as error:
        path = str(error.filename or f"{options.output_prefix}.bin").removesuffix(".partial")
        remedy = "make room, or give" if error.errno in _FULL else "give"
        raise CommandError(
            f"{path} cannot be written ({reason_of(error)}): {remedy} another --output-prefix; "
            "nothing was written."
        ) from error
    print(report, flush=True)
