"""A small GPT under every wrapper that makes DTensors, and how far it is from a whole one."""

import torch
from came_pytorch import CAME as THEIRS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.support.oracle import distance

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
# Its gradients are sums over ranks in another order, of which little is left by ten steps.
LIMITS = {torch.float64: 1e-10, torch.float32: 5e-5}
VOCABULARY, WIDTH = 18, 12  # of rows, four ranks have 5, 5, 5 and 3


class Ranks:
    """This process among the ranks, and their meshes."""

    def __init__(self, folder):
        dist = torch.distributed
        self.size, self.rank, self.folder = dist.get_world_size(), dist.get_rank(), folder
        self.flat = init_device_mesh("cpu", (self.size,), mesh_dim_names=("dp",))
        if self.size == 4:
            self.square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    @property
    def kinds(self):
        """Wrappers for so many ranks."""
        many = ("fsdp", "hsdp", "tp", "sequence", "tp_fsdp")
        return {1: ("plain",), 2: ("fsdp", "tp", "sequence")}.get(self.size, many)

    @property
    def own_kinds(self):
        """Those that need so many ranks."""
        return ("hsdp", "tp_fsdp") if self.size == 4 else self.kinds


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def fresh_model(dtype=torch.float32):
    torch.manual_seed(1)
    return GPT().to(dtype)


def shard_everything(model, mesh, **settings):
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def tensor_parallel(model, mesh):
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def sequence_parallel(model, mesh):
    """The norms' weights are replicated DTensors, whose gradients are sums yet to be made."""
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    outside = {"embedding": embedding, "norm": SequenceParallel(), "head": head}
    parallelize_module(model, mesh, outside)
    for block in model.blocks:
        up = ColwiseParallel(input_layouts=Shard(1))
        down = RowwiseParallel(output_layouts=Shard(1))
        plan = {"norm": SequenceParallel(), "up": up, "down": down}
        parallelize_module(block, mesh, plan)
    return model


def wrap(ranks, kind, dtype=torch.float32, weights=None, **settings):
    model = fresh_model(dtype)
    if weights:
        model.load_state_dict(weights)
    if kind == "fsdp":
        return shard_everything(model, ranks.flat, **settings)
    if kind == "hsdp":
        return shard_everything(model, ranks.square, **settings)
    tp = ranks.flat if ranks.size == 2 else ranks.square["tp"] if ranks.size == 4 else None
    if kind == "tp":
        return tensor_parallel(model, tp)
    if kind == "sequence":
        return sequence_parallel(model, tp)
    if kind == "tp_fsdp":
        return shard_everything(sequence_parallel(model, tp), ranks.square["dp"], **settings)
    return model


def loss_of(model, step):
    tokens = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1).flatten())


def train(model, optimizer, steps, before_step=lambda model, step: None):
    for step in steps:
        loss_of(model, step).backward()
        before_step(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return model


def train_whole(steps, dtype=torch.float32, before_step=lambda model, step: None):
    """Return the model that the authors' optimizer trains on whole tensors."""
    model = fresh_model(dtype)
    return train(model, THEIRS(model.parameters(), **SETTINGS), steps, before_step)


def weights_of(model):
    return {
        name: param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()
        for name, param in model.named_parameters()
    }


def model_distance(ours, theirs):
    """How far a model is from another, as a fraction of what that has been trained."""
    ours, theirs = weights_of(ours), weights_of(theirs)
    start = weights_of(fresh_model(next(iter(theirs.values())).dtype))
    return distance(
        *(torch.cat([w[name].flatten() for name in theirs]) for w in (ours, theirs, start))
    )
