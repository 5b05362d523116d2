"""``compare`` and ``plot``: the same start for all, what is kept, shown and refused."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_came.compare import command, experiment, runs, tasks
from megatron_came.compare.optimizers import parse, state_bytes
from megatron_came.compare.presets import PRESETS
from megatron_came.terminal.sentences import CommandError
from megatron_came.tools import plot

QUICK = ["betas", "--optimizers", "adamw", "came+bias-correction", "--iterations", "20"]
T_OF_THREE = 4.302653  # Student's, 97.5%, two degrees of freedom


def compare(folder, *words):
    return command.main([*QUICK, "--output", str(folder), *map(str, words)])


def kept(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("compare") / "runs"
    assert compare(made, "--rates", 1e-3, 1e-2) == 0
    return made


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{number * 7919 % 1000} and {number}\n" for number in range(9000)))
    return file


def losses_of(*run):
    losses = []
    runs.train(*run, lambda _, loss: losses.append(loss))
    return losses


class TestRuns:
    @pytest.mark.parametrize("task", ["gpt", "bert", "regression"])
    def test_all_of_a_seed_start_alike(self, task, text):
        preset = next(each for each in PRESETS.values() if each.task == task)
        names = ("adamw", "came", "came+int8", "came+cautious", "adafactor", "sgd")
        made = tasks.TASKS[task](preset, [text] if task != "regression" else [])
        firsts = {}
        for seed in (1, 2):
            for name in names:
                key = runs.Key(name, 1e-3, seed, 4)
                losses = losses_of(made, replace(preset, iterations=2), parse(name), key)
                firsts.setdefault(seed, []).append(losses)
        for mine in firsts.values():
            assert len({losses[0] for losses in mine}) == 1
            assert len({losses[1] for losses in mine}) > 1
        assert firsts[1][0][0] != firsts[2][0][0]

    def test_what_is_held_out_is_not_trained_on(self, text):
        made = tasks.TASKS["gpt"](PRESETS["nano"], [text])
        seen, _ = made.draw(2000, torch.Generator().manual_seed(1))
        lines = {bytes(row.tolist()) for row in seen}
        assert not {bytes(row.tolist()) for row in made.held_out[0]} & lines

    def test_bytes_are_those_of_the_tensors(self):
        model = torch.nn.Linear(64, 32, bias=False)
        found = {}
        for name in ("sgd", "adamw", "came", "came+int8", "adafactor"):
            built = parse(name).build(model, (0.9, 0.95, 0.995))
            model(torch.ones(1, 64)).sum().backward()
            for optimizer in built:
                optimizer.step()
            found[name] = state_bytes(built)
        size, factors = 64 * 32, 4 * (64 + 32)
        assert found == {
            "sgd": 4 * size,
            "adamw": 8 * size + 4,  # its step is a tensor
            "came": 4 * size + 2 * factors,
            "came+int8": size + 4 * size // 256 + 2 * factors,
            "adafactor": factors + 4,
        }

    def test_muon_takes_matrices_and_adamw_the_rest(self):
        if parse("muon").missing:
            pytest.skip(parse("muon").missing)
        model = tasks.Transformer(PRESETS["nano"], 64, 256)
        built = parse("muon").build(model, (0.9, 0.95, 0.995))
        taken = [
            param for each in built for group in each.param_groups for param in group["params"]
        ]
        assert {id(param) for param in taken} == {id(param) for param in model.parameters()}
        assert len(taken) == len(list(model.parameters()))
        assert model.embed.weight is taken[-1] or any(
            param is model.embed.weight for param in built[1].param_groups[0]["params"]
        )

    def test_one_that_diverges_ends(self, tmp_path, capsys):
        words = ["--optimizers", "sgd", "--rates", "1e8", "--seeds", "1"]
        assert compare(tmp_path / "runs", *words) == 0
        (run,) = kept(tmp_path / "runs")
        assert run["diverged"]
        assert "diverged (1 of 1)" in (tmp_path / "runs" / "results.md").read_text()


class TestFolder:
    def test_tables_are_those_of_the_runs(self, folder):
        found = {}
        for run in kept(folder):
            cell = found.setdefault((run["optimizer"], run["rate"]), {})
            cell[run["seed"]] = run["curve"][-1][3]
        assert len(found) == 4
        with (folder / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 4
        for row in rows:
            losses = list(found[row["optimizer"], float(row["rate"])].values())
            mean = sum(losses) / 3
            half = T_OF_THREE * math.sqrt(sum((x - mean) ** 2 for x in losses) / 2 / 3)
            assert float(row["final"]) == pytest.approx(mean)
            assert float(row["final_95%"]) == pytest.approx(half, rel=1e-4)
        page = (folder / "results.md").read_text()
        best = {
            name: min(
                (sum(cell.values()) / 3, rate) for (n, rate), cell in found.items() if n == name
            )
            for name in ("adamw", "came+bias-correction")
        }
        for name, (mean, rate) in best.items():
            (line,) = [x for x in page.splitlines() if x.startswith(f"| {name} | 32 | {rate:g} |")]
            assert f"{mean:.4f} ±" in line
        base, other = (found[name, best[name][1]] for name in best)
        off = [other[seed] - base[seed] for seed in (1, 2, 3)]
        mean = sum(off) / 3
        half = T_OF_THREE * math.sqrt(sum((x - mean) ** 2 for x in off) / 2 / 3)
        assert f"| {mean:.4f} ± {half:.4f} |" in line
        for name in ("step", "time", "rate"):
            assert (folder / f"loss-by-{name}.png").read_bytes().startswith(b"\x89PNG")

    def test_what_is_finished_is_not_repeated(self, folder, monkeypatch):
        trained = []
        real = runs.train

        def train(task, preset, contender, key, *told):
            if told:
                trained.append(key)
            return real(task, preset, contender, key, *told)

        monkeypatch.setattr(experiment, "train", train)
        before = kept(folder)
        assert compare(folder, "--rates", 1e-3, 1e-2) == 0
        assert trained == []
        # As if it had been killed while it wrote the last line.
        file = folder / "runs.jsonl"
        file.write_text(file.read_text()[:-30])
        assert compare(folder, "--rates", 1e-3, 1e-2) == 0
        last = before[-1]
        (key,) = trained
        assert asdict(key).items() <= last.items()
        after = kept(folder)
        assert [run["curve"][-1][3] for run in after] == [run["curve"][-1][3] for run in before]

    def test_other_settings_are_refused(self, folder, capsys):
        assert compare(folder, "--iterations", 30) == 2
        assert capsys.readouterr().err.endswith(
            f"{folder} holds runs with iterations 20, not 30: name another folder with --output.\n"
        )

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda lines: [lines[0], "x", *lines[2:]], "runs.jsonl, line 2, is not what"),
            (lambda lines: [lines[0].replace('"rate"', '"rote"')], "runs.jsonl, line 1, is not"),
            (lambda lines: [re.sub(r'"curve": .*\]\]', '"curve": []', lines[0])], "line 1, is not"),
            (None, "holds runs of unknown settings, since settings.json is gone"),
        ],
        ids=["no JSON", "other names", "no losses", "settings"],
    )
    def test_damage_is_said(self, folder, tmp_path, capsys, damage, said):
        mine = shutil.copytree(folder, tmp_path / "runs")
        if damage is None:
            (mine / "settings.json").unlink()
        else:
            lines = (mine / "runs.jsonl").read_text().splitlines()
            (mine / "runs.jsonl").write_text("\n".join(damage(lines)) + "\n")
        assert compare(mine, "--rates", 1e-3, 1e-2) == 2
        assert said in capsys.readouterr().err

    def test_what_is_said_twice_is_done_once(self, tmp_path):
        assert compare(tmp_path, "--rates", 1e-3, 1e-3, "--seeds", 1, "--batches", 8, 8) == 0
        assert len(kept(tmp_path)) == 2

    def test_an_interrupted_one_goes_on(self, tmp_path):
        words = [sys.executable, "-m", "megatron_came", "compare", *QUICK[:-1], "120"]
        words += ["--rates", "1e-3", "--output", str(tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
            file = tmp_path / "runs.jsonl"
            while not (file.exists() and file.read_text()):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            assert process.stderr.read() == (
                "megatron-came compare: interrupted: run it again to go on after the last finished"
                " run.\n"
            )
        assert process.returncode == 130
        finished = file.read_text()
        assert finished.count("\n") < 6
        assert subprocess.run(words, env=environment, check=False).returncode == 0
        assert len(kept(tmp_path)) == 6
        assert file.read_text().startswith(finished[: finished.rfind("\n") + 1])


REFUSED = [
    (["gpt2-medium"], "The preset gpt2-medium needs a GPU, and PyTorch sees none here: take nano."),
    (["nano", "--optimizers", "adam"], "adam is no optimizer here: take one of came, adamw,"),
    (["nano", "--optimizers", "came+int8+bf16"], "int8 and bf16 contradict each other"),
    (
        ["nano", "--optimizers", "came+no-confidence+beta3=0.9"],
        "no-confidence and beta3 contradict each other",
    ),
    (["nano", "--optimizers", "came+cautious+cautious"], "says cautious twice"),
    (["nano", "--optimizers", "adamw+cautious"], "adamw has no option cautious; it has beta2."),
    (["nano", "--optimizers", "came+beta2=1"], "beta2=1 is not allowed: give beta2 in [0, 1)."),
    (["nano", "--optimizers", "came+int8=2"], "int8 takes no value: leave out =2."),
    (["nano", "--rates", "0"], "--rates 0.0 is not allowed"),
    (["nano", "--rates", "nan"], "--rates nan is not allowed"),
    (["nano", "--seeds", "0"], "--seeds 0 is not allowed"),
    (["nano", "--batches", "-4"], "--batches -4 is not allowed"),
    (["nano", "--batches", f"{10**12}"], "--batches 1000000000000 is not allowed: give 65536 at"),
    (["nano", "--seeds", f"{10**9}"], "--seeds 1000000000 is not allowed: give 1000 at most."),
    (["nano", "--iterations", f"{10**9}"], "--iterations 1000000000 is not allowed"),
    (["betas", "--text", "x"], "The preset betas reads no text: leave out --text."),
    (["nano", "--text", "/none"], "/none does not exist: name a text file or a folder of them."),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_it_is_refused_before_anything_is_trained(words, sentence, tmp_path, capsys, monkeypatch):
    if words[0] == "gpt2-medium":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(experiment, "train", None)
    assert command.main([*words, "--output", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("megatron-came compare: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_package_that_is_missing(tmp_path, capsys, monkeypatch):
    for module in ("lion_pytorch", "emerging_optimizers", "emerging_optimizers.scalar_optimizers"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert parse("lion").missing
    assert compare(tmp_path / "runs", "--optimizers", "lion") == 2
    assert "lion is in none of the installed packages: pip install" in capsys.readouterr().err
    with pytest.raises(CommandError, match=r"scikit-learn, which is not installed: pip install"):
        tasks.TASKS["image"](PRESETS["image"], [])


class TestPresets:
    @pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
    def test_their_optimizers_are_known(self, preset):
        assert preset.task in tasks.TASKS
        assert [parse(name).name for name in preset.optimizers] == list(preset.optimizers)
        assert len(set(preset.optimizers)) == len(preset.optimizers)

    def test_nano_full_is_what_it_is_called(self):
        full = PRESETS["nano-full"]
        assert len(full.optimizers) >= 5
        assert full.seeds >= 3
        assert full.batches == (4, 16, 64)
        assert all(len(parse(name).rates) >= 4 for name in full.optimizers)


class TestPlot:
    def run(self, folder: Path, offset=0.0):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(folder) as writer:
            for step in range(1, 5):
                writer.add_scalar("params-norm", 2.0, step)
                writer.add_scalar("lm loss", 5.0 - step + offset, step)
                writer.add_scalar("lm loss vs samples", 5.0 - step, 16 * step)
                writer.add_scalar("learning-rate", step / 10, step)
        return folder

    def test_scalars_are_drawn(self, tmp_path, capsys, monkeypatch):
        one, two = self.run(tmp_path / "one"), self.run(tmp_path / "two", 1.0)
        found = plot.scalars(two)
        assert found["lm loss"][:2] == ([1, 2, 3, 4], [5.0, 4.0, 3.0, 2.0])
        assert plot.names_of([found], []) == ["lm loss", "learning-rate", "params-norm"]
        assert plot.names_of([found], ["norm", "rate"]) == ["learning-rate", "params-norm"]
        picture = tmp_path / "runs.png"
        assert plot.main([str(one), str(two), "--output", str(picture)]) == 0
        assert capsys.readouterr().out == f"3 scalars of 2 runs: {picture}\n"
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_a_log_that_cannot_be_read_is_not_the_pictures_fault(
        self, tmp_path, capsys, monkeypatch
    ):
        def denied(run):
            raise PermissionError(13, "Permission denied", str(run / "events"))

        monkeypatch.setattr(plot, "scalars", denied)
        assert plot.main([str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path / 'events'} cannot be used (permission denied): let the user of" in said
        assert "--output" not in said

    def test_what_cannot_be_drawn(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        run = self.run(tmp_path / "many" / "one")
        self.run(tmp_path / "many" / "two")
        for words, sentence in (
            ([tmp_path / "empty"], "empty holds no TensorBoard logs: name the --tensorboard-dir"),
            ([tmp_path / "none"], "none is no folder: name the --tensorboard-dir"),
            ([tmp_path / "many"], "many holds the logs of several runs: name"),
            ([run, "--scalars", "lost"], "No scalar has lost: there are params-norm, lm loss"),
            ([run, "--output", tmp_path / "no" / "x.png"], "x.png cannot be written (no such file"),
            ([run, "--output", tmp_path / "x.txt"], "x.txt cannot be written (format 'txt' is not"),
        ):
            assert plot.main(list(map(str, words))) == 2
            said = capsys.readouterr().err
            assert sentence in said
            assert said.startswith("megatron-came plot: ")
            assert said.count("\n") == 1
