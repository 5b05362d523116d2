"""Checkpoints written by hand, byte by byte as Megatron writes them, without a training."""

import argparse
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_came.checkpoint_files.torch_dist import kind_and_key
from megatron_came.core import digests, records

COMMON = "common_state/shard_0_1"
WEIGHT, STATE = "decoder.layers.mlp.weight", "optimizer.state."  # names of tensors


def saved(thing: Any, protocol: int = 2) -> bytes:
    """What torch.save makes of it."""
    stream = io.BytesIO()
    torch.save(thing, stream, pickle_protocol=protocol)
    return stream.getvalue()


def common(iteration: Any = 4, **more: Any) -> dict[str, Any]:
    """The common state of a run of CAME."""
    args = argparse.Namespace(optimizer="came", use_distributed_optimizer=True, iteration=iteration)
    return {"args": args, "iteration": iteration, "checkpoint_version": 3.0, **more}


def tensors() -> dict[str, Tensor]:
    """A model of two parameters, with the state that a fully reshardable checkpoint has."""
    draw = torch.Generator().manual_seed(3)
    state: dict[str, Tensor] = {}
    for name, shape in {"decoder.layers.mlp.weight": (2, 6, 4), "final.bias": (6,)}.items():
        state[name] = torch.randn(shape, generator=draw)
        state[f"optimizer.state.param.{name}"] = state[name].clone()
        state[f"optimizer.state.exp_avg.{name}"] = torch.randn(shape, generator=draw)
        if len(shape) == 1:
            state[f"optimizer.state.exp_avg_sq.{name}"] = torch.rand(shape, generator=draw)
            continue
        for kind in ("sq", "res"):
            for axis, size in (("row", shape[-2]), ("col", shape[-1])):
                factor = torch.rand((shape[0], size), generator=draw)
                state[f"optimizer.state.exp_avg_{kind}_{axis}.{name}"] = factor
    return state


def write_distributed(
    root: Path,
    state: dict[str, Tensor] | None = None,
    *,
    objects: dict[str, bytes] | None = None,
    common_state: Any = None,
    protocol: int = 4,
    metadata_extra: Any = None,
    tracker: str | None = "4",
) -> Path:
    """Write a checkpoint of format torch_dist of iteration 4; returns the iteration's folder.

    Args:
        root: folder of ``--save``.
        state: tensors by name; each goes to two files by halves of its first dimension.
        objects: bytes of things other than tensors, by name.
        common_state: in place of :func:`common`.
        protocol: of ``.metadata``.
        metadata_extra: some thing more in ``.metadata``.
        tracker: content of the tracker file.
    """
    folder = root / "iter_0000004"
    folder.mkdir(parents=True)
    files = {name: io.BytesIO() for name in ("__0_0.distcp", "__1_0.distcp")}
    metadata = Metadata({}, None, {})

    def put(name: str, data: bytes, offsets: torch.Size | None, file: str) -> None:
        place = files[file].tell()
        files[file].write(data)
        index = MetadataIndex(name, offsets)
        metadata.storage_data[index] = _StorageInfo(file, place, len(data))

    for name, tensor in (tensors() if state is None else state).items():
        cut = (tensor.shape[0] + 1) // 2
        chunks = []
        for (start, stop), file in zip(((0, cut), (cut, tensor.shape[0])), files, strict=True):
            part = tensor[start:stop].clone()
            offsets = torch.Size([start] + [0] * (tensor.dim() - 1))
            if part.numel():
                chunks.append(ChunkStorageMetadata(offsets, part.shape))
                put(name, saved(part), offsets, file)
        properties = TensorProperties(dtype=tensor.dtype)
        metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, tensor.shape, chunks)
    things = {COMMON: saved([common() if common_state is None else common_state])}
    for name, data in (things | (objects or {})).items():
        put(name, data, None, "__0_0.distcp")
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
    if metadata_extra is not None:
        metadata.planner_data = metadata_extra
    for name, stream in files.items():
        (folder / name).write_bytes(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    if tracker is not None:
        (root / "latest_checkpointed_iteration.txt").write_text(tracker)
    return folder


def write_legacy(root: Path, model: Any = None, optimizer: Any = None, protocol: int = 2) -> Path:
    """Write a checkpoint of format torch of iteration 4; returns the folder of its only rank."""
    rank = root / "iter_0000004" / "mp_rank_00"
    rank.mkdir(parents=True)
    state = {name: value for name, value in tensors().items() if not name.startswith("optimizer")}
    whole = {**common(), "model": state} if model is None else model
    (rank / "model_optim_rng.pt").write_bytes(saved(whole, protocol))
    if optimizer is not None:
        (rank / "distrib_optim.pt").write_bytes(saved(optimizer, protocol))
    (root / "latest_checkpointed_iteration.txt").write_text("4")
    return rank


def record_of(state: dict[str, Tensor], iteration: int = 4) -> str:
    """The record of digests of :func:`tensors`, computed from whole tensors."""
    kinds: dict[str, dict[str, records.Saved]] = {}
    for name, tensor in state.items():
        kind, key = kind_and_key(name)[:2]
        parts = {key: tensor}
        if key.startswith("decoder.layers"):
            parts = {digests.name_of(key, (layer,)): part for layer, part in enumerate(tensor)}
        for each, part in parts.items():
            dtype = str(part.dtype).removeprefix("torch.")
            value = digests.digest_whole(part, as_fp32=kind != digests.WEIGHTS)
            kinds.setdefault(kind, {})[each] = records.Saved(tuple(part.shape), dtype, value)
    return records.pack(records.Record(iteration, "came", iteration, kinds, {}))
