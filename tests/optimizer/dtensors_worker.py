"""Ranks that train DTensors with CAME: every case is compared with whole tensors.

Each rank runs the cases that it is given and writes what failed, by case, as JSON.
"""

import copy
import json
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from came_pytorch import CAME as THEIRS
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from megatron_came import CAME
from megatron_came.core import remainders
from tests.optimizer import dtensors_checkpoints, dtensors_figures, dtensors_training
from tests.support import loaded_kernels
from tests.support.dtensor_models import SETTINGS, Ranks, train, wrap
from tests.support.oracle import TOLERANCE, distance
from tests.training.groups import connect, meet

loaded_kernels.load()

SHAPES = [
    *[(16, 12), (7, 5), (3, 8), (1, 6), (64, 33), (12, 1)],
    *[(9,), (2,), (16,), (4, 6, 8), (5, 3, 2), (2, 4, 3, 3), ()],
]


def layouts(ranks):
    one = [Replicate(), Shard(0), Shard(1), Shard(2)]
    yield from ((ranks.flat, (placement,)) for placement in one)
    if ranks.size == 4:
        yield from ((ranks.square, (first, second)) for first in one for second in one)


def parameter(shape, mesh, placements, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    start = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return nn.Parameter(distribute_tensor(start.clone(), mesh, placements)), start


def gradients(shape, steps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1 + sum(shape))
    scale = torch.rand(shape[:1], generator=generator, dtype=torch.float64).add_(0.1)
    scale = scale.view(-1, *[1] * (len(shape) - 1)) if shape else scale
    for _ in range(steps):
        yield (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def laid_out(gradient, mesh, placements):
    if not any(isinstance(p, Partial) for p in placements):
        return distribute_tensor(gradient, mesh, placements)
    addends = [mesh.size(i) for i, p in enumerate(placements) if isinstance(p, Partial)]
    return DTensor.from_local(gradient / addends[0], mesh, placements, run_check=False)


def error_of(shape, mesh, placements, dtype, kernels="auto", of_gradient=None, **settings):
    """Train five steps; return how far CAME's DTensor is from the authors' whole tensor."""
    ours, start = parameter(shape, mesh, placements, dtype)
    whole = nn.Parameter(start.clone())
    theirs = THEIRS([whole], **SETTINGS)
    optimizer = CAME([ours], kernels=kernels, **SETTINGS, **settings)
    for gradient in gradients(shape, 5, dtype):
        whole.grad = gradient.clone()
        ours.grad = laid_out(gradient, mesh, of_gradient or placements)
        theirs.step()
        optimizer.step()
    return distance(ours.detach().full_tensor(), whole.detach(), start)


def refusal_of(build):
    try:
        build()
    except ValueError as error:
        return str(error)
    return "nothing"


def case_every_placement(ranks):
    """Of 13 shapes; a minute."""
    for mesh, placements in layouts(ranks):
        for shape in SHAPES:
            cut = [p.dim for p in placements if isinstance(p, Shard)]
            if any(dim >= len(shape) for dim in cut) or (len(shape) == 4 and cut == [1, 1]):
                continue
            for dtype, kernels in ((torch.float64, "plain"), (torch.float32, "auto")):
                error = error_of(shape, mesh, placements, dtype, kernels)
                assert error <= TOLERANCE[dtype], (shape, placements, dtype, error)


def case_some_placements(ranks):
    cut = [((7, 5), (Shard(0),)), ((7, 5), (Shard(1),)), ((9,), (Shard(0),))]
    for shape, placements in cut:
        assert error_of(shape, ranks.flat, placements, torch.float64) <= 1e-12, placements
    for first, second in ((0, 1), (1, 0), (0, 0), (1, 1)):
        for shape in ((7, 5), (8, 6)):
            placements = (Shard(first), Shard(second))
            for dtype, limit in TOLERANCE.items():
                error = error_of(shape, ranks.square, placements, dtype)
                assert error <= limit, (shape, placements, dtype, error)


def case_gradients_partial_or_replicated(ranks):
    for placement in (Partial(), Replicate()):
        for own in (Shard(0), Shard(1), Replicate()):
            error = error_of((8, 7), ranks.flat, (own,), torch.float64, "plain", (placement,))
            assert error <= 1e-12, (placement, own, error)


def case_momentum_in_fewer_bits(ranks):
    for shape, own in (((40, 30), Shard(0)), ((40, 30), Shard(1)), ((9,), Shard(0))):
        for dtype, limit in ((torch.bfloat16, 0.02), (torch.int8, 0.05)):
            error = error_of(shape, ranks.flat, (own,), torch.float32, momentum_dtype=dtype)
            assert 0 < error <= limit, (shape, dtype, error)


def case_remainders(ranks):
    """bf16 weights and their lower halves are trained as fp32 ones are."""
    for shape, own in (((40, 30), Shard(0)), ((8, 7), Shard(1)), ((9,), Shard(0))):
        ours, start = parameter(shape, ranks.flat, (own,), torch.bfloat16)
        whole = nn.Parameter(start.float())
        theirs = THEIRS([whole], **SETTINGS)
        optimizer = CAME([ours], remainders=True, kernels="plain", **SETTINGS)
        for gradient in gradients(shape, 5, torch.bfloat16):
            whole.grad = gradient.float()
            ours.grad = distribute_tensor(gradient, ranks.flat, (own,))
            theirs.step()
            optimizer.step()
        low = optimizer.state[ours]["remainder"]
        joined = remainders.join(ours.to_local(), low.to_local())
        full = DTensor.from_local(
            joined, ranks.flat, (own,), shape=ours.shape, stride=ours.stride()
        ).full_tensor()
        assert distance(full, whole.detach(), start) <= 5e-5


def case_refusals(ranks):
    def of(shape, placements, mesh=ranks.flat, **settings):
        param = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, placements))
        return refusal_of(lambda: CAME([param], lr=1e-2, **settings))

    said = of((2, 3, 4, 4), (Shard(1),))
    assert all(words in said for words in ("(2, 3, 4, 4)", "Shard", "into equal parts")), said
    partial = DTensor.from_local(torch.ones(4, 4), ranks.flat, [Partial()], run_check=False)
    said = refusal_of(lambda: CAME([nn.Parameter(partial)], lr=1e-2))
    assert "Shard or Replicate" in said, said
    assert "leave it out" in of((4, 4, 4), (Shard(0),), flat_convolutions=True)
    param = nn.Parameter(distribute_tensor(torch.ones(4, 4), ranks.flat, (Shard(0),)))
    optimizer = CAME([param], lr=1e-2)
    param.grad = torch.ones_like(param)
    param.decoupled_grad = torch.ones(4, 4)
    assert "must be a DTensor" in refusal_of(optimizer.step)
    param.decoupled_grad = None
    optimizer.step()
    param._local_tensor = torch.ones(3, 4)
    param.grad = None
    assert "this rank holds (3, 4)" in refusal_of(optimizer.step)


