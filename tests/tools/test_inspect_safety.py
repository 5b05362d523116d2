"""Nothing that stands in a checkpoint is run, wherever it stands and however it is written."""

import argparse
import contextlib
import functools
import io
import operator
import os
import pickle
import runpy
import struct
import subprocess
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from megatron_came.checkpoint_files import names, pickles
from megatron_came.checkpoint_files.errors import CheckpointError, ForeignClassError
from megatron_came.checkpoint_files.names import StandIn
from megatron_came.tools import inspect
from tests.support.stored_checkpoints import (
    COMMON,
    common,
    saved,
    tensors,
    write_distributed,
    write_legacy,
)
from tests.support.strangers import Call, refused


class Inside:
    """A class of this module, which touches a file when its state is set."""

    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        Path(state["path"]).touch()


def attacks(marker: Path) -> dict[str, object]:
    """Things that make a file when they are unpickled, by the name that is to be refused."""
    code = f"open({str(marker)!r}, 'w')"
    script = str(marker.with_suffix(".py"))
    return {
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "builtins.open|_io.open|io.open": Call(open, str(marker), "w"),
        "posix.system": Call(os.system, f"touch '{marker}'"),
        "os.mkdir|posix.mkdir|nt.mkdir": Call(os.mkdir, str(marker)),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "runpy.run_path|runpy._run_code": Call(runpy.run_path, script),
        "functools.partial": Call(functools.partial(eval, code)),
        "operator.methodcaller|_operator.methodcaller": Call(
            operator.methodcaller("touch"), marker
        ),
        "builtins.map": list_of(map(eval, [code])),
        "torch.storage._load_from_bytes": Call(
            torch.storage._load_from_bytes, saved(Call(eval, code))
        ),
        "torch.serialization.load": Call(torch.load, str(marker)),
        "tests.tools.test_inspect_safety.Inside": Inside(str(marker)),
    }


def list_of(iterator):
    return [iterator]


REFUSED = list(attacks(Path("nothing")))
PLACES = (
    *("metadata", "common.pt", "common_state", "rng_state", "shard"),
    *("model_optim_rng.pt", "distrib_optim.pt"),
)


def write(root: Path, place: str, evil: object, protocol: int) -> None:
    """A checkpoint with an evil thing in one place."""
    nested = {"deep": [({"deeper": argparse.Namespace(inner=[evil])},)]}
    whole = {**common(), "more": nested}
    zipped = max(protocol, 2)
    if place == "metadata":
        write_distributed(root, metadata_extra=nested, protocol=protocol)
    elif place == "common.pt":
        folder = write_distributed(root)
        (folder / "common.pt").write_bytes(saved(whole, zipped))
    elif place == "common_state":
        write_distributed(root, common_state=whole)
    elif place == "rng_state":
        write_distributed(root, objects={"rng_state/shard_0_1": saved([nested], zipped)})
    elif place == "shard":
        folder = write_distributed(root)
        replace_first_item(folder, saved(nested, zipped))
    elif place == "model_optim_rng.pt":
        write_legacy(root, model=whole, protocol=zipped)
    else:
        write_legacy(root, optimizer={0: nested}, protocol=zipped)


