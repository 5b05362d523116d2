"""The quick start: parts and, once, the whole of it."""

import argparse
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_came.data.files import locked
from megatron_came.memory.optimizers import Components
from megatron_came.quickstart import command as command_line
from megatron_came.quickstart import prepare
from megatron_came.quickstart.prepare import run_once
from megatron_came.quickstart.report import check_same_start, summary
from megatron_came.quickstart.settings import OPTIMIZERS, Settings
from megatron_came.quickstart.train import Result
from megatron_came.terminal.pictures import draw_losses
from megatron_came.terminal.sentences import CommandError
from megatron_came.training_log import TrainingError, TrainingLog, choose_port, last_words

ROOT = Path(__file__).parents[2]

LINE = (
    " [2026-01-02 03:04:05.678901] iteration        7/     120 | consumed samples:          112 |"
    " elapsed time per iteration (ms): 658.0 | learning rate: 1.000000E-03 | global batch size:"
    "    16 | lm loss: 6.969738E+00 | loss scale: 1.0 | grad norm: 2.125 |"
    " number of skipped iterations:   0 | number of nan iterations:   0 |\n"
)

TORCHRUN = """\
E0102 03:04:05.678901 7 torch/distributed/elastic/multiprocessing/api.py:1] failed (exitcode: -9)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: worker FAILED
exitcode  : 1 (pid: 2500)
"""
FAILED = f"""\
[rank0]: Traceback (most recent call last):
[rank0]:   File "training.py", line 3, in <module>
[rank0]: ValueError: hidden size 255 cannot be split over 4 heads
[rank1]: RuntimeError: [gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:29857
{TORCHRUN}"""


class TestSettings:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ranks": 3}, "cannot be split over 3 ranks: take one of 1, 2, 4, 8, 16"),
            ({"ranks": 0}, "cannot be split over 0 ranks"),
            ({"iterations": 0}, "0 iterations are none"),
            ({"iterations": 10**18}, "iterations are too many: 1000000 at most"),
            ({"port": 70000}, "70000 is no port"),
        ],
    )
    def test_bad_values(self, change: dict[str, int], message: str) -> None:
        with pytest.raises(CommandError, match=message):
            Settings(**change)

    def test_only_the_optimizer_differs(self) -> None:
        adam, came = (set(Settings().megatron_flags(each)) for each in OPTIMIZERS)
        assert "--bf16" not in adam
        assert adam - came <= {"adam", *OPTIMIZERS[0].flags}


