"""The arguments of ``megatron-came data``."""

import argparse
from functools import partial
from pathlib import Path

from megatron_came.data.folders import UnusableError, is_folder
from megatron_came.data.tokenizer import Gpt2Bpe, HuggingFace, SentencePiece, TokenizerFiles
from megatron_came.terminal.paths import named_path
from megatron_came.terminal.sentences import CommandError

# Flags of Megatron's tools/preprocess_data.py that have no meaning here, or another.
_MEGATRONS = {
    "--split-sentences": "documents are not cut into sentences: leave it out",
    "--keep-newlines": "texts are taken as they are, and not cut into sentences: leave it out",
    "--lang": "documents are not cut into sentences: leave it out",
    "--partitions": "the input is not cut: leave it out, and give --workers N",
    "--log-interval": "progress is shown in any case: leave it out",
    "--vocab-size": "the tokenizer says it: leave it out, or give --train-tokenizer SIZE",
    "--find-optimal-num-workers": "all cores are used: leave it out, or give --workers N",
    "--vocab": "GPT-2's file is named otherwise: give --vocab-file FILE",
    "--dataset-impl": "datasets are written as its mmap alone: leave it out",
    "--tiktoken-pattern": "tiktoken's files are not read: give --tokenizer-model FILE_OR_FOLDER",
}
_AS_HERE = {("--partitions", "1"), ("--dataset-impl", "mmap")}


def read(argv: list[str]) -> argparse.Namespace:
    """Read the arguments.

    Raises:
        SystemExit: They cannot be understood, or only help was asked for.
    """
    made = _parser()
    options = made.parse_args(argv)
    for flag, instead in _MEGATRONS.items():
        value = getattr(options, flag[2:].replace("-", "_"))
        if value is not None and (flag, *value) not in _AS_HERE:
            made.error(f"{flag} is of Megatron's tools/preprocess_data.py, and here {instead}")
    if len(options.json_keys or ()) > 1:
        made.error(
            f"--json-keys {' '.join(options.json_keys)}: a dataset is made of one key, so run this"
            " once for each, with --json-key KEY and an --output-prefix of its own"
        )
    options.json_key = (options.json_keys or [options.json_key])[0]
    options.inputs = [*options.named, *options.input]
    if not options.inputs:
        made.error("name the input: text files, JSON Lines, or folders of them")
    return options


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="megatron-came data",
        description="Make a dataset that Megatron trains on: PREFIX.bin and PREFIX.idx, the same"
        " bytes as those of Megatron's tools/preprocess_data.py. They appear when they are whole.",
    )
    add = made.add_argument
    help = "text files, JSON Lines, either with .gz, .bz2 or .xz, or folders of them"
    add("named", nargs="*", type=named_path, metavar="INPUT", help=help)
    help = "where to write; with --validation, PREFIX_train and PREFIX_valid"
    add("--output-prefix", type=_prefix, required=True, metavar="PREFIX", help=help)
    add("--overwrite", action="store_true", help="replace what is there under these names")
    help = "processes, at most eight a core (one a core, fewer for little text)"
    add("--workers", type=partial(_number, 1, 4096, "processes"), metavar="N", help=help)

    add = made.add_argument_group("tokenizer, one of these").add_argument
    help = "train SentencePiece on the input, with SIZE tokens, and write PREFIX.model"
    add("--train-tokenizer", type=partial(_number, 2, 10**7, "tokens"), metavar="SIZE", help=help)
    help = "a SentencePiece model, or a folder with a Hugging Face tokenizer"
    add("--tokenizer-model", type=named_path, metavar="PATH", help=help)
    add("--vocab-file", type=named_path, metavar="FILE", help="GPT-2's vocab.json, and")
    add("--merge-file", type=named_path, metavar="FILE", help="GPT-2's merges.txt")
    kinds = [kind.megatron_type for kind in (SentencePiece, Gpt2Bpe, HuggingFace)]
    help = "Megatron's name for it, as a check; the files say it already"
    add("--tokenizer-type", choices=kinds, metavar="TYPE", help=help)

    add = made.add_argument_group("documents").add_argument
    help = "auto: JSON Lines if the name ends in .jsonl, .ndjson or .json, a .gz, .bz2 or .xz"
    help += " aside, else text"
    add("--format", choices=["auto", "text", "jsonl"], default="auto", help=help)
    add("--json-key", default="text", metavar="KEY", help="where JSON has the text (%(default)s)")
    help = r"what stands between documents of a text file, as in '\n\n' or '<|endoftext|>';"
    help += " without it a file is one document"
    add("--separator", type=_separator, metavar="TEXT", help=help)
    add("--append-eod", action="store_true", help="end each document with the token for that")
    help = "share of the documents for validation, as in 0.01, drawn by their text"
    add("--validation", type=_share, default=0.0, metavar="SHARE", help=help)
    help = "leave out and count what cannot be used, instead of stopping at it"
    add("--skip-faulty", action="store_true", help=help)

    # What Megatron's own script has and this command names otherwise, or does anyway.
    add("--input", nargs="+", action="extend", type=named_path, default=[], help=argparse.SUPPRESS)
    add("--json-keys", nargs="+", help=argparse.SUPPRESS)
    add("--keep-sequential-samples", action="store_true", help=argparse.SUPPRESS)
    for flag in _MEGATRONS:
        add(flag, nargs="*", help=argparse.SUPPRESS)
    return made