def replace_first_item(folder: Path, data: bytes) -> None:
    """Put something in place of the first tensor of a shard file."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    info = next(each for each in metadata.storage_data.values() if each.offset == 0)
    file = folder / info.relative_path
    info.offset, info.length = file.stat().st_size, len(data)
    file.write_bytes(file.read_bytes() + data)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", ["metadata", "model_optim_rng.pt"])
def test_foreign_names_are_named_and_refused(tmp_path, capsys, place, name):
    marker = tmp_path / "marker"
    marker.with_suffix(".py").write_text(f"open({str(marker)!r}, 'w')")
    if "map" in name and place != "metadata":
        pytest.skip("torch.save does not write iterators")
    write(tmp_path / "save", place, attacks(marker)[name], 4 if place == "metadata" else 2)
    error = refused(tmp_path / "save", capsys, marker)
    names = name.split("|")
    if "_load_from_bytes" in name:  # Megatron, once imported, puts its own in that place
        names.append("megatron.core.safe_globals.safe_load_from_bytes")
    said = [f" names {each}, which Megatron does not write" for each in names]
    assert any(sentence in error for sentence in said), error


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", PLACES)
def test_wherever_and_however_it_is_written(tmp_path, capsys, place, protocol):
    marker = tmp_path / "marker"
    write(tmp_path / "save", place, attacks(marker)["builtins.eval"], protocol)
    assert "builtins.eval" in refused(tmp_path / "save", capsys, marker)


def test_the_attacks_work(tmp_path):
    """Otherwise the tests above would prove nothing."""
    marker = tmp_path / "marker"
    write(tmp_path / "save", "model_optim_rng.pt", attacks(marker)["builtins.eval"], 2)
    file = next((tmp_path / "save").rglob("model_optim_rng.pt"))
    torch.load(file, weights_only=False)
    assert marker.exists()


def opcodes(*parts: bytes | str | int) -> bytes:
    """A pickle of protocol 4 by hand: bytes as they are, strings and numbers as values."""
    made = b"\x80\x04"
    for part in parts:
        if isinstance(part, str):
            made += b"\x8c" + bytes([len(part)]) + part.encode()
        elif isinstance(part, int):
            made += b"J" + struct.pack("<i", part)
        else:
            made += part
    return made + b"."


GLOBAL, REDUCE, BUILD, EMPTY, TUPLE1, TUPLE2 = b"\x93", b"R", b"b", b")", b"\x85", b"\x86"
NAMESPACE = ("argparse", "Namespace", GLOBAL)
CRAFTED = {
    # Attributes of what is allowed, all the way to what is not.
    "dotted": opcodes("argparse", "Namespace.__init__.__globals__", GLOBAL),
    "dotted-torch": opcodes("torch", "Size.__class__.__base__", GLOBAL),
    "dotted-room": opcodes("megatron.core", "utils.os.system", GLOBAL),
    "dotted-module": opcodes("megatron.core.utils.os", "system", GLOBAL, "true", TUPLE1, REDUCE),
    "getattr-of-module": opcodes(
        "builtins", "getattr", GLOBAL, "os", "system", TUPLE2, REDUCE, "true", TUPLE1, REDUCE
    ),
    "getattr-private": opcodes(
        "builtins", "getattr", GLOBAL, *NAMESPACE, "__init__", TUPLE2, REDUCE
    ),
    "getattr-of-dict": opcodes(
        "builtins", "getattr", GLOBAL, "builtins", "dict", GLOBAL, "get", TUPLE2, REDUCE
    ),
    "state-of-class": opcodes(*NAMESPACE, b"}", "__getattr__", "x", b"sb"),
    "slots-of-class": opcodes(*NAMESPACE, b"N}", "__init__", "x", b"s", TUPLE2, BUILD),
    "state-of-function": opcodes(
        "torch._utils", "_rebuild_tensor_v2", GLOBAL, b"N}", "make", "x", b"s", TUPLE2, BUILD
    ),
    "state-of-dtype": opcodes("torch", "float32", GLOBAL, b"}", "a", 1, b"sb"),
    "state-of-list": opcodes(b"]}", "append", 1, b"sb"),
    "calls-a-dtype": opcodes("torch", "float32", GLOBAL, EMPTY, REDUCE),
    "calls-a-string": opcodes("x", EMPTY, REDUCE),
    "sets-items-of-object": opcodes(*NAMESPACE, EMPTY, b"\x81", "a", 1, b"s"),
    "appends-to-object": opcodes(*NAMESPACE, EMPTY, b"\x81", 1, b"a"),
    "extension": b"\x80\x02\x82\x01.",
    "instance-of-old-class": b"(cos\nsystem\np0\n.",
    "old-inst": b"(S'true'\nios\nsystem\n.",
    "old-obj": b"(cos\nsystem\nS'true'\no.",
    "storage-outside": opcodes("a", b"Q"),
    "reconstructor": opcodes("copyreg", "_reconstructor", GLOBAL, "os", "x", TUPLE2, REDUCE),
    "type-v2": opcodes(
        *("torch._tensor", "_rebuild_from_type_v2", GLOBAL),
        *(b"(", "builtins", "list", GLOBAL, b"NNNt", REDUCE),
    ),
    "tensor-without-storage": opcodes(
        "torch._utils", "_rebuild_tensor_v2", GLOBAL, b"(", "x", 0, EMPTY, EMPTY, b"t", REDUCE
    ),
    "codec": opcodes("_codecs", "encode", GLOBAL, "x", "rot13", TUPLE2, REDUCE),
    # Bombs: of memory, of time, of the stack.
    "memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"x.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"N.",
    "bytearray": opcodes("builtins", "bytearray", GLOBAL, 2**31 - 1, TUPLE1, REDUCE),
    "copies": b"\x80\x04("
    + b"K\x01" * 50000
    + b"lq\x00"
    + 20000 * (b"cbuiltins\nlist\nh\x00\x85R")
    + b".",
    "named-copies": b"\x80\x04("
    + b"K\x01" * 50000
    + b"lq\x00"
    + 3000 * (b"ccollections\ndeque\n)}\x8c\x05itemsh\x00s\x92")
    + b".",
    "state-copies": b"\x80\x04}q\x00("
    + b"".join(b"\x8c\x06%06dN" % number for number in range(50000))
    + b"u"
    + 3000 * (b"cargparse\nNamespace\n)\x81h\x00b")
    + b".",
    # Each tuple has the one before it eight times.
    "wide-key": b"\x80\x04K\x01\x85q\x00"
    + b"".join(b"(" + bytes([0x68, i]) * 8 + b"tq" + bytes([i + 1]) for i in range(7))
    + b"}(h\x07Nu.",
    "long-key": b"\x80\x04}\x8a\x20" + b"\x01" * 32 + b"Ns.",
    "deep-key": b"\x80\x04}" + b")" + b"\x85" * 300000 + b"Ns.",
    "deep-set": b"\x80\x04\x8f()" + b"\x85" * 300000 + b"\x90.",
    "stop-missing": b"\x80\x04}",
    "empty": b"",
    "not-a-pickle": b"hello",
    "underflow": b"\x80\x04R.",
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_pickles(name):
    if name in ("memo", "frame"):  # Python's unpickler in C would take 64 GiB for the first
        assert not pickles.load(CRAFTED[name], "it")
        return
    with pytest.raises(CheckpointError) as error:
        pickles.load(CRAFTED[name], "it")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("it ")


# Those that are no matter of time and memory.
CALM = {
    name: data
    for name, data in CRAFTED.items()
    if len(data) < 300 and name not in ("memo", "frame", "wide-key")
}


@pytest.mark.parametrize("name", CALM)
def test_crafted_pickles_change_nothing_when_they_are_read_quickly(name):
    makers = {each: each.make for each in names._MAKERS.values() if hasattr(each, "make")}
    with contextlib.suppress(CheckpointError):
        assert not callable(pickles.load(CALM[name], "it", quick=True))
    assert all(maker.make is make for maker, make in makers.items())


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_foreign_names_are_refused_when_they_are_read_quickly(tmp_path, name, protocol):
    marker = tmp_path / "marker"
    data = pickle.dumps({"x": attacks(marker)[name]}, protocol=protocol)
    with pytest.raises(ForeignClassError):
        pickles.load(data, "it", quick=True)
    assert not marker.exists()


def test_a_name_cannot_write_to_the_terminal():
    with pytest.raises(ForeignClassError) as error:
        pickles.load(opcodes("os\x1b[2J\n", "x" * 200, GLOBAL), "it")
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_what_stands_in_is_inert():
    """Nothing that a name leads to is the thing of that name."""
    stand_in = names.stand_in("argparse", "Namespace")
    assert isinstance(stand_in(1), StandIn)
    for module, name in (
        ("argparse", "ArgumentParser"),
        ("megatron.core.utils", "print"),
        ("megatron.core", "X.Y"),
        ("megatron.corex", "X"),
        ("torch.distributed.checkpoint.planner", "os.X"),
        ("numpy", "load"),
        ("pathlib", "Path.touch"),
    ):
        assert names.stand_in(module, name) is None


def test_what_megatron_writes_is_read():
    """All kinds of things in arguments and states, by each protocol."""
    import signal

    import numpy as np
    from megatron.core.transformer.enums import AttnBackend

    state = {
        "args": argparse.Namespace(
            backend=AttnBackend.auto,
            path=Path("x"),
            exit_signal=signal.SIGTERM,
            dtype=torch.bfloat16,
        ),
        "rng": [np.random.RandomState(1).get_state(), np.float64(3.5), torch.Size([1, 2])],
        "set": {1, 2},
        "ordered": OrderedDict(a=1),
        "bytes": [b"12", bytearray(b"3"), 2**80, -1.5, None, True],
    }
    for protocol in range(6):
        if protocol > 1:
            state["stream"] = io.BytesIO(b"abc")
        read = pickles.load(pickle.dumps(state, protocol=protocol), "it")
        args = read["args"]
        assert args.kind == "argparse.Namespace"
        assert args.get("backend").kind == "megatron.core.transformer.enums.AttnBackend"
        assert args.get("dtype") is torch.bfloat16
        assert read["rng"][0][1].kind == "numpy.ndarray"
        assert read["rng"][2] == (1, 2)
        assert sorted(read["set"]) == [1, 2]
        assert read["ordered"] == {"a": 1}
        assert read["bytes"] == [b"12", b"3", 2**80, -1.5, None, True]


@pytest.mark.parametrize("place", ["iteration", "optimizer", "path", "shape"])
def test_things_without_end_are_not_printed(tmp_path, capsys, place):
    """Lists of lists, each twice: 2^60 of them; 60,000 digits; what terminals would obey."""
    endless: object = []
    for _ in range(60):
        endless = [endless, endless]
    folder = write_distributed(
        tmp_path,
        common_state=common(
            **({"iteration": 1 << 200_000} if place == "iteration" else {}),
            **({"args": argparse.Namespace(optimizer=endless)} if place == "optimizer" else {}),
        ),
    )
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    if place == "path":
        next(iter(metadata.storage_data.values())).relative_path = "a\0\x1b[2J"
    if place == "shape":
        metadata.state_dict_metadata["final.bias"].size = [1 << 61] * 1000
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    for words in ([], ["--verify"]):
        assert inspect.main([*words, str(tmp_path)]) in (0, 1, 2)
    said = capsys.readouterr()
    assert len(said.out + said.err) < 5000
    assert "\x1b" not in said.out + said.err


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/hostname", ""])
def test_no_file_outside_of_the_folder_is_opened(tmp_path, capsys, name):
    folder = write_distributed(tmp_path)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "outside of the folder" in refused(tmp_path, capsys, tmp_path / "marker")


def test_views_beyond_their_storage(tmp_path, capsys):
    """Of a small file, tensors of any size: by strides of zero, or beyond the end."""
    whole = torch.zeros(4)
    for view in (whole.expand(10**12, 4), torch.zeros(1).expand(10**12)):
        root = tmp_path / str(view.dim())
        write_legacy(root, model={**common(), "model": {"w": view}})
        assert "more elements than stored" in refused(root, capsys, tmp_path / "marker")


def test_shared_containers_are_listed_once(tmp_path, capsys):
    """Lists of lists of lists, each twice, would otherwise be 2^60 tensors."""
    shared = [torch.ones(2)]
    for _ in range(60):
        shared = [shared, shared]
    endless = []
    endless.append(endless)
    model = {**common(), "model": shared, "endless": endless}
    write_legacy(tmp_path, model=model)
    assert inspect.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("float32") == 1


def test_sound_checkpoints_are_listed(tmp_path, capsys):
    write_distributed(tmp_path / "a")
    write_legacy(tmp_path / "b", optimizer={0: {torch.float32: {"exp_avg": torch.ones(3)}}})
    for root in ("a", "b"):
        assert inspect.main([str(tmp_path / root)]) == 0
        out = capsys.readouterr().out
        assert "iteration   4\noptimizer   came\n" in out
        assert out.count("exp_avg") == sum("exp_avg" in name for name in tensors()) * (
            root == "a"
        ) + (root == "b")
    assert COMMON not in out