class TestText:
    def test_own_text_may_lie_in_the_folder_and_what_was_made_there_is_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = Settings(folder=tmp_path, text=(tmp_path,))
        made = [settings.result(OPTIMIZERS[0]), settings.run_folder(OPTIMIZERS[1]) / "log"]
        made += [settings.dataset.with_suffix(".idx"), tmp_path / "steps.json"]
        for path in [*made, tmp_path / "books" / "mine.txt"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("text")
        seen: list[Path] = []
        monkeypatch.setattr(prepare, "_make", lambda _, corpus: seen.extend(corpus.files))
        prepare.prepare(settings)
        assert seen == [tmp_path / "books" / "mine.txt"]
        named = replace(settings, text=(tmp_path / "steps.json",))
        prepare.prepare(named)
        assert seen[1:] == [tmp_path / "steps.json"]

    @pytest.mark.parametrize(("copies", "tokens"), [(1, 1024), (10, 4096)])
    def test_little_text_has_fewer_tokens(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: int, tokens: int
    ) -> None:
        (tmp_path / "notes.txt").write_text("word " * 40_000 * copies)
        asked: list[int] = []

        def note(options: argparse.Namespace, corpus: object) -> str:
            asked.append(options.train_tokenizer)
            return ""

        monkeypatch.setattr(prepare, "run", note)
        settings = Settings(folder=tmp_path / "q", text=(tmp_path / "notes.txt",))
        settings.folder.mkdir()
        prepare.prepare(settings)
        assert asked == [tokens]


class TestSteps:
    def test_a_step_is_skipped_until_its_inputs_change(self, tmp_path: Path) -> None:
        output, runs = tmp_path / "output", []

        def make() -> None:
            runs.append(1)
            output.touch()

        for inputs, expected in (({"a": 1}, 1), ({"a": 1}, 1), ({"a": 2}, 2)):
            run_once(tmp_path / "steps.json", "Step", inputs, [output], make)
            assert len(runs) == expected
        output.unlink()
        run_once(tmp_path / "steps.json", "Step", {"a": 2}, [output], make)
        assert len(runs) == 3

    def test_a_step_that_fails_is_done_again(self, tmp_path: Path) -> None:
        output = tmp_path / "output"
        output.touch()
        steps = tmp_path / "steps.json"
        run_once(steps, "Step", {}, [output], lambda: None)

        def fail() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_once(steps, "Step", {"new": 1}, [output], fail)
        runs: list[int] = []
        run_once(steps, "Step", {}, [output], lambda: runs.append(1))
        assert runs


class TestTrain:
    def test_a_line_of_the_log(self) -> None:
        log = TrainingLog()
        timer = "    optimizer-inner-step ...........................: (5.10, 6.12)\n"
        seen = [log.read(line) for line in (LINE, "[rank0]: iteration 7" + LINE, timer, "training")]
        assert seen == [True, True, False, False]
        assert TrainingLog().read(LINE.replace("lm loss: 6.969738E+00 |", ""))
        timers = {"optimizer-inner-step": [6.12]}
        assert log == TrainingLog([6.969738] * 2, [658.0] * 2, timers, iterations=120)

    def test_a_failure_is_told_by_its_cause(self) -> None:
        cause = "  ValueError: hidden size 255 cannot be split over 4 heads"
        assert last_words(FAILED.replace("-9", "1")) == cause
        refused = "usage: x [--y Y]\n                    [--z]\n"
        refused += "pretrain_gpt.py: error: argument --y: invalid int value: 'a'\n"
        assert last_words(refused) == "  error: argument --y: invalid int value: 'a'"
        trace = '  File "a.py", line 3, in f\n    assert a > 0, "b"\n           ^^^^^\n'
        assert last_words(f"{trace}AssertionError: b\n") == "  b"
        assert last_words(f"{trace}AssertionError\n") == (
            """  Megatron stops at 'assert a > 0, "b"'"""
        )
        assert last_words(f"one\n\ntwo\ntwo\n{TORCHRUN}").splitlines() == [
            "  one",
            "  two",
            "  The system killed it, most likely because memory ran out.",
        ]

    def test_a_port_in_use(self) -> None:
        with socket.socket() as taken:
            taken.bind(("", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(TrainingError, match=rf"Port {port} cannot be used \(address"):
                choose_port(port)
        assert choose_port(port) == port
        assert choose_port(None) > 0


def results() -> dict[str, Result]:
    adam = Components(16 * 2**20, 16 * 2**20, 0, 4 * 2**20, 4 * 2**20, 0)
    came = replace(adam, second_moment=2**18)
    return {
        "AdamW": Result([8.3] + [5.5] * 19, [5000.0] + [650.0] * 19, [8.0] * 20, adam, 4_000_000),
        "CAME": Result([8.3] + [5.25] * 19, [5000.0] + [660.0] * 19, [12.0] * 20, came, 4_000_000),
    }


class TestReport:
    def test_the_summary(self) -> None:
        assert summary(Settings(iterations=20), results(), "on the CPU").splitlines() == [
            "GPT-2 of 4.0 M weights, fp32, 20 iterations of 16 x 256 tokens, 2 ranks on the CPU",
            "",
            "                                  AdamW        CAME",
            "loss at the start                8.3000      8.3000   the same weights and data",
            "loss at the end                  5.5000      5.2500   mean of the last 10 iterations",
            "optimizer memory per rank      8.00 MiB    4.25 MiB",
            "  main weights                 0.00 MiB    0.00 MiB   fp32: they are the model's own",
            "  momentum                     4.00 MiB    4.00 MiB",
            "  second moment or factors     4.00 MiB    0.25 MiB   CAME has the factors",
            "time per step                    650 ms      660 ms   median",
            "  of it in the optimizer         8.0 ms     12.0 ms",
        ]

    def test_runs_that_start_elsewhere_are_an_error(self) -> None:
        runs = results()
        check_same_start(runs)
        runs["CAME"].losses[0] = 8.3001
        with pytest.raises(CommandError, match=r"AdamW 8.300000, CAME 8.300100"):
            check_same_start(runs)

    def test_results_are_saved_and_plotted(self, tmp_path: Path) -> None:
        runs = results()
        runs["CAME"].save(tmp_path / "came.json")
        assert Result.load(tmp_path / "came.json") == runs["CAME"]
        draw_losses({name: run.losses for name, run in runs.items()}, tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


class TestCommandLine:
    @pytest.fixture
    def refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
        """Runs the quick start in a folder q, which ends with a sentence: that."""

        def run(*arguments: object) -> str:
            words = ["--folder", str(tmp_path / "q"), *map(str, arguments)]
            assert command_line.main(words) == 1
            return capsys.readouterr().err

        return run

    def test_an_empty_file(self, tmp_path: Path, refused: Callable[..., str]) -> None:
        (tmp_path / "notes.txt").touch()
        assert refused("--text", tmp_path / "notes.txt") == (
            f"{tmp_path}/notes.txt is empty: put some text in, or name another file.\n"
        )

    def test_too_little_text(self, tmp_path: Path, refused: Callable[..., str]) -> None:
        (tmp_path / "notes.txt").write_text("word " * 1000)
        assert refused("--text", tmp_path / "notes.txt") == (
            "There are 5 kB of text, and the quick start needs 200 kB: name more or larger files.\n"
        )

    def test_a_folder_that_is_a_file(self, tmp_path: Path, refused: Callable[..., str]) -> None:
        (tmp_path / "q").touch()
        assert refused() == (
            f"{tmp_path}/q cannot be used (file exists): put that right, or choose another folder"
            " with --folder.\n"
        )

    def test_two_into_one_folder(self, tmp_path: Path) -> None:
        (tmp_path / "q").mkdir()
        with locked(tmp_path / "q" / "steps.json"):
            ended = subprocess.run(
                [sys.executable, "-m", "megatron_came.quickstart", "--folder", tmp_path / "q"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
        assert ended.returncode == 1
        assert f"q/steps.json is being written by process {os.getpid()} on" in ended.stderr


def test_the_whole(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_CAME_CPU", "1")
    letters = random.Random(1).choices("abcdefghijkl ", k=9000)
    (tmp_path / "a.txt").write_text("".join(letters))
    settings = Settings(
        folder=tmp_path / "quickstart",
        text=(tmp_path,),  # what is made there is none of it
        bf16=True,
        iterations=4,
        layers=1,
        hidden=32,
        heads=2,
        sequence=32,
        vocabulary=280,
        smallest_text=1,
    )
    command_line.run(settings, "on the CPU")
    printed = capfd.readouterr().out
    assert "2 ranks on the CPU" in printed
    assert f"Loss curves: {settings.folder / 'loss.png'}" in printed
    adam, came = (Result.load(settings.result(each)) for each in OPTIMIZERS)
    assert adam.losses[0] == came.losses[0]
    assert len(came.losses) == settings.iterations
    assert adam.memory.main_weights == came.memory.main_weights
    assert 2 * adam.weights <= adam.memory.main_weights < 2.5 * adam.weights
    assert adam.memory.momentum == came.memory.momentum == adam.memory.main_weights
    assert 0 < came.memory.second_moment < adam.memory.second_moment
    assert min(adam.step_milliseconds) > 0
    # Nothing is made a second time.
    command_line.run(settings, "on the CPU")
    assert capfd.readouterr().out.count("already there") == 3
