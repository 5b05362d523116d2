"""Any mesh and any placements of a DTensor: exact, or a sentence on every rank.

Meshes are PyTorch's, over process groups that do nothing, one rank after another; what they say
where a rank's part lies then trains on ranks that are threads.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_came import CAME, dtensors
from scripts.cases.simulated_ranks import SimulatedGroup, run_ranks
from tests.support.oracle import distance, gradient_history, oracle_updates

tensors = pytest.importorskip("torch.distributed.tensor")
from torch.distributed.tensor.placement_types import _StridedShard  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

Replicate, Shard = tensors.Replicate, tensors.Shard
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95, 0.99)}
STEPS = 3
# What there is a sentence for: see megatron_came.dtensors.
REFUSED = ("before fully_shard", "before the last two")


def chunk(tensor, dim, count, index):
    """One chunk as torch.chunk cuts, empty ones included."""
    size = -(-tensor.shape[dim] // count)
    start = min(index * size, tensor.shape[dim])
    return tensor.narrow(dim, start, min(size, tensor.shape[dim] - start))


def part_of(full, mesh, placements):
    """Cut a tensor as distribute_tensor does, which in older PyTorch needs collectives for it."""
    local = full
    for mesh_dim, placement in enumerate(placements):
        if hasattr(placement, "dim"):
            before = getattr(placement, "split_factor", 1)
            pieces = [chunk(local, placement.dim, before, piece) for piece in range(before)]
            own = mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim)
            local = torch.cat([chunk(p, placement.dim, *own) for p in pieces], placement.dim)
    return tensors.DTensor.from_local(
        local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def parts_of(mesh_shape, shape, placements):
    """Of each rank: its elements' offsets in the full tensor, and its shard or the refusal."""
    world = math.prod(mesh_shape)
    offsets = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    groups, parts = {}, []

    def simulated(group):
        if group is None:
            return None
        ranks = tuple(dist.get_process_group_ranks(group))
        return groups.setdefault(ranks, SimulatedGroup(ranks))

    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            mesh = dist.device_mesh.init_device_mesh("cpu", mesh_shape)
            param = part_of(offsets, mesh, placements)
            try:
                shard = dtensors.shard_of(param)
                shard = replace(
                    shard,
                    tp_group=simulated(shard.tp_group),
                    dp_group=simulated(shard.dp_group),
                    more_groups=tuple(map(simulated, shard.more_groups)),
                )
            except ValueError as refusal:
                shard = str(refusal)
            parts.append((param.to_local().reshape(-1).long(), shard))
        finally:
            dist.destroy_process_group()
    return parts, list(groups.values())


def error_of(shape, parts, groups, kernels="plain", dtype=torch.float64):
    """Train on slices, and return how far they are from the authors' whole tensor."""
    generator = torch.Generator().manual_seed(sum(shape))
    start = torch.randn(shape, generator=generator, dtype=dtype)
    history = gradient_history(shape, STEPS, "normal", dtype, generator)

    def program(rank):
        offsets, shard = parts[rank]
        param = torch.nn.Parameter(start.view(-1)[offsets])
        optimizer = CAME([param], shards={param: shard}, kernels=kernels, **SETTINGS)
        for gradient in history:
            param.grad = gradient.reshape(-1)[offsets]
            optimizer.step()
        return param.detach()

    whole = torch.full_like(start, torch.nan).view(-1)
    for (offsets, _), part in zip(parts, run_ranks(len(parts), program, groups), strict=True):
        whole[offsets] = part
    return distance(whole.view(shape), oracle_updates(start, history, **SETTINGS)[-1], start)


@st.composite
def meshes(draw):
    mesh_shape = draw(st.sampled_from([(2,), (3,), (4,), (2, 2), (2, 3), (3, 2), (2, 2, 2)]))
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    placements = []
    for _ in mesh_shape:
        dim = draw(st.integers(-1, len(shape) - 1))
        placements.append(Replicate() if dim < 0 else Shard(dim))
    for index in range(len(placements) - 1):  # as fully_shard after tensor parallelism
        dim = getattr(placements[index], "dim", None)
        later = [
            mesh_shape[other]
            for other in range(index + 1, len(mesh_shape))
            if getattr(placements[other], "dim", -1) == dim
        ]
        if later and draw(st.booleans()):
            placements[index] = _StridedShard(dim, split_factor=math.prod(later))
    return mesh_shape, shape, placements


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(meshes())
def test_a_drawn_mesh_is_exact_or_refused(drawn):
    mesh_shape, shape, placements = drawn
    parts, groups = parts_of(mesh_shape, shape, placements)
    refusals = {shard for _, shard in parts if isinstance(shard, str)}
    if refusals:
        (refusal,) = refusals
        assert all(isinstance(shard, str) for _, shard in parts)  # or the others would wait
        assert any(words in refusal for words in REFUSED)
        return
    assert error_of(shape, parts, groups) <= 1e-12


