"""``inspect --verify`` proves sound checkpoints, and names what is damaged in a sentence."""

import argparse
import math
import pickle
import shutil
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_came.checkpoint_files import pickles
from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.checkpoint_files.torch_dist import read_layout
from megatron_came.core import digests, int8, records
from megatron_came.tools import inspect
from megatron_came.tools.checkpoints.proofs import unlike
from tests.support.stored_checkpoints import (
    STATE,
    WEIGHT,
    common,
    record_of,
    saved,
    tensors,
    write_distributed,
    write_legacy,
)


def verify(root, capsys, status):
    """Run the command; returns all that it said."""
    assert inspect.main([str(root), "--verify"]) == status
    said = capsys.readouterr()
    if status != 1:
        assert said.err == ""
    return said.out.replace("\n    ", " ") + said.err  # a line is a line, however many it takes


def write(root, state=None, **more):
    """A checkpoint whose record is that of what should be in it."""
    whole = common(**{records.KEY: record_of(tensors())})
    return write_distributed(root, state, common_state=whole, **more)


def test_sound_checkpoints_are_proved(tmp_path, capsys):
    write(tmp_path)
    said = verify(tmp_path, capsys, 0)
    assert "All 18 tensors that it has digests of are what was saved.\nIt is sound.\n" in said


def test_without_digests_nothing_is_proved(tmp_path, capsys):
    write_distributed(tmp_path)
    said = verify(tmp_path, capsys, 0)
    assert "It holds no digests" in said
    assert "No damage was found.\n" in said
    assert "is sound" not in said


def changed(name, change):
    """The tensors, of which one is changed."""
    state = tensors()
    state[name] = change(state[name].clone())
    return state


