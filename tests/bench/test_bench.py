"""``megatron-came bench``."""

import contextlib
import json
import re
import tempfile

import pytest
import torch

from megatron_came.bench import command, floors, timing
from megatron_came.bench.shapes import shapes_of


def test_gpt2_sizes():
    assert sum(a * b for a, *rest in shapes_of("gpt2-medium") for b in rest or [1]) == 354_871_296


@pytest.mark.parametrize("every_floor", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_a_step_is_timed_and_written(tmp_path, capsys, monkeypatch, every_floor):
    monkeypatch.setattr(floors, "_ELEMENTS", 1 << 20)
    floor = floors.seconds_per_parameter
    if not every_floor:  # which are loops that take seconds to compile, for each dtype anew
        monkeypatch.setattr(floors, "_PASSES", dict.fromkeys(floors._PASSES, (floors._adam,)))
        monkeypatch.setattr(
            floors, "seconds_per_parameter", lambda traffic, _: floor(traffic, torch.float32)
        )
    file = tmp_path / "results" / "one.json"
    options = ["--model", "nanogpt-char", "--layers", "1", "--steps", "1", "--device", "cpu"]
    assert command.main([*options, "--only", "came,", "adamw, fused", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    names = [one["name"] for one in report["results"]]
    came = [f"CAME, {what}" for what in ("fused", "bf16 momentum", "int8 momentum", "plain")]
    assert names == [*came, "torch AdamW, fused"]
    assert all(one["milliseconds"] > 0 for one in report["results"])
    assert report["machine"]["torch"]
    assert "times as long as CAME, fused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "lion"], "--only matches none of 'CAME, fused'"),
        (["--iteration", "--model", "llama-7b-layer"], "--iteration needs a whole model"),
        (["--", "--seq-length", "64"], "flags after -- are for --iteration alone"),
        (["gpt2-small"], "bench takes no gpt2-small: flags after --"),
    ],
)
def test_bad_options_are_one_sentence(options, message, capsys):
    assert command.main(["--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_anything_is_timed(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(timing, "measure", None)
    (tmp_path / "file").touch()
    for file, reason in ((tmp_path, "is a directory"), (tmp_path / "file" / "x", "exists|not a")):
        assert command.main(["--device", "cpu", "--json", str(file)]) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(
            rf"megatron-came bench: --json \S+ cannot be written \(.*({reason}).*\n", said
        )


@pytest.mark.parametrize("number", ["abc", "0", "-1", "1e3", "2.5"])
def test_what_is_no_number_is_said_without_names_of_functions(number, capsys):
    with pytest.raises(SystemExit):
        command.main(["--steps", number])
    assert f"argument --steps: '{number}' is no whole number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "9" * 20], "--steps: 99999999999999999999 is too large: give 1000000 at most"),
        (["--layers", "999999", "--device", "cpu"], "of 999999 layers needs about "),
    ],
)
def test_what_nothing_has_room_for_is_refused(options, said, capsys):
    with contextlib.suppress(SystemExit):
        assert command.main(options) == 2
    assert said in capsys.readouterr().err


def test_a_whole_iteration_is_timed_in_parts(tmp_path, capsys, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is to be found anew
    monkeypatch.setenv("MEGATRON_LOGGING_LEVEL", "40")  # the timers are logged below it
    file = tmp_path / "iteration.json"
    options = ["--iteration", "--model", "gpt2-small", "--layers", "1", "--steps", "2"]
    small = "--hidden-size 64 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32"
    options += ["--device", "cpu", "--json", str(file), "--", *small.split()]
    assert command.main(options) == 0
    came, adam = json.loads(file.read_text())["iterations"]
    assert (came["optimizer"], adam["optimizer"]) == ("came", "adam")
    for one in (came, adam):
        parts = [one[f"{part}_milliseconds"] for part in ("forward", "backward", "step")]
        assert min(parts) > 0
        assert sum(parts) < one["milliseconds"]
        assert one["iterations"] == 2
    left = [path.name for path in (tmp_path / "temporary").iterdir()]
    assert not [name for name in left if name.startswith(("torchelastic", "megatron_came"))]
    captured = capsys.readouterr()
    assert "backward  optimizer's step" in captured.out
    assert "Training: 100%" in captured.err
