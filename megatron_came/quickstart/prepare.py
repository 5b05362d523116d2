"""The quick start's tokenizer and dataset, made as ``megatron-came data`` makes them, and once."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_came.data.arguments import read
from megatron_came.data.command import run
from megatron_came.data.corpus import Corpus
from megatron_came.quickstart.settings import OPTIMIZERS, Settings
from megatron_came.terminal.paths import write_whole
from megatron_came.terminal.sentences import CommandError


def prepare(settings: Settings) -> str:
    """Make what is missing of tokenizer and dataset.

    Returns:
        A digest of what they were made from.

    Raises:
        CommandError: the text cannot be used, or is too little.
    """
    corpus = Corpus.from_paths(settings.text) if settings.text else Corpus.python_library()
    made = _made(settings)
    corpus.files = [
        path
        for path in corpus.files
        if path in corpus.named or made.isdisjoint((path.resolve(), *path.resolve().parents))
    ]
    return run_once(
        settings.steps,
        "Dataset",
        {"files": [_identity(path) for path in corpus.files], "vocabulary": settings.vocabulary},
        [settings.tokenizer, *(settings.dataset.with_suffix(end) for end in (".bin", ".idx"))],
        lambda: _make(settings, corpus),
    )


def _made(settings: Settings) -> set[Path]:
    """What the quick start, of this version or an earlier one, makes in its folder; no text."""
    names = ("dataset", "steps.json", "loss.png", "corpus.jsonl", "tokenizer.model")
    made = [settings.folder / name for name in names]
    for optimizer in OPTIMIZERS:
        made += [settings.result(optimizer), settings.run_folder(optimizer)]
    return {each.resolve() for each in made}


def _identity(path: os.PathLike[str]) -> list[object]:
    """What changes when a file does."""
    try:
        status = os.stat(path)
    except OSError:  # reading it will say what is wrong
        return [os.path.abspath(path)]
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def _make(settings: Settings, corpus: Corpus) -> None:
    where = "your text" if settings.text else "the Python library's sources"
    size = sum(len(text.encode()) for text in corpus)
    if size < settings.smallest_text:
        raise CommandError(
            f"There are {size / 1000:.0f} kB of text, and the quick start needs"
            f" {settings.smallest_text / 1000:.0f} kB: name more or larger files."
        )
    print(f"Dataset: {size / 1e6:.1f} MB of {where}, with a tokenizer trained on them.")
    # Little text has not that many words, and there is no flag to ask for fewer.
    tokens = settings.vocabulary // (1 if size >= 10 * settings.smallest_text else 4)
    flags = ["--output-prefix", settings.dataset, "--train-tokenizer", tokens]
    options = read([*map(str, (settings.folder, *flags)), "--append-eod", "--overwrite"])
    print(f"  {run(options, corpus).partition('\n')[0]}")


def run_once(
    file: Path,
    name: str,
    inputs: Mapping[str, object],
    outputs: Sequence[Path],
    make: Callable[[], None],
) -> str:
    """Run ``make`` unless the outputs are there and were made from the same inputs.

    ``file`` remembers what each step was made from: all that its outputs depend on, of JSON's
    types. A digest of it is returned, for the steps that depend on this one.
    """
    try:
        made = dict(json.loads(file.read_text()))
    except (FileNotFoundError, TypeError, ValueError):
        made = {}
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    if made.pop(name, None) == digest and all(path.exists() for path in outputs):
        print(f"{name}: already there ({outputs[0]}).")
        return digest
    write_whole(file, json.dumps(made, indent=1).encode())
    make()
    write_whole(file, json.dumps({**made, name: digest}, indent=1).encode())
    return digest