EXACT = [
    ((4,), (7, 5), [Shard(0)]),
    ((4,), (3, 5), [Shard(0)]),
    ((4,), (5,), [Shard(0)]),
    ((4,), (6, 8), [Shard(1)]),
    ((4,), (6, 7), [Shard(1)]),
    ((4,), (2, 3), [Shard(1)]),
    ((2, 2), (7, 5), [Shard(0), Shard(1)]),
    ((2, 2), (7, 5), [Shard(1), Shard(0)]),
    ((2, 2), (7, 5), [Shard(0), Shard(0)]),
    ((2, 2), (7, 5), [Shard(1), Shard(1)]),
    ((2, 2), (10, 3), [_StridedShard(0, split_factor=2), Shard(0)]),
    ((2, 2), (4, 6, 5), [Shard(1), Shard(2)]),
    ((3, 2), (3, 7, 5), [Shard(0), Shard(2)]),
    # Experts, their tensor parallelism, and fully_shard on top.
    ((2, 2, 2), (6, 5, 4), [_StridedShard(0, split_factor=2), Shard(0), Shard(2)]),
    ((2, 2, 2), (8, 6, 5), [_StridedShard(0, split_factor=2), Shard(0), Shard(1)]),
    ((2, 2, 2), (2, 7, 6), [Shard(1), Shard(0), Shard(2)]),
    ((2, 2, 2), (2, 8, 6), [_StridedShard(1, split_factor=2), Shard(0), Shard(1)]),
    ((2, 2, 2), (9, 7), [Shard(0), Shard(1), Shard(0)]),
]


@pytest.mark.parametrize(("mesh_shape", "shape", "placements"), EXACT, ids=str)
def test_these_are_exact(mesh_shape, shape, placements):
    parts, groups = parts_of(mesh_shape, shape, placements)
    assert not [shard for _, shard in parts if isinstance(shard, str)]
    assert error_of(shape, parts, groups) <= 1e-12
    assert error_of(shape, parts, groups, "auto", torch.float32) <= 5e-5


@pytest.mark.parametrize(
    ("mesh_shape", "shape", "placements", "words"),
    [
        ((2, 2), (5, 3), [_StridedShard(0, split_factor=2), Shard(0)], "before fully_shard"),
        ((2, 2), (5, 3), [_StridedShard(0, split_factor=3), Shard(0)], "default order"),
        ((2, 2), (2, 6, 3, 3), [Shard(1), Shard(1)], "before the last two"),
        ((2,), (4, 4), [tensors.Partial()], "Shard or Replicate"),
    ],
    ids=str,
)
def test_these_are_refused(mesh_shape, shape, placements, words):
    parts, _ = parts_of(mesh_shape, shape, placements)
    assert {isinstance(shard, str) and words in shard for _, shard in parts} == {True}


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_the_state_of_a_number_can_be_saved_and_loaded(momentum_dtype):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        param = torch.nn.Parameter(part_of(torch.ones(()), mesh, [Replicate()]))
        param.grad = part_of(torch.full((), 0.5), mesh, [Replicate()])
        optimizers = [CAME([param], momentum_dtype=momentum_dtype, **SETTINGS) for _ in range(2)]
        optimizers[0].step()
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        saved, loaded = (each.state[param]["exp_avg_sq"].to_local() for each in optimizers)
        assert saved.shape == ()
        assert saved == loaded > 0
    finally:
        dist.destroy_process_group()


def test_a_cut_that_is_not_summed_over_is_seen():
    """These tests can fail."""
    shape = (9, 7)
    parts, groups = parts_of((2, 2, 2), shape, [Shard(0), Shard(1), Shard(0)])
    parts = [(offsets, replace(shard, more_groups=())) for offsets, shard in parts]
    assert error_of(shape, parts, groups) > 1e-3
