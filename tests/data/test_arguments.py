"""The command line of ``megatron-came data``, and the flags of a launch that it prints."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from megatron_came.data import launch_flags
from megatron_came.data.tokenizer import Gpt2Bpe
from megatron_came.tools import cli
from tests.support.datasets import SOURCES, flags, needs_tokenizers, run


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--workers", "0"], "'0' is no number of processes: give 1 or more"),
            (["--workers", "9" * 30], "are too many processes: give 4096 at most"),
            (["--train-tokenizer", "9" * 14], "are too many tokens: give 10000000 at most"),
            (["--tokenizer-model", ""], "'' names no file or folder"),
            (["--validation", "1%"], "'1%' is no share: give one between 0 and 1"),
            (["--validation", "1"], "'1' is no share"),
            (["--separator", ""], "'' is no separator"),
            (["--train-tokenizer", "big"], "'big' is no number of tokens"),
            (["--output-prefix", "out/"], "'out/' has no file name: give one, as in out/text"),
            (["--output-prefix", "."], "'.' has no file name: give one, as in text"),
            (["--output-prefix", ".."], "'..' has no file name: give one, as in ../text"),
            (["--vocab", "vocab.json"], "is named otherwise: give --vocab-file FILE"),
            (["--dataset-impl", "lazy"], "datasets are written as its mmap alone: leave it out"),
        ],
    )
    def test_a_wrong_value(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        with pytest.raises(SystemExit):
            run("in.txt", "--output-prefix", "out", *arguments)
        assert message in capsys.readouterr().err

    def test_the_command_knows_it(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["megatron-came", "data", "--help"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        assert "--append-eod" in capsys.readouterr().out


class TestAdvice:
    def test_what_to_tell_megatron(
        self, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "a folder" / "set"
        arguments = [*SOURCES, "--output-prefix", out, "--tokenizer-model", model]
        assert run(*arguments) == 0
        assert flags_in(capsys.readouterr().out) == [
            *("--data-path", str(out), "--split", "100,0,0", "--eval-iters", "0"),
            *("--eval-interval", "1000"),
            *("--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", str(model)),
        ]
        assert run(*arguments, "--validation", 0.3) == 0
        assert flags_in(capsys.readouterr().out)[:4] == [
            *("--train-data-path", f"{out}_train", "--valid-data-path", f"{out}_valid"),
        ]

    @needs_tokenizers
    def test_gpt2_without_the_hub(
        self, tmp_path: Path, gpt2: Gpt2Bpe, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(*SOURCES, "--output-prefix", tmp_path / "out", *flags(gpt2)) == 0
        words = flags_in(capsys.readouterr().out)
        assert words[8:14] == ["--tokenizer-type", "GPT2BPETokenizer", *flags(gpt2)]
        size = gpt2.load().vocab_size
        assert words[14:] == ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size)]

    @pytest.mark.parametrize(
        ("vocabulary", "expected"),
        [
            (50257, "to 50304 rows; with tensor parallelism, 50432 at size 2, 50688 at size 4"),
            (32768, "to 32768 rows."),
        ],
    )
    def test_padding(self, vocabulary: int, expected: str) -> None:
        assert expected in launch_flags._padding(vocabulary)


def flags_in(printed: str) -> list[str]:
    """The words of the blocks that one is to copy."""
    blocks = re.findall(r"(?:^    .*\n)+", printed, re.MULTILINE)
    return [word for block in blocks for word in shlex.split(block) if word != "\n"]