# Ranks that do not agree.


def two_parameters(ranks, mesh=None, first=()):
    mesh, placements = mesh or ranks.flat, (*first, Shard(0))
    params = [parameter(shape, mesh, placements)[0] for shape in ((7, 5), (9,))]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def case_a_gradient_on_some_ranks_alone(ranks):
    first, second = two_parameters(ranks)
    optimizer = CAME([first, second], **SETTINGS)
    optimizer.step()
    before = [param.detach().full_tensor() for param in (first, second)]
    if ranks.rank == 0:
        second.grad = None
    said = refusal_of(optimizer.step)
    here = "none" if ranks.rank == 0 else "one"
    words = ("elements of (9,)", f"{ranks.size - 1} of {ranks.size} ranks", f"here {here}")
    assert all(each in said for each in words), said
    assert torch.equal(before[0], first.detach().full_tensor())
    second.grad = None  # on all ranks it is skipped
    optimizer.step()
    assert not torch.equal(before[0], first.detach().full_tensor())
    assert torch.equal(before[1], second.detach().full_tensor())


def case_different_settings(ranks):
    is_other = ranks.rank == 1
    settings = [
        ({"lr": 0.02}, "lr of parameter group 0 is"),
        ({"betas": (0.9, 0.95, 0.99)}, "betas of parameter group 0 is"),
        ({"momentum_dtype": torch.bfloat16}, "momentum"),
        ({"seed": 3}, "random bits"),
    ]
    for different, words in settings:
        optimizer = CAME(two_parameters(ranks), **{**SETTINGS, **(different if is_other else {})})
        said = refusal_of(optimizer.step)
        assert words in said, said
    params = two_parameters(ranks)
    optimizer = CAME(params[::-1] if is_other else params, **SETTINGS)
    assert "(9,)" in refusal_of(optimizer.step)
    params = two_parameters(ranks)
    optimizer = CAME(params, **SETTINGS)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.02 if is_other else 0.01
    assert "ranks differ in lr" in refusal_of(optimizer.step)
    if ranks.size == 4:  # copies, which no sum goes over
        params = two_parameters(ranks, ranks.square, (Replicate(),))
        optimizer = CAME(params, **{**SETTINGS, "lr": 0.01 + (ranks.rank >= 2)})
        assert "lr of parameter group 0" in refusal_of(optimizer.step)


# What a step costs.


def case_two_reductions_a_step(ranks):
    model = wrap(ranks, "fsdp")
    optimizer = CAME(model.parameters(), **SETTINGS)
    train(model, optimizer, range(2))
    seen, original = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        seen.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", counted):
        train(model, optimizer, [2])
    shapes = [tuple(param.shape) for param in model.parameters()]
    # g^2 of rows and columns and two marks; then u^2 in total, and three of rows and columns.
    first = sum(sum(shape) + 2 for shape in shapes)
    second = sum(3 * sum(shape) + 1 if len(shape) > 1 else 1 for shape in shapes)
    assert seen == [8 * first, 8 * second], (seen, first, second)


def case_copies_go_on(ranks):
    """Deep copies train on bit for bit, on copies of the parameters."""
    params = two_parameters(ranks)
    optimizer = CAME(params, momentum_dtype=torch.int8, **SETTINGS)
    optimizer.step()
    copied, twin = copy.deepcopy((params, optimizer))
    for param in copied:
        param.grad = torch.ones_like(param)
    twin.step()
    optimizer.step()
    for ours, theirs in zip(params, copied, strict=True):
        assert torch.equal(ours.to_local(), theirs.to_local())


def main():
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    connect("cases", meet())
    ranks, failed = Ranks(folder), {}
    cases = {**globals(), **vars(dtensors_training), **vars(dtensors_checkpoints)}
    cases |= vars(dtensors_figures)
    for name in wanted:
        begin = time.monotonic()
        try:
            case = name.rstrip("0123456789")
            cases[f"case_{case}"](ranks, *name.removeprefix(case))
        except BaseException:  # as errors of checkpoints are
            failed[name] = traceback.format_exc()
        if ranks.rank == 0:
            print(f"{name}: {time.monotonic() - begin:.1f} s", failed.get(name, ""), flush=True)
    (folder / f"failed-{ranks.size}-{ranks.rank}.json").write_text(json.dumps(failed))
    dist.barrier()
    dist.destroy_process_group()
