"""Texts, and what tests of ``megatron-came data`` do with them: run it, and read what it made."""

import importlib.util
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_came.data import command
from megatron_came.data.corpus import Corpus
from megatron_came.data.tokenizer import GPT2_END, Gpt2Bpe, HuggingFace, SentencePiece

ROOT = Path(__file__).parents[2]
LIBRARY = Path(json.__file__).parent  # a dozen documents of Python
SOURCES = sorted([*LIBRARY.glob("*.py"), *(LIBRARY.parent / "email").glob("*.py")])
TEXTS = [path.read_text(encoding="utf-8") for path in SOURCES]
AWKWARD = [
    "",
    " ",
    "  two  spaces\t\n\n",
    "\r\n",
    "ünïcode 漢字 \u2028 \u0000 ﬁ e\u0301 ☯ ▁",
    f"a{GPT2_END}b </s> <s> <unk>",
    "x" * 20_000,
]

needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="the package tokenizers is missing"
)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the package transformers is missing"
)


def words(count: int, seed: int = 0) -> str:
    generator = random.Random(seed)
    syllables = ["ca", "me", "ro", "ti", "lu", "no", "ki", "sa"]
    return " ".join(
        "".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(count)
    )


def flags(tokenizer: SentencePiece | Gpt2Bpe | HuggingFace) -> list[str]:
    return [word for flag in tokenizer.flags() for word in flag]


def write_json(path: Path, texts: list[str]) -> Path:
    """Writes JSON Lines, half of them with everything escaped."""
    lines = [
        json.dumps({"text": text, "id": index}, ensure_ascii=index % 2 == 0)
        for index, text in enumerate(texts)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs the command, which must fail with one sentence, and returns that."""
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("megatron-came data: ")
    assert last.endswith(".")
    assert "Traceback" not in captured.err
    return last.removeprefix("megatron-came data: ")


def documents(prefix: Path) -> list[list[int]]:
    """The tokens of each document, empty ones included."""
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices
    return [
        [int(token) for item in range(start, end) for token in dataset[item]]
        for start, end in pairwise(bounds)
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def texts_and_lines(folder: Path, **options: bool) -> tuple[list[str], list[str]]:
    corpus = Corpus.from_paths([folder], **options)
    return list(corpus), corpus.skipped.lines()
