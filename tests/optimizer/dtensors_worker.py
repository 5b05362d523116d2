"""Ranks that train DTensors with CAME: every case is compared with whole tensors.

Each rank runs all cases and writes what failed, by case, as JSON.
"""

import copy
import json
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from came_pytorch import CAME as THEIRS
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from megatron_came import CAME

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
SHAPES = [(16, 12), (7, 5), (3, 8), (1, 6), (9,), (2,), (16,), (4, 6, 8), (5, 3, 2)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5}


def distance(ours, theirs, start):
    ours, theirs, start = ours.double(), theirs.double(), start.double()
    assert torch.isfinite(ours).all()
    return ((ours - theirs).norm() / (theirs - start).norm()).item()


def divides(shape, dim, parts):
    return dim < len(shape) and shape[dim] % parts == 0


class Ranks:
    def __init__(self, folder):
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.folder = folder
        self.flat = init_device_mesh("cpu", (self.size,), mesh_dim_names=("dp",))
        if self.size == 4:
            self.square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


# Tensors: placements, shapes, dtypes.


def layouts(ranks):
    yield ranks.flat, (Shard(0),)
    yield ranks.flat, (Shard(1),)
    yield ranks.flat, (Shard(2),)
    yield ranks.flat, (Replicate(),)
    if ranks.size == 4:
        for first in (Replicate(), Shard(0), Shard(1), Shard(2)):
            for second in (Replicate(), Shard(0), Shard(1), Shard(2)):
                yield ranks.square, (first, second)


def is_supported(shape, mesh, placements):
    cuts = [(mesh.size(i), p.dim) for i, p in enumerate(placements) if isinstance(p, Shard)]
    if any(dim >= len(shape) for _, dim in cuts):
        return False
    dims = [dim for _, dim in cuts]
    equal = cuts[:1] if dims == [0, 0] else [cut for cut in cuts if cut[1]]
    return (
        len(equal) + (0 in dims) <= 2
        and len(equal) < 2
        and all(divides(shape, dim, parts) for parts, dim in equal)
    )


def train_tensor(shape, mesh, placements, dtype, kernels, gradient_placements=None, **settings):
    """Return CAME's DTensor after ten steps, the authors' whole tensor, and the start."""
    generator = torch.Generator().manual_seed(sum(shape))
    start = torch.randn(shape, generator=generator, dtype=dtype)
    whole = nn.Parameter(start.clone())
    ours = nn.Parameter(distribute_tensor(start.clone(), mesh, placements))
    theirs = THEIRS([whole], **SETTINGS)
    optimizer = CAME([ours], kernels=kernels, **SETTINGS, **settings)
    scale = torch.rand(shape[:1], generator=generator, dtype=dtype).add_(0.1)
    for _ in range(10):
        gradient = torch.randn(shape, generator=generator, dtype=dtype)
        gradient *= scale.view(-1, *[1] * (len(shape) - 1))
        whole.grad = gradient.clone()
        ours.grad = as_gradient(gradient, mesh, gradient_placements or placements)
        theirs.step()
        optimizer.step()
    return optimizer, ours, whole.detach(), start


def as_gradient(gradient, mesh, placements):
    if not any(isinstance(p, Partial) for p in placements):
        return distribute_tensor(gradient, mesh, placements)
    addends = [mesh.size(i) for i, p in enumerate(placements) if isinstance(p, Partial)]
    return DTensor.from_local(gradient / addends[0], mesh, placements, run_check=False)


def case_every_placement(ranks):
    count = 0
    for mesh, placements in layouts(ranks):
        for shape in SHAPES:
            if not is_supported(shape, mesh, placements):
                continue
            paths = [(torch.float64, "plain"), (torch.float32, "auto")]
            for dtype, kernels in paths[: 1 + count % 2]:  # float64 always
                _, ours, whole, start = train_tensor(shape, mesh, placements, dtype, kernels)
                error = distance(ours.detach().full_tensor(), whole, start)
                assert error <= TOLERANCE[dtype], (shape, placements, dtype, error)
                count += 1
    assert count >= 40