def _prefix(value: str) -> Path:
    if Path(value).name in ("", "..") or value.endswith("/"):
        raise argparse.ArgumentTypeError(
            f"{value!r} has no file name: give one, as in {Path(value) / 'text'}"
        )
    return Path(value).absolute()


def _number(least: int, most: int, what: str, value: str) -> int:
    number = int(value) if value.isdecimal() else -1
    if number < least:
        raise argparse.ArgumentTypeError(f"{value!r} is no number of {what}: give {least} or more")
    if number > most:
        raise argparse.ArgumentTypeError(f"{value} are too many {what}: give {most} at most")
    return number


def _share(value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is no share: give one between 0 and 1")
    return share


def _separator(value: str) -> str:
    r"""Read escapes such as \n, which a shell passes on as they are."""
    try:
        text = value.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise argparse.ArgumentTypeError(
            f"{value!r} is no separator: give some text, in which \\n is a new line"
        )
    return text


def named_tokenizer(options: argparse.Namespace) -> TokenizerFiles | None:
    """Tell from the flags which tokenizer is meant; None if one is to be trained.

    Raises:
        CommandError: They name none, or more than one.
    """
    gpt2 = options.vocab_file or options.merge_file
    if sum(map(bool, (gpt2, options.tokenizer_model, options.train_tokenizer))) != 1:
        raise CommandError(
            "Name one tokenizer: --train-tokenizer SIZE, --tokenizer-model FILE_OR_FOLDER, or"
            " --vocab-file FILE with --merge-file FILE."
        )
    tokenizer: TokenizerFiles | None = None
    if gpt2:
        if not (options.vocab_file and options.merge_file):
            raise CommandError("GPT-2's BPE is two files: give both --vocab-file and --merge-file.")
        tokenizer = Gpt2Bpe(options.vocab_file.absolute(), options.merge_file.absolute())
    elif options.tokenizer_model:
        try:
            kind = HuggingFace if is_folder(options.tokenizer_model) else SentencePiece
        except UnusableError as error:
            raise CommandError(
                f"--tokenizer-model {options.tokenizer_model} {error.reason}: name a SentencePiece"
                " model, or a folder with a Hugging Face tokenizer."
            ) from error
        tokenizer = kind(options.tokenizer_model.absolute())
    implied = (tokenizer or SentencePiece).megatron_type
    if options.tokenizer_type not in (None, implied):
        raise CommandError(
            f"--tokenizer-type {options.tokenizer_type} does not fit the other flags, which say"
            f" {implied}: leave it out, or change the others."
        )
    return tokenizer