def flip(tensor):
    """The last bit of the last element."""
    bits = tensor.reshape(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    bits[-1] ^= 1
    return tensor


def fill(value):
    def change(tensor):
        tensor.reshape(-1)[1] = value
        return tensor

    return change


@pytest.mark.parametrize("has_record", [True, False])
@pytest.mark.parametrize(
    ("name", "change", "what", "is_seen_without"),
    [
        (WEIGHT, flip, f"weights of {WEIGHT}[1] in __1_0.distcp is not what was saved", True),
        (f"{STATE}param.{WEIGHT}", flip, f"main weights of {WEIGHT}[1]", True),
        (f"{STATE}exp_avg.{WEIGHT}", flip, f"momentum of {WEIGHT}[1] in __1_0.distcp", False),
        (f"{STATE}exp_avg_sq_row.{WEIGHT}", flip, f"exp_avg_sq_row of {WEIGHT}[1]", False),
        (f"{STATE}exp_avg_sq.final.bias", flip, "exp_avg_sq of final.bias", False),
        (f"{STATE}exp_avg.{WEIGHT}", fill(math.nan), "1 NaN and 0 infinite", True),
        (f"{STATE}exp_avg_res_col.{WEIGHT}", fill(math.inf), "0 NaN and 1 infinite", True),
        (f"{STATE}exp_avg_sq.final.bias", fill(-1.0), "1 negative elements", True),
        (f"{STATE}exp_avg_sq_row.{WEIGHT}", torch.Tensor.long, "is int64, and should be", True),
        (f"{STATE}exp_avg_sq_row.{WEIGHT}", torch.Tensor.bfloat16, "is bfloat16, and should", True),
        (f"{STATE}exp_avg_sq_row.{WEIGHT}", lambda t: t[:, :5], "has shape (2, 5), and", True),
        (f"{STATE}exp_avg.{WEIGHT}", lambda t: t[:1], "has shape (1, 6, 4), and should", True),
        (f"{STATE}exp_avg.final.bias", torch.Tensor.half, "is float16, and should be", True),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(
    tmp_path, capsys, name, change, what, is_seen_without, has_record
):
    state = changed(name, change)
    if has_record:
        write(tmp_path, state)
        assert what in verify(tmp_path, capsys, 1)
        return
    write_distributed(tmp_path, state)
    said = verify(tmp_path, capsys, int(is_seen_without))
    if is_seen_without and "digest" not in what and what[0] not in "wm":
        assert what in said


@pytest.mark.parametrize("has_record", [True, False])
def test_a_mask_of_infinities_is_not_damaged(tmp_path, capsys, has_record):
    state = tensors() | {"mask": torch.tensor([0.0, -math.inf, math.nan])}
    whole = common(**({records.KEY: record_of(state)} if has_record else {}))
    write_distributed(tmp_path, state, common_state=whole)
    verify(tmp_path, capsys, 0)
    state |= {"final.bias": torch.full((6,), math.inf)}
    write_distributed(tmp_path / "trained", state)
    assert "final.bias in __0_0.distcp" in verify(tmp_path / "trained", capsys, 1)


def test_shifted_main_weights_are_seen_without_digests(tmp_path, capsys):
    name = f"{STATE}param.{WEIGHT}"
    write_distributed(tmp_path, changed(name, lambda t: t.reshape(-1).roll(1).view(t.shape)))
    said = verify(tmp_path, capsys, 1)
    assert f"damaged: {name} in __0_0.distcp: 24 of 24 elements are not those" in said
    assert f"megatron-came repair {tmp_path / 'iter_0000004'} OUTPUT" in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_which_main_weights_belong_to_weights(dtype):
    main = torch.randn(1000)
    assert not unlike(main, main.to(dtype)).any()
    other = main.to(dtype).clone()
    other[7] *= 1.5
    assert unlike(main, other).nonzero().tolist() == [[7]]
    halfway = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32).view(torch.float32)
    up = torch.tensor([0x3F81, 0x3F82], dtype=torch.int16).view(torch.bfloat16)
    down = torch.tensor([0x3F80, 0x3F81], dtype=torch.int16).view(torch.bfloat16)
    assert not unlike(halfway, up).any()
    assert not unlike(halfway, down).any()


def test_a_flipped_bit_in_the_file_is_seen_without_digests(tmp_path, capsys):
    folder = write_distributed(tmp_path)
    name = f"{STATE}exp_avg.{WEIGHT}"
    value = tensors()[name][1].numpy().tobytes()
    data = bytearray((folder / "__1_0.distcp").read_bytes())
    data[data.index(value) + 5] ^= 4
    (folder / "__1_0.distcp").write_bytes(data)
    assert f"{name} in __0_0.distcp, __1_0.distcp has bytes that" in verify(tmp_path, capsys, 1)


@pytest.mark.parametrize("place", ["common_state", "common.pt", "model_optim_rng.pt"])
def test_a_flipped_bit_beside_tensors(tmp_path, capsys, place):
    if place == "model_optim_rng.pt":
        file = write_legacy(tmp_path) / place
    else:
        file = write_distributed(tmp_path) / "__0_0.distcp"
    if place == "common.pt":
        file = file.with_name(place)
        file.write_bytes(saved(common()))
    verify(tmp_path, capsys, 0)
    data = bytearray(file.read_bytes())
    data[data.index(b"checkpoint_version")] ^= 1
    file.write_bytes(data)
    name = "common_state/shard_0_1 in __0_0.distcp" if place == "common_state" else place
    assert f"{name} has bytes that its checksum does not fit" in verify(tmp_path, capsys, 1)


def test_a_file_of_another_iteration(tmp_path, capsys):
    folder = write(tmp_path / "a")
    other = {name: tensor * 2 for name, tensor in tensors().items()}
    shutil.copy(write(tmp_path / "b", other) / "__1_0.distcp", folder)
    assert verify(tmp_path / "a", capsys, 1).count("damaged:") == 12


SUMMARIES = [
    None,
    "",
    '{"sharded_backend": "uorch_dist"}',
    '{"sharded_backend": "torch_dist", "sharded_backend_vdrsion": 1}',
    "[]",
    '\ufeff{"sharded_backend": "torch_dist", "sharded_backend_version": 1}',
]


@pytest.mark.parametrize("text", SUMMARIES)
def test_a_summary_that_megatron_does_not_take(tmp_path, capsys, text):
    path = write(tmp_path) / "metadata.json"
    path.unlink() if text is None else path.write_text(text)
    said = verify(tmp_path, capsys, 1)
    assert "damaged: metadata.json " in said
    assert said.count("\ndamaged: ") == 1


def test_a_summary_of_a_newer_release(tmp_path, capsys):
    path = write(tmp_path) / "metadata.json"
    keys = '"sharded_backend": "torch_dist", "sharded_backend_version": 1, "added_later": 1'
    path.write_text(f"{{{keys}}}")
    verify(tmp_path, capsys, 0)


@pytest.mark.parametrize("damage", ["gone", "truncated", "empty", "garbage"])
@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
def test_broken_files(tmp_path, capsys, file, damage):
    path = write(tmp_path) / file
    data = path.read_bytes()
    path.write_bytes(
        {"truncated": data[: len(data) // 2], "empty": b"", "garbage": b"no" * 500}.get(damage, b"")
    )
    if damage == "gone":
        path.unlink()
    said = verify(tmp_path, capsys, 1)
    assert str(path) in said
    assert "Traceback" not in said
    assert inspect.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_metadata_that_names_what_no_file_holds(tmp_path, capsys):
    """A run would look for it in vain, as after a flipped bit of the name."""
    path = write(tmp_path) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["mlp._extra_state/shard_0_1"] = BytesStorageMetadata()
    path.write_bytes(pickle.dumps(metadata))
    said = verify(tmp_path, capsys, 1)
    assert "no file is named for mlp._extra_state/shard_0_1" in said


def test_metadata_that_names_a_part_otherwise(tmp_path, capsys):
    """As after a flipped bit of the only place where the name stands."""
    parts = {f"mlp._extra_state/shard_{part}_3": saved(None) for part in range(3)}
    path = write(tmp_path, objects=parts) / ".metadata"
    verify(tmp_path, capsys, 0)
    path.write_bytes(
        path.read_bytes().replace(b"_extra_state/shard_1_3", b"_extra_stete/shard_1_3")
    )
    said = verify(tmp_path, capsys, 1)
    assert "damaged: .metadata names 2 of the 3 parts of mlp._extra_state\n" in said
    assert "It is sound" not in said


@pytest.mark.parametrize("reader", ["_Unpickler", "_QuickUnpickler"])
def test_too_little_memory_is_not_said_to_be_damage_alone(tmp_path, monkeypatch, reader):
    monkeypatch.setattr(pickles, reader, mock.Mock(side_effect=MemoryError))
    with pytest.raises(CheckpointError, match="since memory ran out: give more of it; if"):
        read_layout(write(tmp_path), quick=reader == "_QuickUnpickler")


def test_metadata_that_goes_on_behind_its_end(tmp_path, capsys):
    path = write(tmp_path) / ".metadata"
    path.write_bytes(path.read_bytes() + bytes(7))  # which a run takes for truncated
    assert "something follows its end" in verify(tmp_path, capsys, 1)


def without_args():
    state = common()
    del state["args"]
    return state


COMMONS = {
    "no iteration": ({**common(), "iteration": None}, "has no iteration"),
    "negative": (common(-3), "has -3 as its iteration"),
    "a string": (common("4"), "has '4' as its iteration"),
    "of another": (common(8), "is of iteration 8, the folder of 4"),
    "no arguments": (without_args(), "has no arguments"),
    "arguments a list": ({**common(), "args": [1]}, "has no arguments"),
    "a list": ([1, 2], "where the common state, a dictionary, should be"),
    "a number": (3, "where the common state, a dictionary, should be"),
    "a tensor": (torch.ones(2), "where the common state, a dictionary, should be"),
    "record a list": (common(**{records.KEY: [1]}), "record of digests cannot be read"),
    "record broken": (
        common(**{records.KEY: record_of(tensors()).replace("0", "1", 1)}),
        "record of digests is damaged",
    ),
    "record of another": (
        common(**{records.KEY: record_of(tensors(), 6)}),
        "is of iteration 4, the digests of 6",
    ),
}


@pytest.mark.parametrize("name", COMMONS)
@pytest.mark.parametrize("place", ["common_state", "common.pt", "model_optim_rng.pt"])
def test_common_states_of_nonsense(tmp_path, capsys, name, place):
    state, what = COMMONS[name]
    if place == "common_state":
        write_distributed(tmp_path, common_state=state)
    elif place == "common.pt":
        (write_distributed(tmp_path) / "common.pt").write_bytes(saved(state))
    else:
        write_legacy(tmp_path, model=state)
        what = what.replace("the common state, a dictionary, should", "a dictionary should")
    assert what in verify(tmp_path, capsys, 1)
    assert inspect.main([str(tmp_path)]) in (0, 2)  # without a trace


@pytest.mark.parametrize(
    "tracker", ["", "garbage", "-3", "4.0", "4 5", "iter_garbage", "٤", "9" * 50]
)
def test_trackers_of_nonsense(tmp_path, capsys, tracker):
    write(tmp_path, tracker=tracker)
    said = verify(tmp_path, capsys, 1)
    assert "latest_checkpointed_iteration.txt" in said
    assert "iter_0000004" in said
    assert inspect.main([str(tmp_path)]) == 2


def test_a_tracker_of_what_is_gone(tmp_path, capsys):
    write(tmp_path, tracker="8")
    assert "there is no folder iter_0000008" in verify(tmp_path, capsys, 1)


def test_folders_of_other_things(tmp_path, capsys):
    (tmp_path / "iter_garbage").mkdir()
    assert inspect.main([str(tmp_path / "iter_garbage")]) == 2
    assert "holds no checkpoint of Megatron" in capsys.readouterr().err
    assert inspect.main([str(tmp_path / "iter_garbage"), "--verify"]) == 2
    assert "holds no checkpoint of Megatron" in capsys.readouterr().err
    file = tmp_path / "file"
    file.touch()
    assert inspect.main([str(file), "--verify"]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "metadata",
    [[1], {}, {"state_dict_metadata": {}}, argparse.Namespace(state_dict_metadata=[1])],
    ids=["list", "dict", "other", "namespace"],
)
def test_metadata_of_nonsense(tmp_path, capsys, metadata):
    folder = write(tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert ".metadata cannot be read" in verify(tmp_path, capsys, 1)


@pytest.mark.parametrize("field", ["state_dict_metadata", "storage_data"])
@pytest.mark.parametrize("value", [None, [1], {"a": 1}, {}, 3])
def test_metadata_with_a_field_of_nonsense(tmp_path, capsys, field, value):
    folder = write(tmp_path)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    setattr(metadata, field, value)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert str(folder) in verify(tmp_path, capsys, 1)


def buffer_of(state, kind):
    """A flat buffer of two buckets, the first of which holds the last two parameters."""
    first, second = state[f"{STATE}{kind}.{WEIGHT}"].flatten(1)
    return torch.cat([state[f"{STATE}{kind}.final.bias"], torch.zeros(64 - 6), second, first])


def legacy(state, *, has_buffers=True):
    """Files of format torch of one rank, of a model whose layers stand one by one."""
    model = {
        **{f"decoder.layers.{i}.mlp.weight": state[WEIGHT][i].clone() for i in range(2)},
        "final.bias": state["final.bias"],
    }
    factors = [
        {
            key: state[f"{STATE}{key}.{WEIGHT}"][layer].clone()
            for key in ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")
        }
        for layer in range(2)
    ]
    factors.append({"exp_avg_sq": state[f"{STATE}exp_avg_sq.final.bias"]})
    whole = {**common(**{records.KEY: record_of(tensors())}), "model": model}
    spans = [[[0, 6], [64, 88], [88, 112]]]
    optimizer = {"came": {"format": 1, "parameters": factors, "spans": spans}}
    if has_buffers:
        flat = {kind: buffer_of(state, kind) for kind in ("param", "exp_avg")}
        optimizer[0] = {(torch.float32, torch.float32): {**flat, "numel_unpadded": 112}}
    return whole, optimizer


def test_legacy_files_are_proved_and_damage_is_named(tmp_path, capsys):
    write_legacy(tmp_path / "sound", *legacy(tensors()))
    said = verify(tmp_path / "sound", capsys, 0)
    assert "18 tensors are what was saved" in said
    assert "It is sound." in said
    write_legacy(tmp_path / "bare", *legacy(tensors(), has_buffers=False))
    said = verify(tmp_path / "bare", capsys, 0)
    assert "12 tensors are what was saved" in said
    assert "lie in flat buffers" in said
    assert "It is sound." not in said
    for name, what in (
        (f"{STATE}exp_avg.{WEIGHT}", f"momentum of {WEIGHT}[1], in mp_rank_00/distrib_optim.pt"),
        (f"{STATE}param.final.bias", "main weights of final.bias, in mp_rank_00/distrib_optim.pt"),
        (WEIGHT, f"weights of {WEIGHT}[1], in mp_rank_00/model_optim_rng.pt, is not"),
        (
            f"{STATE}exp_avg_sq_row.{WEIGHT}",
            f"exp_avg_sq_row of {WEIGHT}[1], in mp_rank_00/distrib",
        ),
    ):
        root = tmp_path / name
        write_legacy(root, *legacy(changed(name, flip)))
        assert what in verify(root, capsys, 1)


def test_momentum_in_int8_is_proved_by_its_values(tmp_path, capsys):
    momentum, scale = int8.quantize(torch.randn(600))
    record = {
        digests.MOMENTUM: {
            "weight": records.Saved(
                (600,), "float32", digests.digest_whole(int8.dequantize(momentum, scale))
            )
        }
    }
    packed = records.pack(records.Record(4, "came", 4, record, {}))
    state = {0: {"exp_avg": momentum, "exp_avg_scale": scale}}
    whole = {**common(**{records.KEY: packed}), "model": {}, "optimizer": {"state": state}}
    write_legacy(tmp_path / "sound", whole)
    assert "It is sound." in verify(tmp_path / "sound", capsys, 0)
    scale[2] *= 2
    write_legacy(tmp_path / "scaled", whole)
    assert "momentum of weight, in mp_rank_00/" in verify(tmp_path / "scaled", capsys, 1)


def test_buffers_whose_parameters_lie_anywhere(tmp_path, capsys):
    for number, spans in enumerate(([[[0, 6.5]]], [[[0, 1 << 40]]], [["ab"]], 3, [[[5, 2]]])):
        whole, optimizer = legacy(tensors())
        optimizer["came"]["spans"] = spans
        write_legacy(tmp_path / str(number), whole, optimizer)
        assert "lie in flat buffers" in verify(tmp_path / str(number), capsys, 0)


def test_legacy_files_that_are_gone(tmp_path, capsys):
    rank = write_legacy(tmp_path, *legacy(tensors()))
    (rank / "model_optim_rng.pt").unlink()
    assert f"{rank} holds no model file" in verify(tmp_path, capsys, 1)
