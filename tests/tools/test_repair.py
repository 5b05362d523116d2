"""``repair`` makes main weights anew, in a copy, and says what is lost."""

import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_came.checkpoint_files.folder import find, opened
from megatron_came.core import records
from megatron_came.tools import inspect, repair
from megatron_came.tools.checkpoints import repairing
from tests.support.stored_checkpoints import (
    STATE,
    WEIGHT,
    common,
    record_of,
    tensors,
    write_distributed,
    write_legacy,
)

MAIN, MOMENTUM = f"{STATE}param.{WEIGHT}", f"{STATE}exp_avg.{WEIGHT}"


def shifted(dtype=torch.float32):
    """A model of a dtype, of whose first tensor the last layer's optimizer state is shifted."""
    right = tensors()
    for name in (WEIGHT, "final.bias"):
        right[name] = right[name].to(dtype)
    state = {name: tensor.clone() for name, tensor in right.items()}
    for name in (MAIN, MOMENTUM):
        state[name][1] = right[name][1].flatten().roll(5).view(6, 4)
    return right, state


def write(root, state, record=None):
    more = {} if record is None else {records.KEY: record}
    return write_distributed(root, state, common_state=common(**more))


def contents(folder: Path):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(folder: Path, state):
    """The tensors as PyTorch itself reads them."""
    found = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    load(found, checkpoint_id=folder, no_dist=True)
    return found


@pytest.mark.parametrize("has_record", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_shifted_is_made_anew(tmp_path, capsys, dtype, has_record):
    right, state = shifted(dtype)
    folder = write(tmp_path / "save", state, record_of(right) if has_record else None)
    before = contents(folder)
    assert inspect.main([str(tmp_path / "save"), "--verify"]) == 1
    capsys.readouterr()
    assert repair.main([str(tmp_path / "save"), str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert contents(folder) == before
    named = str(dtype).removeprefix("torch.")
    first, last = said.splitlines()
    assert first.startswith(f"repaired: {WEIGHT} from [1, 0, 0] on (")
    assert first.endswith(
        f"main weights are the model's {named} weights, momentum is lost and begins at zero"
    )
    assert "24 main weights made anew, in 1 parts, of which 1 have lost their momentum" in last

    expected = {name: tensor.clone() for name, tensor in right.items()}
    expected[MAIN][1] = right[WEIGHT][1].float()
    expected[MOMENTUM][1] = 0
    new = find(tmp_path / "new").path
    for name, tensor in loaded(new, state).items():
        assert torch.equal(tensor, expected[name]), name
    assert inspect.main([str(tmp_path / "new"), "--verify"]) == 0
    assert ("It is sound." in capsys.readouterr().out) == has_record
    with opened(find(tmp_path / "new")) as checkpoint:
        for tensor in checkpoint.tensors:
            for chunk in tensor.chunks:
                data = chunk.item.file.read_bytes()[chunk.item.start :][: chunk.item.length]
                assert zipfile.ZipFile(BytesIO(data)).testzip() is None


def test_momentum_that_is_proved_is_kept(tmp_path, capsys):
    right, state = shifted()
    state[MOMENTUM] = right[MOMENTUM].clone()
    write(tmp_path / "save", state, record_of(right))
    assert repair.main([str(tmp_path / "save"), str(tmp_path / "new")]) == 0
    assert "momentum is lost" not in capsys.readouterr().out
    new = loaded(find(tmp_path / "new").path, state)
    assert torch.equal(new[MOMENTUM], right[MOMENTUM])
    assert torch.equal(new[MAIN], right[WEIGHT])


def test_what_cannot_be_told_from_its_neighbours_is_lost_too(tmp_path, capsys):
    """Where all weights are alike, a shift would not be seen in them, and momentum may be wrong."""
    _, state = shifted(torch.bfloat16)
    state["final.bias"] = torch.ones(6, dtype=torch.bfloat16)
    state[f"{STATE}param.final.bias"] = torch.ones(6) + 1e-3
    write(tmp_path / "save", state)
    assert repair.main([str(tmp_path / "save"), str(tmp_path / "new")]) == 0
    assert "all alike" in capsys.readouterr().out
    new = loaded(find(tmp_path / "new").path, state)
    assert not new[f"{STATE}exp_avg.final.bias"].any()
    assert torch.equal(new[f"{STATE}param.final.bias"], torch.ones(6))


def test_momentum_that_is_not_finite_begins_at_zero(tmp_path, capsys):
    state = tensors()
    state[MOMENTUM][0, 2, 3] = float("nan")
    write(tmp_path / "save", state)
    assert repair.main([str(tmp_path / "save"), str(tmp_path / "new")]) == 0
    assert "its momentum was not finite): momentum is lost" in capsys.readouterr().out
    new = loaded(find(tmp_path / "new").path, state)
    assert not new[MOMENTUM][0].any()
    assert torch.equal(new[MOMENTUM][1], state[MOMENTUM][1])
    assert torch.equal(new[MAIN], state[MAIN])


def damaged_weights(root):
    right, state = shifted()
    state[WEIGHT][0, 0, 0] += 1
    write(root, state, record_of(right))


def damaged_factors(root):
    _, state = shifted()
    state[f"{STATE}exp_avg_sq.final.bias"][0] = -1
    write(root, state)


def of_adam(root):
    state = common()
    state["args"].optimizer = "adam"
    write_distributed(root, shifted()[1], common_state=state)


def without_main_weights(root):
    write(root, {name: each for name, each in tensors().items() if "param" not in name})


def foreign(root):
    write_distributed(root, objects={"rng_state/shard_0_1": b"no archive"})


REFUSED = {
    "nothing": (lambda root: write(root, tensors()), "is not damaged, so nothing was written"),
    "weights": (damaged_weights, "is damaged beyond its main weights"),
    "factors": (damaged_factors, "is damaged beyond its main weights"),
    "adam": (of_adam, "is of --optimizer adam, whose other state is lost"),
    "legacy": (write_legacy, "is of --ckpt-format torch"),
    "no main weights": (without_main_weights, "holds no main weights by name"),
    "foreign": (foreign, "is damaged beyond its main weights"),
    "empty": (Path.mkdir, "holds no checkpoint of Megatron"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_repaired(tmp_path, capsys, name):
    make, what = REFUSED[name]
    make(tmp_path / "save")
    assert repair.main([str(tmp_path / "save"), str(tmp_path / "new")]) == 1
    said = capsys.readouterr()
    assert what in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    write(tmp_path / "save", shifted()[1])
    assert repair.main([str(tmp_path / "save"), str(tmp_path / "save")]) == 1
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert repair.main([str(tmp_path / "save"), str(tmp_path / "file" / "x")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_half_a_copy_does_not_stay(tmp_path, capsys, monkeypatch, error):
    """As the next run would refuse to write there."""

    def apply(_):
        assert any(path.is_file() for path in (tmp_path / "new").rglob("*"))
        raise error

    write(tmp_path / "save", shifted()[1])
    monkeypatch.setattr(repairing, "apply", apply)
    if isinstance(error, OSError):
        assert repair.main([str(tmp_path / "save"), str(tmp_path / "new")]) == 1
        assert "cannot be written" in capsys.readouterr().err
    else:
        with pytest.raises(KeyboardInterrupt):
            repair.main([str(tmp_path / "save"), str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