def case_gradients_partial_or_replicated(ranks):
    for placement in (Partial(), Replicate()):
        for own in (Shard(0), Replicate()):
            _, ours, whole, start = train_tensor(
                (8, 6), ranks.flat, (own,), torch.float64, "plain", (placement,)
            )
            assert distance(ours.detach().full_tensor(), whole, start) <= 1e-12


def case_momentum_in_fewer_bits(ranks):
    for shape in ((40, 30), (9,)):
        for dtype, limit in ((torch.bfloat16, 0.02), (torch.int8, 0.05)):
            _, ours, whole, start = train_tensor(
                shape, ranks.flat, (Shard(0),), torch.float32, "auto", momentum_dtype=dtype
            )
            error = distance(ours.detach().full_tensor(), whole, start)
            assert 0 < error <= limit, (shape, dtype, error)


def refusal_of(build):
    try:
        build()
    except ValueError as error:
        return str(error)
    return "nothing"


def case_refusals(ranks):
    def of(shape, placements, mesh=ranks.flat, **settings):
        param = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, placements))
        return refusal_of(lambda: CAME([param], lr=1e-2, **settings))

    said = of((4, 5), (Shard(1),))
    assert all(words in said for words in ("(4, 5)", "Shard", "into equal parts")), said
    partial = DTensor.from_local(torch.ones(4, 4), ranks.flat, [Partial()], run_check=False)
    said = refusal_of(lambda: CAME([nn.Parameter(partial)], lr=1e-2))
    assert "Shard or Replicate" in said, said
    assert "leave it out" in of((4, 4, 4), (Shard(0),), flat_convolutions=True)
    if ranks.size == 4:
        assert "one may cut dimension 0" in of((8, 8), (Shard(1), Shard(1)), ranks.square)
        assert "into equal parts" in of((3, 8), (Shard(0), Shard(0)), ranks.square)
    param = nn.Parameter(distribute_tensor(torch.ones(4, 4), ranks.flat, (Shard(0),)))
    optimizer = CAME([param], lr=1e-2)
    param.grad = torch.ones_like(param)
    param.decoupled_grad = torch.ones(4, 4)
    assert "must be a DTensor" in refusal_of(optimizer.step)


# A small GPT.


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class GPT(nn.Module):
    def __init__(self, width=12, vocabulary=19):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def fresh_model(dtype=torch.float32):
    torch.manual_seed(1)
    return GPT().to(dtype)


def shard_everything(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model, mesh):
    for block in model.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    return model


def wrap(ranks, kind, dtype=torch.float32, weights=None):
    model = fresh_model(dtype)
    if weights:
        model.load_state_dict(weights)
    if kind == "plain":
        return model
    if kind == "fsdp":
        return shard_everything(model, ranks.flat)
    if kind == "hsdp":
        return shard_everything(model, ranks.square)
    if kind == "tp":
        return tensor_parallel(model, ranks.flat if ranks.size == 2 else ranks.square["tp"])
    return shard_everything(tensor_parallel(model, ranks.square["tp"]), ranks.square["dp"])


def kinds(ranks):
    return ("fsdp", "tp") if ranks.size == 2 else ("fsdp", "hsdp", "tp", "tp_fsdp")


def tokens_of(step):
    return torch.randint(19, (4, 8), generator=torch.Generator().manual_seed(step))


def train_model(model, optimizer, steps, clip=None):
    for step in steps:
        tokens = tokens_of(step)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1).flatten())
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def weights_of(model):
    return {
        name: param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()
        for name, param in model.named_parameters()
    }


def model_distance(ours, theirs):
    start = weights_of(fresh_model(theirs[next(iter(theirs))].dtype))
    flat = [torch.cat([w[name].flatten() for name in theirs]) for w in (ours, theirs, start)]
    return distance(*flat)


def case_gpt(ranks):
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 5e-5)):
        whole = fresh_model(dtype)
        train_model(whole, THEIRS(whole.parameters(), **SETTINGS), range(10))
        for kind in kinds(ranks):
            model = wrap(ranks, kind, dtype)
            train_model(model, CAME(model.parameters(), **SETTINGS), range(10))
            error = model_distance(weights_of(model), weights_of(whole))
            assert error <= limit, (kind, dtype, error)


