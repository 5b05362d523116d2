"""Factors of ``--use-torch-fsdp2``'s parameters are saved as with plain data parallelism."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)

from megatron_came.megatron.checkpoints.factors import leaves_of, place_in

tensors = pytest.importorskip("torch.distributed.tensor")
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

SHAPES = [(16, 3), (8,), (8, 2, 3)]
LAYERS = [(), ((0, 3, 5),)]  # none, or the fourth of five


def group(rank, size):
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


@pytest.fixture(params=[(rank, size) for size in (2, 4) for rank in range(size)], ids=str)
def mesh(request):
    rank, size = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    yield dist.device_mesh.init_device_mesh("cpu", (size,))
    dist.destroy_process_group()


def entries(local, mesh, kind, layers, tp_group):
    """What Megatron makes of a local tensor, with plain data parallelism and with FSDP2."""
    rank, size = mesh.get_local_rank(0), mesh.size(0)
    rows = local.chunk(size)[rank].clone()
    cut = tensors.DTensor.from_local(rows, mesh, [tensors.Shard(0)], run_check=False)
    cut.is_torch_fsdp2_param = True
    for tensor in (local, cut):
        given = {"prepend_offsets": layers, "tp_group": tp_group, "dp_cp_group": group(rank, size)}
        if kind == "whole":
            entry = make_sharded_tensor_for_checkpoint(tensor, "key", **given)
        else:
            axis = 1 if kind == "columns" else 0
            entry = make_tp_sharded_tensor_for_checkpoint(tensor, "key", tp_axis=axis, **given)
        if kind == "stacked":
            entry = apply_swiglu_sharded_factory(
                entry, layers, False, tp_group, given["dp_cp_group"]
            )
        yield entry, tensor


@pytest.mark.parametrize("tp", [(0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (kind, shape)
        for kind in ("whole", "rows", "columns", "stacked")
        for shape in SHAPES
        if kind != "columns" or len(shape) > 1
    ],
    ids=str,
)
def test_leaves_are_those_of_plain_data_parallelism(mesh, kind, shape, layers, tp):
    plain, cut = (
        leaves_of(entry, tensor)
        for entry, tensor in entries(
            torch.ones(shape, dtype=torch.bfloat16), mesh, kind, layers, group(*tp)
        )
    )
    assert len(plain[0]) == len(cut[0])
    for one, other in zip(plain[0], cut[0], strict=True):
        for name in (
            "key",
            "local_shape",
            "global_shape",
            "global_offset",
            "axis_fragmentations",
            "replica_id",
            "prepend_axis_num",
        ):
            assert getattr(other, name) == getattr(one, name), name
        assert place_in(other.data, cut[1]) == place_in(one.data, plain[1])


@pytest.mark.parametrize("field", ["global_offset", "global_shape"])
def test_leaves_that_lie_elsewhere_are_refused(field, mesh):
    _, (entry, cut) = entries(torch.ones(16, 3), mesh, "rows", (), group(0, 1))
    setattr(entry, field, (getattr(entry, field)[0] + 1, 3))
    with pytest.raises(ValueError, match="in a way that its factors cannot follow"):
        leaves_of(entry, cut)