def case_clipped_gradients(ranks):
    whole = fresh_model()
    train_model(whole, THEIRS(whole.parameters(), **SETTINGS), range(10), clip=0.3)
    model = wrap(ranks, "fsdp")
    train_model(model, CAME(model.parameters(), **SETTINGS), range(10), clip=0.3)
    assert model_distance(weights_of(model), weights_of(whole)) <= 5e-5


def case_two_reductions_a_step(ranks):
    model = wrap(ranks, "fsdp")
    optimizer = CAME(model.parameters(), **SETTINGS)
    train_model(model, optimizer, range(2))
    model(tokens_of(0)).sum().backward()
    seen, original = Counter(), dist.all_reduce

    def counted(*args, **kwargs):
        seen["all_reduce"] += 1
        return original(*args, **kwargs)

    dist.all_reduce = counted
    try:
        optimizer.step()
    finally:
        dist.all_reduce = original
    assert seen["all_reduce"] == 2, seen


# Checkpoints.


def save(model, optimizer, folder):
    state = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=folder)


def load(model, optimizer, folder):
    state = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def case_checkpoints_between_wrappers(ranks):
    whole = fresh_model()
    train_model(whole, CAME(whole.parameters(), **SETTINGS), range(6))
    names = kinds(ranks)
    for momentum in (torch.float32, torch.int8):
        for first, second in zip(names, (*names[1:], names[0]), strict=True):
            folder = ranks.folder / f"{momentum}-{first}-{second}"
            model = wrap(ranks, first)
            optimizer = CAME(model.parameters(), momentum_dtype=momentum, **SETTINGS)
            train_model(model, optimizer, range(3))
            save(model, optimizer, folder)
            other = wrap(ranks, second)
            resumed = CAME(other.parameters(), momentum_dtype=momentum, **SETTINGS)
            load(other, resumed, folder)
            train_model(other, resumed, range(3, 6))
            assert resumed.param_groups[0]["step"] == 6
            error = model_distance(weights_of(other), weights_of(whole))
            limit = 5e-5 if momentum == torch.float32 else 0.05
            assert error <= limit, (momentum, first, second, error)


def case_whole_state(ranks):
    """A state dictionary of whole tensors, as one process saves it."""
    whole = fresh_model()
    optimizer = CAME(whole.parameters(), **SETTINGS)
    train_model(whole, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(whole.state_dict())
    train_model(whole, optimizer, range(3, 6))
    for kind in kinds(ranks):
        model = wrap(ranks, kind, weights=weights)
        resumed = CAME(model.parameters(), **SETTINGS)
        resumed.load_state_dict(copy.deepcopy(saved))  # plain state is taken as it is
        train_model(model, resumed, range(3, 6))
        assert model_distance(weights_of(model), weights_of(whole)) <= 5e-5, kind


def hop(ranks, folder, index):
    """Load what another number of ranks has saved, train on, save; the last compares."""
    model = wrap(ranks, "fsdp" if ranks.size > 1 else "plain")
    optimizer = CAME(model.parameters(), **SETTINGS)
    if index:
        load(model, optimizer, folder / f"hop-{index - 1}")
    train_model(model, optimizer, range(2 * index, 2 * index + 2))
    save(model, optimizer, folder / f"hop-{index}")
    whole = fresh_model()
    train_model(whole, THEIRS(whole.parameters(), **SETTINGS), range(2 * index + 2))
    assert model_distance(weights_of(model), weights_of(whole)) <= 5e-5


def main():
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks(folder)
    failed = {}
    for name in wanted:
        try:
            if name.startswith("hop"):
                hop(ranks, folder, int(name[3:]))
            else:
                globals()[f"case_{name}"](ranks)
        except BaseException:  # as errors of checkpoints are
            failed[name] = traceback.format_exc()
            print(name, failed[name], flush=True)
    (folder / f"failed-{ranks.size}-{ranks.rank}.json").write_text(json.dumps(failed))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
